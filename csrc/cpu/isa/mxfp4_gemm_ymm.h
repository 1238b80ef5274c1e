// mxfp4_gemm in 256-bit registers: 3 rows x 16 columns of sums. Compiled twice, with AVX-VNNI and
// without: the step of four columns is vpdpbusd, or vpmaddubsw and an addition in 16 bits.
#pragma once

#include "cpu/isa/x86_gemm_common.h"

namespace duqpp::cpu {
namespace {

constexpr int kMaxRows = 3;  // 2 x 6 accumulators, two weights, the activations: 16 registers
constexpr int kHalves = 2;   // a tile's 16 rows are two registers
constexpr int kWordBytes = kTileRows * 4;

// A block's integer dot products with eight rows of W, added to `first`: see x86_gemm_common.h.
#if defined(__AVXVNNI__)
inline __m256i start_dot(__m256i first) { return first; }
inline __m256i add_products(__m256i dot, __m256i weights, __m256i activations) {
  return _mm256_dpbusd_avx_epi32(dot, weights, activations);
}
inline __m256i finish_dot(__m256i dot, __m256i) { return dot; }
#else
// A 16-bit lane sums half of the block's 32 products, each at most 24 * 12.
static_assert(16 * 24 * 12 <= 32767);
inline __m256i start_dot(__m256i) { return _mm256_setzero_si256(); }
inline __m256i add_products(__m256i dot, __m256i weights, __m256i activations) {
  __m256i sum = _mm256_add_epi16(dot, _mm256_maddubs_epi16(weights, activations));
  // Makes the additions happen in this order: GCC rearranges them such that all products are alive
  // at once, more than there are registers (28 against 21 ms at M = 512, N = 1024, K = 4096, one
  // thread).
  __asm__("" : "+x"(sum));
  return sum;
}
inline __m256i finish_dot(__m256i dot, __m256i first) {
  return _mm256_add_epi32(_mm256_madd_epi16(dot, _mm256_set1_epi16(1)), first);
}
#endif

// total + dot * a_scale * b_scales, from the dot products' bits.
inline __m256 add_block(__m256 total, __m256i dot_bits, __m256 base, __m256 b_scales) {
  return _mm256_fmadd_ps(_mm256_sub_ps(_mm256_castsi256_ps(dot_bits), base), b_scales, total);
}

// 2^(e - 127) of 8 scale bytes; the two that the exponent field cannot say are put in.
inline __m256 load_scales(const uint8_t* scales) {
  const __m256i bytes =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
  __m256i bits = _mm256_slli_epi32(bytes, 23);
  bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x00400000),
                            _mm256_cmpeq_epi32(bytes, _mm256_setzero_si256()));
  bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(kNanBits),
                            _mm256_cmpeq_epi32(bytes, _mm256_set1_epi32(255)));
  return _mm256_castsi256_ps(bits);
}

inline void add_to(float* sums, __m256 segment) {
  _mm256_store_ps(sums, _mm256_add_ps(_mm256_load_ps(sums), segment));
}

struct WordWeights {
  __m256i even, odd;
};

// One word of eight rows: four even columns and four odd ones.
inline WordWeights unpack_word(const uint8_t* codes) {
  const __m256i table = _mm256_broadcastsi128_si256(offset_e2m1_table());
  const __m256i low_nibbles = _mm256_set1_epi8(15);
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  return {_mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low_nibbles)),
          _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_nibbles))};
}

void expand_tile(const uint8_t* codes, const uint8_t* scales, int64_t blocks, int,
                 uint8_t* weight_panel) {
  for (int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      uint8_t* const record = weight_panel + block * kWeightPanelBytes + half * 32;
#pragma GCC unroll 4
      for (int word = 0; word < kBlockWords; ++word) {
        const WordWeights weights =
            unpack_word(codes + block * kTileBlockBytes + word * kWordBytes + half * 32);
        _mm256_store_si256(reinterpret_cast<__m256i*>(record + word * kWordBytes), weights.even);
        _mm256_store_si256(reinterpret_cast<__m256i*>(record + (word + 4) * kWordBytes),
                           weights.odd);
      }
      _mm256_store_ps(reinterpret_cast<float*>(record + 8 * kWordBytes),
                      load_scales(scales + block * kTileRows + half * 8));
    }
  }
}

template <int kRows>
void multiply_panel_rows(const uint8_t* row_panel, const uint8_t* weight_panel, int64_t blocks,
                         float* sums) {
  __m256 total[kRows][kHalves];
#pragma GCC unroll 3
  for (int row = 0; row < kRows; ++row) total[row][0] = total[row][1] = _mm256_setzero_ps();
  for (int64_t block = 0; block < blocks; ++block) {
    __m256i dot[kRows][kHalves];
#pragma GCC unroll 3
    for (int row = 0; row < kRows; ++row) {
      dot[row][0] = dot[row][1] =
          start_dot(_mm256_set1_epi32(load_int32(row_panel + kRows * 32 + row * 4)));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const auto* const word = reinterpret_cast<const __m256i*>(weight_panel + i * kWordBytes);
      const __m256i weights0 = _mm256_load_si256(word);
      const __m256i weights1 = _mm256_load_si256(word + 1);
#pragma GCC unroll 3
      for (int row = 0; row < kRows; ++row) {
        const __m256i a = _mm256_set1_epi32(load_int32(row_panel + row * 32 + i * 4));
        dot[row][0] = add_products(dot[row][0], weights0, a);
        dot[row][1] = add_products(dot[row][1], weights1, a);
      }
    }
    const auto* const b_scales = reinterpret_cast<const float*>(weight_panel + 8 * kWordBytes);
#pragma GCC unroll 3
    for (int row = 0; row < kRows; ++row) {
      const __m256i first = _mm256_set1_epi32(load_int32(row_panel + kRows * 32 + row * 4));
      const __m256 base = _mm256_set1_ps(load_float(row_panel + kRows * 36 + row * 4));
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half) {
        total[row][half] = add_block(total[row][half], finish_dot(dot[row][half], first), base,
                                     _mm256_load_ps(b_scales + half * 8));
      }
    }
    row_panel += kRows * kRowPanelBytes;
    weight_panel += kWeightPanelBytes;
  }
#pragma GCC unroll 3
  for (int row = 0; row < kRows; ++row) {
    add_to(sums + row * kTileRows, total[row][0]);
    add_to(sums + row * kTileRows + 8, total[row][1]);
  }
}

template <int kRows>
void multiply_tile_rows(const uint8_t* row_panel, const uint8_t* codes, const uint8_t* scales,
                        int64_t blocks, float* sums) {
  __m256 total[kRows][kHalves];
#pragma GCC unroll 3
  for (int row = 0; row < kRows; ++row) total[row][0] = total[row][1] = _mm256_setzero_ps();
  for (int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      __m256i dot[kRows];
#pragma GCC unroll 3
      for (int row = 0; row < kRows; ++row) {
        dot[row] = start_dot(_mm256_set1_epi32(load_int32(row_panel + kRows * 32 + row * 4)));
      }
#pragma GCC unroll 4
      for (int word = 0; word < kBlockWords; ++word) {
        const WordWeights weights = unpack_word(codes + word * kWordBytes + half * 32);
#pragma GCC unroll 3
        for (int row = 0; row < kRows; ++row) {
          const uint8_t* const values = row_panel + row * 32 + word * 4;
          dot[row] = add_products(dot[row], weights.even, _mm256_set1_epi32(load_int32(values)));
          dot[row] =
              add_products(dot[row], weights.odd, _mm256_set1_epi32(load_int32(values + 16)));
        }
      }
      const __m256 b_scales = load_scales(scales + half * 8);
#pragma GCC unroll 3
      for (int row = 0; row < kRows; ++row) {
        const __m256i first = _mm256_set1_epi32(load_int32(row_panel + kRows * 32 + row * 4));
        const __m256 base = _mm256_set1_ps(load_float(row_panel + kRows * 36 + row * 4));
        total[row][half] = add_block(total[row][half], finish_dot(dot[row], first), base, b_scales);
      }
    }
    row_panel += kRows * kRowPanelBytes;
    codes += kTileBlockBytes;
    scales += kTileRows;
  }
#pragma GCC unroll 3
  for (int row = 0; row < kRows; ++row) {
    add_to(sums + row * kTileRows, total[row][0]);
    add_to(sums + row * kTileRows + 8, total[row][1]);
  }
}

void multiply_panel(const uint8_t* row_panel, int rows, const uint8_t* weight_panel, int64_t blocks,
                    float* sums) {
  static constexpr decltype(&multiply_panel_rows<1>) kByRows[kMaxRows] = {
      multiply_panel_rows<1>, multiply_panel_rows<2>, multiply_panel_rows<3>};
  kByRows[rows - 1](row_panel, weight_panel, blocks, sums);
}

void multiply_tile(const uint8_t* row_panel, int rows, const uint8_t* codes, const uint8_t* scales,
                   int64_t blocks, float* sums) {
  static constexpr decltype(&multiply_tile_rows<1>) kByRows[kMaxRows] = {
      multiply_tile_rows<1>, multiply_tile_rows<2>, multiply_tile_rows<3>};
  kByRows[rows - 1](row_panel, codes, scales, blocks, sums);
}

constexpr GemmKernels kKernels = {kMaxRowScale,   kMaxRows,          kMaxRows,
                                  expand_rows,    /*panel_tiles=*/1, expand_tile,
                                  multiply_panel, multiply_tile,     store<kTileRows>};

}  // namespace
}  // namespace duqpp::cpu
