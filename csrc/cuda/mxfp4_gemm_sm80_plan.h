// How a launch of mxfp4_gemm_sm80 splits its work. Plain host code.
#pragma once

#include <cstdint>

#include "format/block_sum.h"
#include "format/mx_block.h"

namespace duqpp::cuda {

// Warps of a CTA, at most: as many as leave each thread the registers that its tiles take, of the
// 65536 of an SM: 128, 168 and 255.
constexpr int gemm_sm80_max_warps(int row_tiles, int column_tiles) {
  const int tiles = row_tiles * column_tiles;
  return tiles > 4 ? 8 : tiles > 2 ? 12 : 16;
}

// Sums of a CTA: 16 x 8 for each pair of tiles.
constexpr int gemm_sm80_sums(int row_tiles, int column_tiles) {
  return row_tiles * column_tiles * 128;
}

struct GemmSm80Plan {
  int segments;  // of K
  int warps;     // of a CTA; in a round each takes a segment
  int rounds;
};

// As few rounds as the warps allow, and the warps that these take.
constexpr GemmSm80Plan plan_gemm_sm80(int64_t K, int row_tiles, int column_tiles) {
  const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const int segments = ceil_div(K, int64_t{kSegmentBlocks} * kBlockSize);
  const int rounds = ceil_div(segments, gemm_sm80_max_warps(row_tiles, column_tiles));
  return {segments, ceil_div(segments, rounds), rounds};
}

// Bytes of shared memory of a CTA: for each warp the scales of a segment as floats, 1 KiB a tile,
// and the totals.
constexpr int gemm_sm80_shared_memory(int warps, int row_tiles, int column_tiles) {
  return warps * 1024 * (row_tiles + column_tiles) + 4 * gemm_sm80_sums(row_tiles, column_tiles);
}

}  // namespace duqpp::cuda
