// How a launch of rotate_quantize splits its work, and where its warps put scales. Plain host code
// and small functions that the kernel shares.
#pragma once

#include <cstdint>

#include "format/fragment.h"
#include "format/mx_block.h"
#include "format/scale_layout.h"
#include "problem.h"

namespace duqpp::cuda {

inline constexpr int kTeamWarps = kScaleTileBlocks;
inline constexpr int kMaxTeams = 2;
inline constexpr int kRowParts = 4;      // a row's sum of squares has four parts, a warp each
inline constexpr int kMaxNormRows = 32;  // rows whose reciprocal rms a CTA keeps

// Both scale layouts are sums of strides over the digits of a row, 128 a + 32 b + 16 c + 8 h + r,
// so that a kernel of either adds one number a tile and one for the lane's second row.
struct ScaleStrides {
  uint32_t r, h, c, b, a;
};

DUQPP_HOST_DEVICE constexpr ScaleStrides scale_strides(ScaleLayout layout, uint32_t blocks) {
  if (layout == ScaleLayout::kRowMajor) {
    return {blocks, 8 * blocks, 16 * blocks, 32 * blocks, 128 * blocks};
  }
  return {16, 128, 256, 4,
          static_cast<uint32_t>(scale_tiles_along_k(blocks)) * uint32_t{kScaleTileBytes}};
}

DUQPP_HOST_DEVICE constexpr uint32_t scale_block_offset(ScaleLayout layout, uint32_t block) {
  return layout == ScaleLayout::kRowMajor ? block : swizzled_offset<uint32_t>(0, block, 0);
}

DUQPP_HOST_DEVICE constexpr uint32_t scale_tile_offset(const ScaleStrides& strides, uint32_t row) {
  return (row >> 7) * strides.a + ((row >> 5) & 3) * strides.b + ((row >> 4) & 1) * strides.c;
}
static_assert(scale_tile_offset(scale_strides(ScaleLayout::kSwizzled, 5), 176) +
                  scale_block_offset(ScaleLayout::kSwizzled, 4) +
                  scale_strides(ScaleLayout::kSwizzled, 5).h ==
              swizzled_offset<uint32_t>(184, 4, 2));

// How a launch splits [M, K]: a CTA takes columns_per_cta columns of scale tiles (four blocks each)
// and rows_per_cta rows; its teams take turns at the columns.
struct RotateQuantizePlan {
  int teams;
  int columns_per_cta;
  int column_chunks;  // CTAs side by side along K
  int rows_per_cta;   // a multiple of 16
  int row_strips;     // CTAs along M; the last one also writes the scales' row padding
  int scale_rows;     // M and K/32, with the padding of the scale layout
  int scale_blocks;
};

// Per SM about two waves of CTAs that stream rows, so that a matrix is read for many tiles and the
// last wave still balances. A kRmsNorm CTA reads whole rows whatever columns it then quantizes:
// columns are split only as far as rows leave SMs idle.
inline RotateQuantizePlan plan_rotate_quantize(const RotateQuantizeProblem& problem, int sm_count) {
  const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const bool swizzled = problem.scale_layout == ScaleLayout::kSwizzled;
  const int blocks = static_cast<int>(problem.K / kBlockSize);
  const int columns = ceil_div(blocks, kScaleTileBlocks);
  const int tiles = ceil_div(problem.M, kTileRows);

  RotateQuantizePlan plan{};
  plan.scale_rows =
      swizzled ? ceil_div(problem.M, kScaleTileRows) * kScaleTileRows : static_cast<int>(problem.M);
  plan.scale_blocks = swizzled ? columns * kScaleTileBlocks : blocks;
  if (problem.prologue == Prologue::kRmsNorm) {
    const int tiles_per_cta = tiles >= 2 * sm_count ? kMaxNormRows / kTileRows : 1;
    plan.rows_per_cta = tiles_per_cta * kTileRows;
    plan.row_strips = ceil_div(tiles, tiles_per_cta);
    const int chunks = ceil_div(sm_count, plan.row_strips);
    plan.columns_per_cta = ceil_div(columns, chunks < columns ? chunks : columns);
    plan.teams = plan.columns_per_cta < kMaxTeams ? plan.columns_per_cta : kMaxTeams;
  } else {
    const int strips = ceil_div(16 * sm_count, columns);
    const int tiles_per_cta = ceil_div(tiles, strips < tiles ? strips : tiles);
    plan.rows_per_cta = tiles_per_cta * kTileRows;
    plan.row_strips = ceil_div(tiles, tiles_per_cta);
    plan.columns_per_cta = 1;
    plan.teams = 1;
  }
  plan.column_chunks = ceil_div(columns, plan.columns_per_cta);
  return plan;
}

// The blocks first_block, first_block + block_step, ... below end_block, each for the rows
// first_row .. end_row - 1.
struct WarpTask {
  int first_block, end_block, block_step;
  int first_row, end_row;
};

DUQPP_HOST_DEVICE constexpr WarpTask warp_task(const RotateQuantizePlan& plan, int cta, int warp) {
  const int chunk = cta % plan.column_chunks;
  const int strip = cta / plan.column_chunks;
  const int end_block = (chunk + 1) * plan.columns_per_cta * kTeamWarps;
  WarpTask task{};
  task.first_block = chunk * plan.columns_per_cta * kTeamWarps + warp;
  task.end_block = end_block < plan.scale_blocks ? end_block : plan.scale_blocks;
  task.block_step = plan.teams * kTeamWarps;
  task.first_row = strip * plan.rows_per_cta;
  task.end_row =
      strip + 1 == plan.row_strips ? plan.scale_rows : task.first_row + plan.rows_per_cta;
  return task;
}

}  // namespace duqpp::cuda
