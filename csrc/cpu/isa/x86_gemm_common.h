// The parts of the x86 kernels that take little time and are written for AVX2 on all of them:
// activations to row panels, sums to outputs. Everything has internal linkage; see gemm_kernels.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/gemm_kernels.h"

namespace duqpp::cpu {
namespace {

// Dot products run in the bits of a float. Weights are unsigned, u = 2w + 12 in 0 .. 24, and a
// block's accumulator starts from
//   first = bits(base) - 12 sum(2a),  base = 1.5 2^23 scale,  scale = 2^(ea - 127) / 4,
// a float whose last mantissa bit is worth `scale`. Adding the integer sum(2a u) leaves
// bits(base) + 4d, d the block's dot product, |4d| <= 32 * 144 < 2^22: the float base + 4d scale.
// Subtracting base is exact, and no conversion or multiplication was needed.
//
// base has the biased exponent ea - 129 + 23 + 127 = ea + 21, finite up to ea = 233.
constexpr int kMaxRowScale = 233;
constexpr int kBaseExponent = 21;
constexpr uint32_t kBaseMantissa = 0x400000u;  // of 1.5
constexpr uint32_t kNanBits = 0x7FC00000u;
constexpr int kWeightOffset = 12;

inline __m128i doubled_e2m1_table() {
  return _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
}

// u of each code.
inline __m128i offset_e2m1_table() {
  return _mm_add_epi8(doubled_e2m1_table(), _mm_set1_epi8(kWeightOffset));
}

inline int32_t load_int32(const uint8_t* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline float load_float(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Row panels hold `first` and then `base` behind the values.
void expand_rows(const uint8_t* codes, const uint8_t* scales, int rows, int64_t blocks,
                 uint8_t* row_panel) {
  const __m128i table = doubled_e2m1_table();
  const __m128i low_nibbles = _mm_set1_epi8(15);
  for (int row = 0; row < rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t index = row * blocks + block;
      uint8_t* const record = row_panel + block * rows * kRowPanelBytes;
      const __m128i bytes =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + index * kBlockBytes));
      const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(bytes, low_nibbles));
      const __m128i odd =
          _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), low_nibbles));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(record + row * 32), even);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(record + row * 32 + 16), odd);

      // Sixteen pairs, each in -24 .. 24, summed as unsigned bytes.
      const __m128i pairs = _mm_add_epi8(_mm_add_epi8(even, odd), _mm_set1_epi8(24));
      const __m128i halves = _mm_sad_epu8(pairs, _mm_setzero_si128());
      const int sum = _mm_cvtsi128_si32(halves) + _mm_extract_epi16(halves, 4) - 16 * 24;
      const uint32_t exponent = scales[index];
      const uint32_t base =
          exponent == 255 ? kNanBits : ((exponent + kBaseExponent) << 23) | kBaseMantissa;
      const uint32_t first = base - static_cast<uint32_t>(kWeightOffset * sum);
      std::memcpy(record + rows * 32 + row * 4, &first, sizeof first);
      std::memcpy(record + rows * 36 + row * 4, &base, sizeof base);
    }
  }
}

// Eight rounded values; the first `count` are written.
inline void store_vector(__m256 values, int count, Dtype dtype, uint8_t* out) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(kNanBits));
  values = _mm256_blendv_ps(values, nan, _mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  alignas(32) uint8_t bytes[32];
  uint8_t* const target = count == 8 ? out : bytes;
  if (dtype == Dtype::kFloat32) {
    _mm256_storeu_ps(reinterpret_cast<float*>(target), values);
  } else if (dtype == Dtype::kFloat16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                     _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
  } else {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(target),
        _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
  if (count < 8) std::memcpy(out, bytes, count * (dtype == Dtype::kFloat32 ? 4 : 2));
}

template <int kPanelColumns>
void store(const float* sums, int rows, int columns, const float* bias, void* out, int64_t stride,
           Dtype dtype) {
  const int element_bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; column += 8) {
      __m256 values = _mm256_loadu_ps(sums + row * kPanelColumns + column);
      if (bias) values = _mm256_add_ps(values, _mm256_loadu_ps(bias + column));
      store_vector(values, columns - column < 8 ? columns - column : 8, dtype,
                   static_cast<uint8_t*>(out) + (row * stride + column) * element_bytes);
    }
  }
}

}  // namespace
}  // namespace duqpp::cpu
