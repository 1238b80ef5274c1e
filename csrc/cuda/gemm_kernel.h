// The kernels of mxfp4_gemm, and a plan to launch one. Apart from kernel_table.h, so
// that a change to the choice among them compiles no kernel again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace duqpp::cuda {

enum class GemmKernel : int32_t {
  kSm100Swapped = 0,         // few rows of x: they are the columns of the tile
  kSm100SwappedStreamK = 1,  // and few tiles: K is split over SMs
  kSm100Tile256x128 = 2,     // pairs of SMs
  kSm100Tile256x192 = 3,
  kSm100Tile256x256 = 4,
  kSm120Tile128x128 = 5,
  kSm80Tile16x8 = 6,  // rows of W x rows of x
  kSm80Tile32x8 = 7,
  kSm80Tile64x8 = 8,
  kSm80Tile16x16 = 9,
  kSm80Tile32x16 = 10,
  kSm80Tile64x16 = 11,
  kSm80Tile32x32 = 12,
};
inline constexpr int kGemmKernels = 13;

struct GemmKernelInfo {
  const char* name;
  int arch;                    // the first of the architectures that run it: 80, 100 or 120
  int tile_m, tile_n, tile_k;  // GEMM tile; with `swapped`, tile_m counts rows of W
  int sms;                     // SMs that work on a tile together
  bool swapped;                // computes (W x^T)^T
};

inline constexpr std::array<GemmKernelInfo, kGemmKernels> kGemmKernelInfo = {{
    {"sm100_swapped_128x64", 100, 128, 64, 256, 1, true},
    {"sm100_swapped_128x64_streamk", 100, 128, 64, 256, 1, true},
    {"sm100_256x128", 100, 256, 128, 256, 2, false},
    {"sm100_256x192", 100, 256, 192, 256, 2, false},
    {"sm100_256x256", 100, 256, 256, 256, 2, false},
    {"sm120_128x128", 120, 128, 128, 128, 1, false},
    {"sm80_16x8", 80, 16, 8, 512, 1, true},
    {"sm80_32x8", 80, 32, 8, 512, 1, true},
    {"sm80_64x8", 80, 64, 8, 512, 1, true},
    {"sm80_16x16", 80, 16, 16, 512, 1, true},
    {"sm80_32x16", 80, 32, 16, 512, 1, true},
    {"sm80_64x16", 80, 64, 16, 512, 1, true},
    {"sm80_32x32", 80, 32, 32, 512, 1, true},
}};

constexpr const GemmKernelInfo& gemm_kernel_info(GemmKernel kernel) {
  return kGemmKernelInfo[static_cast<size_t>(kernel)];
}

// A kernel and the arguments that are not the problem's own.
struct GemmPlan {
  GemmKernel kernel;
  int splits;    // parts of K that a tile's sum is made of; 1 but for stream-K
  int sm_count;  // of the device: CUTLASS divides by it, so it is never left for CUTLASS to query
};

}  // namespace duqpp::cuda
