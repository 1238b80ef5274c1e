// What an instruction set brings to mxfp4_gemm: loops over plain pointers. Threads, tails and
// memory are the caller's (mxfp4_gemm.cpp).
//
// The files that fill this table are compiled for instruction sets that the machine may lack. What
// they define has internal linkage: the linker may keep any one copy of an inline function, and
// the rest of the library must not end up with theirs.
#pragma once

#include <cstdint>

#include "problem.h"

namespace duqpp::cpu {

// The weight layout: a tile is 16 rows of W. A row of codes is K/8 words of four bytes, and a tile
// is its transpose, uint32 [K/8, 16]; its scales are uint8 [K/32, 16]. Tiles follow each other;
// with N % 16 rows in the last, that one is [K/8, N % 16]. The low nibbles of a word are the even
// columns of its eight, the high nibbles the odd ones; activations are split likewise.
inline constexpr int kTileRows = 16;
inline constexpr int kBlockBytes = 16;  // of codes
inline constexpr int kBlockWords = 4;
inline constexpr int64_t kTileBlockBytes = kTileRows * kBlockBytes;  // codes of a tile's block

// A row panel: `rows` rows of activations, ready to multiply. For each block of 32:
//   int8 [rows, 32]  twice the values, 16 even columns, then 16 odd ones
//   4 bytes [rows]   \  from the row's scale, as the kernel wants it
//   4 bytes [rows]   /
inline constexpr int64_t kRowPanelBytes = 40;  // of one row and block

// A weight panel: `panel_tiles` tiles, expanded. For each block of 32:
//   8 bits [8, 16 panel_tiles, 4]  twice the values: words of even columns, then of odd ones
//   float [16 panel_tiles]         the scales
inline constexpr int64_t kWeightPanelBytes = kTileRows * (32 + 4);  // of one tile and block

struct GemmKernels {
  // Activations.
  int max_row_scale;   // scale bytes that expand_rows takes: up to this, and 255
  int max_panel_rows;  // of a row panel that multiplies a weight panel
  int max_tile_rows;   // of a row panel that multiplies a tile as it lies in memory; 0: none does
  // codes [rows, K/2] and scales [rows, K/32], row-major, to a row panel.
  void (*expand_rows)(const uint8_t* codes, const uint8_t* scales, int rows, int64_t blocks,
                      uint8_t* row_panel);

  // Weights. A whole tile's blocks to tile `index` of a weight panel.
  int panel_tiles;
  void (*expand_tile)(const uint8_t* codes, const uint8_t* scales, int64_t blocks, int index,
                      uint8_t* weight_panel);

  // Adds the sums of a segment (format/block_sum.h) to sums [rows, 16 panel_tiles]; multiply_tile
  // to 16 columns of it.
  void (*multiply_panel)(const uint8_t* row_panel, int rows, const uint8_t* weight_panel,
                         int64_t blocks, float* sums);
  void (*multiply_tile)(const uint8_t* row_panel, int rows, const uint8_t* codes,
                        const uint8_t* scales, int64_t blocks, float* sums);

  // out [rows, columns] = round(sums + bias), rows `stride` elements apart in `out`.
  // bias is null or has 16 panel_tiles elements.
  void (*store)(const float* sums, int rows, int columns, const float* bias, void* out,
                int64_t stride, Dtype dtype);
};

const GemmKernels& portable_gemm_kernels();
#if defined(__x86_64__)
const GemmKernels& avx2_gemm_kernels();
const GemmKernels& avxvnni_gemm_kernels();
const GemmKernels& avx512_gemm_kernels();
#endif

}  // namespace duqpp::cpu
