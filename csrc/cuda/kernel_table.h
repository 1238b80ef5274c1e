// Which mxfp4_gemm kernel multiplies [M, K] by [N, K] on a device, and with which arguments. Host
// code without CUDA, so that tests and `duqpp doctor` ask the same table as a launch does.
//
// On Blackwell the choice comes from a model of a B200, not from a measurement: a 256-row tile
// spends its time on filling shared memory, so one wave of tiles costs in proportion to the rows of
// A and B that each SM loads for it, and the kernel with the least waves x cost is the fastest.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>

#include "cuda/gemm_kernel.h"
#include "format/mx_block.h"
#include "format/scale_layout.h"
#include "format/weight_fragment.h"

namespace duqpp::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t gemm_tiles(GemmKernel kernel, int64_t M, int64_t N) {
  const GemmKernelInfo& info = gemm_kernel_info(kernel);
  const int64_t rows = info.swapped ? N : M;
  const int64_t columns = info.swapped ? M : N;
  return ceil_div(rows, info.tile_m) * ceil_div(columns, info.tile_n);
}

// Rounds of tiles until all are done, a tile occupying `sms` SMs.
constexpr int64_t gemm_waves(GemmKernel kernel, int64_t M, int64_t N, int sm_count) {
  const int tiles_at_once = std::max(1, sm_count / gemm_kernel_info(kernel).sms);
  return ceil_div(gemm_tiles(kernel, M, N), tiles_at_once);
}

// Parts into which stream-K splits K: as many as the SMs can take at once, at most 4 (each part
// adds its float32 tile to the workspace in turn), each of at least 2 tiles along K.
constexpr int streamk_splits(int64_t M, int64_t N, int64_t K, int sm_count) {
  const GemmKernel kernel = GemmKernel::kSm100SwappedStreamK;
  const int64_t by_sms = sm_count / std::max<int64_t>(1, gemm_tiles(kernel, M, N));
  const int64_t by_k = ceil_div(K, gemm_kernel_info(kernel).tile_k) / 2;
  return static_cast<int>(std::clamp<int64_t>(std::min(by_sms, by_k), 1, 4));
}

// For sm_80 to sm_90: the fewest columns of MMAs that hold the rows of x, at most 32 of them, and
// as many rows of W for a CTA as end the first: SMs take rounds of CTAs, and a CTA takes as long as
// its rows and ten more. On an H200, for seven shapes of LLaMA-3 and 1 to 16 rows of x, this takes
// the fastest of these kernels, or one within 3 % of it. Not measured on other GPUs.
constexpr GemmKernel select_gemm_sm80(int64_t M, int64_t N, int sm_count) {
  if (M > 16) return GemmKernel::kSm80Tile32x32;
  const bool narrow = M <= 8;
  const auto time = [&](int64_t rows) {
    return ceil_div(ceil_div(N, rows), sm_count) * (rows + 10);
  };
  if (time(64) < time(32) && time(64) < time(16)) {
    return narrow ? GemmKernel::kSm80Tile64x8 : GemmKernel::kSm80Tile64x16;
  }
  if (time(32) < time(16)) {
    return narrow ? GemmKernel::kSm80Tile32x8 : GemmKernel::kSm80Tile32x16;
  }
  return narrow ? GemmKernel::kSm80Tile16x8 : GemmKernel::kSm80Tile16x16;
}

// The kernel for a device of compute capability arch / 10; none where these kernels do not run.
// streamk: whether K may be split over SMs (streamk_switch.h).
constexpr std::optional<GemmPlan> select_gemm(int64_t M, int64_t N, int64_t K, int arch,
                                              int sm_count, bool streamk) {
  if (arch == 120 || arch == 121) return GemmPlan{GemmKernel::kSm120Tile128x128, 1, sm_count};
  if (arch >= 80 && arch <= 90) return GemmPlan{select_gemm_sm80(M, N, sm_count), 1, sm_count};
  if (arch != 100 && arch != 103) return std::nullopt;

  const int splits = streamk ? streamk_splits(M, N, K, sm_count) : 1;
  if (splits > 1) return GemmPlan{GemmKernel::kSm100SwappedStreamK, splits, sm_count};
  if (M <= 64) return GemmPlan{GemmKernel::kSm100Swapped, 1, sm_count};

  // Rows of A and B per SM: 128 + 128, 128 + 96 and 128 + 64. The larger tile first: it wins a tie.
  constexpr std::array<std::pair<GemmKernel, int>, 3> candidates = {{
      {GemmKernel::kSm100Tile256x256, 8},
      {GemmKernel::kSm100Tile256x192, 7},
      {GemmKernel::kSm100Tile256x128, 6},
  }};
  GemmKernel best = candidates[0].first;
  int64_t least = INT64_MAX;
  for (const auto& [kernel, cost] : candidates) {
    const int64_t time = gemm_waves(kernel, M, N, sm_count) * cost;
    if (time < least) {
      least = time;
      best = kernel;
    }
  }
  return GemmPlan{best, 1, sm_count};
}

// Why select_gemm takes a kernel, in words.
constexpr const char* gemm_kernel_reason(GemmKernel kernel) {
  switch (kernel) {
    case GemmKernel::kSm100Swapped:
      return "at most 64 rows of x: they are the columns of the tile";
    case GemmKernel::kSm100SwappedStreamK:
      return "few tiles for so many SMs: K is split over those that would idle";
    case GemmKernel::kSm120Tile128x128:
      return "the one tile shape for this architecture";
    case GemmKernel::kSm80Tile16x8:
    case GemmKernel::kSm80Tile16x16:
      return "16 rows of W for a CTA: its SMs end first";
    case GemmKernel::kSm80Tile32x8:
    case GemmKernel::kSm80Tile32x16:
      return "32 rows of W for a CTA: its SMs end first";
    case GemmKernel::kSm80Tile64x8:
    case GemmKernel::kSm80Tile64x16:
      return "64 rows of W for a CTA: its SMs end first";
    case GemmKernel::kSm80Tile32x32:
      return "more than 16 rows of x, 32 at a time";
    default:
      return "least waves of tiles x cost of a wave, in a model of a B200";
  }
}

// Bytes of the scales of a weight [N, K] as the kernels of compute capability arch / 10 read it:
// swizzled beside row-major codes, or in fragment order like the codes (format/weight_fragment.h).
constexpr int64_t weight_scales_size(int64_t N, int64_t K, int arch) {
  return arch >= 80 && arch <= 90 ? fragment_scales_size(N, K) : swizzled_size(N, K / kBlockSize);
}

// Bytes of device memory that a launch needs: with stream-K a float32 tile for each tile of the
// output and then a 4-byte barrier each, rounded up to 128 (an L2 line) as CUTLASS does.
constexpr int64_t gemm_workspace_size(const GemmPlan& plan, int64_t M, int64_t N) {
  if (plan.splits <= 1) return 0;
  const GemmKernelInfo& info = gemm_kernel_info(plan.kernel);
  const int64_t tiles = gemm_tiles(plan.kernel, M, N);
  return tiles * info.tile_m * info.tile_n * 4 + ceil_div(tiles * 4, 128) * 128;
}

}  // namespace duqpp::cuda
