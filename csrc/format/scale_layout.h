// The swizzled scale layout that block-scaled tensor cores (sm_100, 103, 120) read.
//
// Scales of 128 rows x 4 blocks form a tile of 512 bytes; tiles run along K first. In a tile the four
// blocks of a row are adjacent bytes, and rows r, r + 32, r + 64, r + 96 are adjacent 4-byte words.
// Rows are padded to 128 and blocks to 4 with zero bytes: the hardware reads them, and 255 is NaN.
// Source: PTX ISA, tcgen05.mma block scaling; CUTLASS Sm1xxBlockScaledConfig<32>.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace duqpp {

inline constexpr int kScaleTileRows = 128;
inline constexpr int kScaleTileBlocks = 4;
inline constexpr int kScaleTileBytes = kScaleTileRows * kScaleTileBlocks;

DUQPP_HOST_DEVICE constexpr int64_t scale_tiles_along_k(int64_t blocks_per_row) {
  return (blocks_per_row + kScaleTileBlocks - 1) / kScaleTileBlocks;
}

// Bytes of the swizzled buffer for [rows, blocks_per_row] scales, padding included.
DUQPP_HOST_DEVICE constexpr int64_t swizzled_size(int64_t rows, int64_t blocks_per_row) {
  return (rows + kScaleTileRows - 1) / kScaleTileRows * scale_tiles_along_k(blocks_per_row) *
         kScaleTileBytes;
}

// Byte offset of the scale of (row, block); Index is int64_t, or uint32_t in kernels whose scale
// buffers stay below 2^31 bytes.
template <typename Index>
DUQPP_HOST_DEVICE constexpr Index swizzled_offset(Index row, Index block, Index tiles_along_k) {
  return ((row >> 7) * tiles_along_k + (block >> 2)) * kScaleTileBytes + (row & 31) * 16 +
         ((row >> 5) & 3) * 4 + (block & 3);
}
static_assert(swizzled_offset<int64_t>(33, 5, 2) == 512 + 16 + 4 + 1);

}  // namespace duqpp
