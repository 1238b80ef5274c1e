// mxfp4_gemm for AVX-512 with VNNI: 6 rows x 32 columns of sums in registers.
//
// One vpdpbusd multiplies four columns of 16 rows of W by four activations; a block of 32 is eight
// of them, one subtraction and one fused multiply-add. With a second row panel to multiply, weights
// are expanded to bytes in L2 first; with one, nibbles go from memory to the products in registers.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/isa/x86_gemm_common.h"

namespace duqpp::cpu {
namespace {

// Of 32 registers: 2 x 12 accumulators, two weights, activations; or 16 sums, eight weights, a
// scale and four dot products in progress.
constexpr int kMaxPanelRows = 6;
constexpr int kMaxTileRows = 16;
constexpr int kPanelTiles = 2;
constexpr int kPanelColumns = kPanelTiles * kTileRows;
constexpr int64_t kPanelBlockBytes = kPanelTiles * kWeightPanelBytes;

// 2^(e - 127) of 16 scale bytes; the two that the exponent field cannot say are put in.
inline __m512 load_scales(const uint8_t* scales) {
  const __m512i bytes =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  __m512i bits = _mm512_slli_epi32(bytes, 23);
  bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(bytes, bytes),
                               _mm512_set1_epi32(0x00400000));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(255)),
                               _mm512_set1_epi32(kNanBits));
  return _mm512_castsi512_ps(bits);
}

inline void add_to(float* sums, __m512 segment) {
  _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), segment));
}

// The eight vectors of a tile's block: even columns of each word, then odd ones.
inline void unpack_block(const uint8_t* codes, __m512i (&weights)[8]) {
  const __m512i table = _mm512_broadcast_i32x4(offset_e2m1_table());
  const __m512i low_nibbles = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int word = 0; word < kBlockWords; ++word) {
    const __m512i bytes = _mm512_loadu_si512(codes + word * 64);
    weights[word] = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low_nibbles));
    weights[word + 4] =
        _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_nibbles));
  }
}

void expand_tile(const uint8_t* codes, const uint8_t* scales, int64_t blocks, int index,
                 uint8_t* weight_panel) {
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t* const record = weight_panel + block * kPanelBlockBytes + index * 64;
    __m512i weights[8];
    unpack_block(codes + block * kTileBlockBytes, weights);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm512_store_si512(record + i * kPanelTiles * 64, weights[i]);
    _mm512_store_ps(record + 8 * kPanelTiles * 64, load_scales(scales + block * kTileRows));
  }
}

template <int kRows>
void multiply_panel_rows(const uint8_t* row_panel, const uint8_t* weight_panel, int64_t blocks,
                         float* sums) {
  __m512 total[kRows][kPanelTiles];
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) total[row][0] = total[row][1] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; ++block) {
    __m512i dot[kRows][kPanelTiles];
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      dot[row][0] = dot[row][1] = _mm512_set1_epi32(load_int32(row_panel + kRows * 32 + row * 4));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i weights0 = _mm512_load_si512(weight_panel + i * 128);
      const __m512i weights1 = _mm512_load_si512(weight_panel + i * 128 + 64);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
        const __m512i a = _mm512_set1_epi32(load_int32(row_panel + row * 32 + i * 4));
        dot[row][0] = _mm512_dpbusd_epi32(dot[row][0], weights0, a);
        dot[row][1] = _mm512_dpbusd_epi32(dot[row][1], weights1, a);
      }
    }
    const __m512 scales0 = _mm512_load_ps(weight_panel + 8 * 128);
    const __m512 scales1 = _mm512_load_ps(weight_panel + 8 * 128 + 64);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const __m512 base = _mm512_set1_ps(load_float(row_panel + kRows * 36 + row * 4));
      const __m512 scaled0 = _mm512_sub_ps(_mm512_castsi512_ps(dot[row][0]), base);
      const __m512 scaled1 = _mm512_sub_ps(_mm512_castsi512_ps(dot[row][1]), base);
      total[row][0] = _mm512_fmadd_ps(scaled0, scales0, total[row][0]);
      total[row][1] = _mm512_fmadd_ps(scaled1, scales1, total[row][1]);
    }
    row_panel += kRows * kRowPanelBytes;
    weight_panel += kPanelBlockBytes;
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    add_to(sums + row * kPanelColumns, total[row][0]);
    add_to(sums + row * kPanelColumns + 16, total[row][1]);
  }
}

// Rows kFirst .. kFirst + kCount - 1 of a tile's block: so many chains of dot products in progress.
template <int kRows, int kFirst, int kCount>
inline void add_block(const uint8_t* row_panel, const __m512i (&weights)[8], __m512 b_scales,
                      __m512 (&total)[kRows]) {
  __m512i dot[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    dot[i] = _mm512_set1_epi32(load_int32(row_panel + kRows * 32 + (kFirst + i) * 4));
  }
#pragma GCC unroll 8
  for (int word = 0; word < 8; ++word) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const __m512i a = _mm512_set1_epi32(load_int32(row_panel + (kFirst + i) * 32 + word * 4));
      dot[i] = _mm512_dpbusd_epi32(dot[i], weights[word], a);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const __m512 base = _mm512_set1_ps(load_float(row_panel + kRows * 36 + (kFirst + i) * 4));
    const __m512 scaled = _mm512_sub_ps(_mm512_castsi512_ps(dot[i]), base);
    total[kFirst + i] = _mm512_fmadd_ps(scaled, b_scales, total[kFirst + i]);
  }
  constexpr int kNext = kFirst + kCount;
  if constexpr (kNext < kRows) {
    constexpr int kLeft = kRows - kNext;
    add_block<kRows, kNext, (kLeft < kCount ? kLeft : kCount)>(row_panel, weights, b_scales, total);
  }
}

template <int kRows>
void multiply_tile_rows(const uint8_t* row_panel, const uint8_t* codes, const uint8_t* scales,
                        int64_t blocks, float* sums) {
  constexpr int64_t kPrefetchBytes = 4096;
  __m512 total[kRows];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) total[row] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; ++block) {
    __m512i weights[8];
    unpack_block(codes, weights);
#pragma GCC unroll 4
    for (int i = 0; i < kBlockWords; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kPrefetchBytes + i * 64, _MM_HINT_T0);
    }
    add_block<kRows, 0, (kRows < 4 ? kRows : 4)>(row_panel, weights, load_scales(scales), total);
    row_panel += kRows * kRowPanelBytes;
    codes += kTileBlockBytes;
    scales += kTileRows;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) add_to(sums + row * kPanelColumns, total[row]);
}

using MultiplyRows = void (*)(const uint8_t*, const uint8_t*, int64_t, float*);
using MultiplyTileRows = void (*)(const uint8_t*, const uint8_t*, const uint8_t*, int64_t, float*);

void multiply_panel(const uint8_t* row_panel, int rows, const uint8_t* weight_panel, int64_t blocks,
                    float* sums) {
  static constexpr MultiplyRows kByRows[kMaxPanelRows] = {
      multiply_panel_rows<1>, multiply_panel_rows<2>, multiply_panel_rows<3>,
      multiply_panel_rows<4>, multiply_panel_rows<5>, multiply_panel_rows<6>};
  kByRows[rows - 1](row_panel, weight_panel, blocks, sums);
}

void multiply_tile(const uint8_t* row_panel, int rows, const uint8_t* codes, const uint8_t* scales,
                   int64_t blocks, float* sums) {
  static constexpr MultiplyTileRows kByRows[kMaxTileRows] = {
      multiply_tile_rows<1>,  multiply_tile_rows<2>,  multiply_tile_rows<3>,
      multiply_tile_rows<4>,  multiply_tile_rows<5>,  multiply_tile_rows<6>,
      multiply_tile_rows<7>,  multiply_tile_rows<8>,  multiply_tile_rows<9>,
      multiply_tile_rows<10>, multiply_tile_rows<11>, multiply_tile_rows<12>,
      multiply_tile_rows<13>, multiply_tile_rows<14>, multiply_tile_rows<15>,
      multiply_tile_rows<16>};
  kByRows[rows - 1](row_panel, codes, scales, blocks, sums);
}

}  // namespace

const GemmKernels& avx512_gemm_kernels() {
  static constexpr GemmKernels kernels = {kMaxRowScale,   kMaxPanelRows, kMaxTileRows,
                                          expand_rows,    kPanelTiles,   expand_tile,
                                          multiply_panel, multiply_tile, store<kPanelColumns>};
  return kernels;
}

}  // namespace duqpp::cpu

#endif
