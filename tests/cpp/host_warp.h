// The warp policy of csrc/cuda/rotate_quantize.cuh on a CPU: 32 lanes as an array, and the one
// matrix instruction written from its definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/rotate_quantize.cuh"
#include "format/e2m1.h"
#include "host_lanes.h"

inline float from_bfloat16(uint16_t bits) { return duqpp::float_from_bits(uint32_t{bits} << 16); }

// Rounds to nearest even; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t bits = duqpp::float_bits(value);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline uint16_t to_float16(float value) {
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline float from_bits(duqpp::Dtype dtype, uint16_t bits) {
  return dtype == duqpp::Dtype::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

inline uint16_t to_bits(duqpp::Dtype dtype, float value) {
  return dtype == duqpp::Dtype::kFloat16 ? to_float16(value) : to_bfloat16(value);
}

// Where lane's i-th element lies in the operands of mma.m16n8k16 with 16-bit inputs, as the PTX ISA
// has it in "Matrix Fragments for mma.m16n8k16": group = lane >> 2, thread = lane % 4.
namespace ptx {
inline int a_row(int lane, int i) {
  return (lane >> 2) + (i == 2 || i == 3 || i == 6 || i == 7 ? 8 : 0);
}
inline int a_column(int lane, int i) { return (lane % 4) * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
inline int b_row(int lane, int i) { return (lane % 4) * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
inline int b_column(int lane, int) { return lane >> 2; }
inline int c_row(int lane, int i) { return (lane >> 2) + (i >= 2 ? 8 : 0); }
inline int c_column(int lane, int i) { return (lane % 4) * 2 + (i & 1); }
}  // namespace ptx

struct HostWarp : HostLanes {
  static inline int misaligned_loads = 0;

  static void load(duqpp::Words& words, const void* address, bool valid) {
    if (!valid) return;
    misaligned_loads += reinterpret_cast<uintptr_t>(address) % sizeof words != 0;
    std::memcpy(&words, address, sizeof words);
  }

  template <duqpp::Dtype kDtype>
  static void unpack(const duqpp::Words& words, float (&values)[duqpp::kLaneValues]) {
    uint16_t bits[duqpp::kLaneValues];
    std::memcpy(bits, &words, sizeof bits);
    for (int i = 0; i < duqpp::kLaneValues; ++i) values[i] = from_bits(kDtype, bits[i]);
  }

  template <duqpp::Dtype kDtype>
  static duqpp::Words pack(const float (&values)[duqpp::kLaneValues]) {
    uint16_t bits[duqpp::kLaneValues];
    for (int i = 0; i < duqpp::kLaneValues; ++i) bits[i] = to_bits(kDtype, values[i]);
    duqpp::Words words;
    std::memcpy(&words, bits, sizeof bits);
    return words;
  }

  static float silu(float x) { return x / (1.0f + std::exp(-x)); }

  // mma.m16n8k16, row.col.f32.bf16.bf16.f32.
  static void mma(const Lanes<duqpp::MmaA>& a, const Lanes<duqpp::MmaB>& b, Lanes<duqpp::MmaC>& c) {
    float A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const auto bits = static_cast<uint16_t>(a[lane].word[i / 2] >> (16 * (i & 1)));
        A[ptx::a_row(lane, i)][ptx::a_column(lane, i)] = from_bfloat16(bits);
      }
      for (int i = 0; i < 4; ++i) {
        const auto bits = static_cast<uint16_t>(b[lane].word[i / 2] >> (16 * (i & 1)));
        B[ptx::b_row(lane, i)][ptx::b_column(lane, i)] = from_bfloat16(bits);
        C[ptx::c_row(lane, i)][ptx::c_column(lane, i)] = c[lane].value[i];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        for (int k = 0; k < 16; ++k) C[row][column] += A[row][k] * B[k][column];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        c[lane].value[i] = C[ptx::c_row(lane, i)][ptx::c_column(lane, i)];
      }
    }
  }

  static uint32_t amax_bits(const float (&values)[duqpp::kLaneValues]) {
    uint32_t amax = 0;
    for (const float value : values) {
      const uint32_t bits = duqpp::float_bits(value) & 0x7FFFFFFFu;
      amax = amax > bits ? amax : bits;
    }
    return amax;
  }

  static void quad_max(Lanes<uint32_t>& bits) {
    for (int lane = 0; lane < 32; lane += 4) {
      uint32_t largest = 0;
      for (int i = 0; i < 4; ++i) largest = largest > bits[lane + i] ? largest : bits[lane + i];
      for (int i = 0; i < 4; ++i) bits[lane + i] = largest;
    }
  }

  static void quad_sum(Lanes<uint32_t>& sum) {
    for (int lane = 0; lane < 32; lane += 4) {
      const uint32_t total = sum[lane] + sum[lane + 1] + sum[lane + 2] + sum[lane + 3];
      for (int i = 0; i < 4; ++i) sum[lane + i] = total;
    }
  }

  // The butterfly of shuffles, whose lane 0 adds in this order.
  static float tree_sum(const Lanes<float>& sum) {
    Lanes<float> total = sum;
    for (int distance = 16; distance > 0; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) total[lane] += total[lane + distance];
    }
    return total[0];
  }

  template <bool kSaturate>
  static uint32_t encode(const float (&values)[duqpp::kLaneValues], float factor) {
    uint32_t codes = 0;
    for (int i = 0; i < duqpp::kLaneValues; ++i) {
      codes |= duqpp::encode_e2m1(values[i] * factor) << (4 * i);
    }
    return codes;
  }
};
