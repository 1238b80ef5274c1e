// mxfp4_gemm from its definition, in double precision, sharing no code with the library: one output
// at a time, from the row-major tensors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace duqpp::testing {

struct Matrix {  // [rows, K] of MXFP4, row-major
  int64_t rows, K;
  std::vector<uint8_t> codes, scales;
};

// Source: OCP MX v1.0, section 5.3.3.
inline double code_value(const Matrix& matrix, int64_t row, int64_t column) {
  constexpr double kMagnitudes[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const uint8_t byte = matrix.codes[(row * matrix.K + column) / 2];
  const int code = column % 2 ? byte >> 4 : byte & 15;
  return code & 8 ? -kMagnitudes[code & 7] : kMagnitudes[code & 7];
}

inline double scale_value(const Matrix& matrix, int64_t row, int64_t block) {
  const uint8_t byte = matrix.scales[row * (matrix.K / 32) + block];
  return byte == 255 ? std::numeric_limits<double>::quiet_NaN() : std::ldexp(1.0, byte - 127);
}

// The exact product of two blocks: 13 bits and an exponent, which double always holds.
inline double block_product(const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t block) {
  double dot = 0;
  for (int64_t k = block * 32; k < block * 32 + 32; ++k)
    dot += code_value(a, m, k) * code_value(b, n, k);
  return dot * scale_value(a, m, block) * scale_value(b, n, block);
}

// a + b rounded once to float32. The double sum is moved to an odd last bit when it is not exact,
// after which rounding it again is harmless (it has more than two bits to spare).
inline float add_rounded_once(float a, double b) {
  if (std::isinf(a) || std::isnan(a) || std::isnan(b)) return a + static_cast<float>(b * 0);
  double sum = a + b;
  const double part = sum - a;
  const double error = (a - (sum - part)) + (b - part);
  int64_t bits = __builtin_bit_cast(int64_t, sum);
  if (error != 0 && bits % 2 == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
  return static_cast<float>(__builtin_bit_cast(double, bits));
}

// Sixteen blocks at a time in order, then those sums in order.
inline float dot_in_order(const Matrix& a, const Matrix& b, int64_t m, int64_t n) {
  float total = 0;
  for (int64_t first = 0; first < a.K / 32; first += 16) {
    float sum = 0;
    for (int64_t i = first; i < std::min(first + 16, a.K / 32); ++i) {
      sum = add_rounded_once(sum, block_product(a, b, m, n, i));
    }
    total += sum;
  }
  return total;
}

// `value` on the grid of a binary format with `digits` significant bits, smallest normal
// 2^min_exponent and largest finite `largest`; ties to even.
inline double round_to(double value, int digits, int min_exponent, double largest) {
  if (value == 0 || std::isnan(value) || std::isinf(value)) return value;
  const int exponent = std::max(std::ilogb(value), min_exponent);
  const double unit = std::ldexp(1.0, exponent - digits + 1);
  const double rounded = std::nearbyint(value / unit) * unit;
  return std::abs(rounded) > largest ? std::copysign(INFINITY, value) : rounded;
}
inline double round_to_bfloat16(double value) { return round_to(value, 8, -126, 0x1.FEp127); }
inline double round_to_float16(double value) { return round_to(value, 11, -14, 65504.0); }

}  // namespace duqpp::testing
