// How a launch of mxfp4_gemm_sm80 splits its work. Plain host code.
#pragma once

#include <cstdint>

#include "format/block_sum.h"
#include "format/mx_block.h"

namespace duqpp::cuda {

// Warps of a CTA, at most: as many as leave each thread the registers that its tiles take, of the
// 65536 of an SM: 128, or 255. Twice as many CTAs are on an SM where their warps are half as many.
constexpr int gemm_sm80_max_warps(int row_tiles, int column_tiles) {
  return row_tiles * column_tiles > 4 ? 8 : 16;
}

// Sums of a CTA: 16 x 8 for each pair of tiles.
constexpr int gemm_sm80_sums(int row_tiles, int column_tiles) {
  return row_tiles * column_tiles * 128;
}

// Pairs of blocks whose codes a warp has on the way: 4 KiB of W. With eight warps these are 32 KiB
// for an SM, where an H100 needs half of it: 15 bytes a clock over a latency of 1000 clocks, a
// model and not a measurement.
constexpr int gemm_sm80_stages(int row_tiles) { return 8 / row_tiles; }

// Bytes of shared memory of a warp: for each pair on the way 16 of W and 8 of x a lane and tile;
// the scales of a segment as floats, 1 KiB a tile.
constexpr int gemm_sm80_warp_memory(int row_tiles, int column_tiles) {
  return gemm_sm80_stages(row_tiles) * 256 * (2 * row_tiles + column_tiles) +
         1024 * (row_tiles + column_tiles);
}

// And of a CTA, with the totals.
constexpr int gemm_sm80_shared_memory(int warps, int row_tiles, int column_tiles) {
  return warps * gemm_sm80_warp_memory(row_tiles, column_tiles) +
         4 * gemm_sm80_sums(row_tiles, column_tiles);
}

// What a CTA can have on compute capability arch / 10. Source: CUDA C++ Programming Guide, "Compute
// Capabilities". A launch asks the device.
constexpr int gemm_sm80_most_shared_memory(int arch) {
  return 1024 * (arch == 90 ? 227 : arch == 80 || arch == 87 ? 163 : 99);
}

// Warps of a CTA, at most, where it can have so many bytes of shared memory.
constexpr int gemm_sm80_warps(int row_tiles, int column_tiles, int shared_memory) {
  const int by_memory = (shared_memory - gemm_sm80_shared_memory(0, row_tiles, column_tiles)) /
                        gemm_sm80_warp_memory(row_tiles, column_tiles);
  const int most = gemm_sm80_max_warps(row_tiles, column_tiles);
  return by_memory < most ? by_memory : most;
}

struct GemmSm80Plan {
  int segments;  // of K
  int warps;     // of a CTA; in a round each takes a segment
  int rounds;
};

// As few rounds as the warps allow, and the warps that these take. No result depends on it.
constexpr GemmSm80Plan plan_gemm_sm80(int64_t K, int row_tiles, int column_tiles,
                                      int shared_memory) {
  const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const int segments = ceil_div(K, int64_t{kSegmentBlocks} * kBlockSize);
  const int rounds = ceil_div(segments, gemm_sm80_warps(row_tiles, column_tiles, shared_memory));
  return {segments, ceil_div(segments, rounds), rounds};
}

}  // namespace duqpp::cuda
