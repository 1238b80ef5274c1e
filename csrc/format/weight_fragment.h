// The weight layout of the sm_80 GEMM: in the order in which the lanes of a warp multiply it.
//
// mma.m16n8k32 multiplies 16 rows of W by one block of 32 columns, and lane 4 r + q holds eight of
// the block's columns for row r and for row r + 8. Which eight is ours to choose, since a dot
// product does not see the order of its terms: lane q takes columns 8 q .. 8 q + 7, so that its
// codes are one word of the row-major codes, for W and for activations alike. Preparing a weight
// then moves whole words of four bytes, and scale bytes; it is a permutation, and nothing is
// padded. Behind the scales it leaves a byte for each row, which products of many rows read.
//
// A tile is 16 rows of W, 8 in the last one where N % 16 = 8. Tiles follow each other.
//   Codes: pairs of blocks follow each other; in a pair, lanes; in a lane, words
//     [block of the pair][r, r + 8]: 16 bytes, one load. The last pair is one block where K/32 is
//     odd, and a tile of eight rows has no r + 8: such lanes have 8 or 4 bytes.
//   Scales: segments (see kSegmentBlocks) follow each other; in a segment, uint8 [rows, blocks].
// Behind the scales of all tiles: uint8 [N], row_exponent() (expand.h) of each row.
// N is a multiple of 8 and K one of 32. Source of the instruction's layout: PTX ISA, "Matrix
// Fragments for mma.m16n8k32" with 8-bit types.
#pragma once

#include <cstdint>

#include "format/block_sum.h"
#include "format/host_device.h"
#include "format/mx_block.h"

namespace duqpp {

inline constexpr int kFragmentRows = 16;  // of a tile
inline constexpr int kPairBlocks = 2;     // blocks whose codes are one 128-bit load
inline constexpr int kWordColumns = 8;    // codes in a word
inline constexpr int kWordsPerBlock = kBlockSize / kWordColumns;

// In bytes: the codes, where the row exponents begin behind the scales, and both of these.
DUQPP_HOST_DEVICE constexpr int64_t fragment_codes_size(int64_t N, int64_t K) { return N * K / 2; }
DUQPP_HOST_DEVICE constexpr int64_t fragment_row_exponents_offset(int64_t N, int64_t K) {
  return N * (K / kBlockSize);
}
DUQPP_HOST_DEVICE constexpr int64_t fragment_scales_size(int64_t N, int64_t K) {
  return fragment_row_exponents_offset(N, K) + N;
}

// Rows of the tile that holds `row`: 16, or 8.
DUQPP_HOST_DEVICE constexpr int fragment_tile_rows(int64_t row, int64_t N) {
  const int64_t left = N - row / kFragmentRows * kFragmentRows;
  return left < kFragmentRows ? static_cast<int>(left) : kFragmentRows;
}

// Offset in its tile, in words of four bytes, of what a lane multiplies of a block, for row r or,
// with half = 1, r + 8 of a tile of 16 rows.
DUQPP_HOST_DEVICE constexpr uint32_t fragment_lane_word(uint32_t lane, uint32_t half,
                                                        uint32_t block, uint32_t rows,
                                                        uint32_t blocks) {
  const uint32_t halves = rows / 8;
  const uint32_t first = block / kPairBlocks * kPairBlocks;  // of the pair
  const uint32_t in_pair = blocks - first < kPairBlocks ? 1 : kPairBlocks;
  return first * rows * kWordsPerBlock + lane * in_pair * halves + (block - first) * halves + half;
}

// Offset, in words of four bytes, of columns 8 word .. 8 word + 7 of a row; word < K/8. The nibble
// of column c is number c % 8 of its word, the lowest first, as in the row-major codes.
DUQPP_HOST_DEVICE constexpr int64_t fragment_word_offset(int64_t row, int64_t word, int64_t N,
                                                         int64_t K) {
  const int64_t tile_row = row % kFragmentRows;
  const int64_t lane = 4 * (tile_row % 8) + word % kWordsPerBlock;
  return (row - tile_row) * (K / kWordColumns) +
         fragment_lane_word(static_cast<uint32_t>(lane), static_cast<uint32_t>(tile_row / 8),
                            static_cast<uint32_t>(word / kWordsPerBlock),
                            fragment_tile_rows(row, N), static_cast<uint32_t>(K / kBlockSize));
}

// Offset, in nibbles, of the code of (row, column).
DUQPP_HOST_DEVICE constexpr int64_t fragment_nibble_offset(int64_t row, int64_t column, int64_t N,
                                                           int64_t K) {
  return fragment_word_offset(row, column / kWordColumns, N, K) * kWordColumns +
         column % kWordColumns;
}

// Offset, in bytes, of the scale of (row, block).
DUQPP_HOST_DEVICE constexpr int64_t fragment_scale_offset(int64_t row, int64_t block, int64_t N,
                                                          int64_t K) {
  const int64_t blocks = K / kBlockSize;
  const int rows = fragment_tile_rows(row, N);
  const int64_t first = block / kSegmentBlocks * kSegmentBlocks;  // of the segment
  const int64_t in_segment = blocks - first < kSegmentBlocks ? blocks - first : kSegmentBlocks;
  const int64_t tile_row = row % kFragmentRows;
  return (row - tile_row) * blocks + first * rows + tile_row * in_segment + (block - first);
}

static_assert(fragment_nibble_offset(0, 9, 16, 64) == 33 &&   // lane 1 holds 16 bytes
              fragment_nibble_offset(8, 0, 16, 64) == 8 &&    // row r + 8 is the next word
              fragment_nibble_offset(0, 32, 16, 64) == 16 &&  // then the second block
              fragment_nibble_offset(16, 32, 24, 64) == 16 * 64 + 8);
static_assert(fragment_scale_offset(1, 0, 16, 1024) == 16 &&
              fragment_scale_offset(0, 16, 16, 1024) == 256 &&
              fragment_scale_offset(17, 16, 24, 544) == 16 * 17 + 8 * 16 + 1);

}  // namespace duqpp
