// The kernels of mxfp4_gemm, and a plan to launch one. Apart from kernel_table.h, so
// that a change to the choice among them compiles no kernel again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

namespace duqpp::cuda {

// Every kernel, once: X(identifier, name, arch, tile_m, tile_n, tile_k, sms, swapped), as in
// GemmKernelInfo. What must be said of each kernel is made from this list: its enumerator
// k<identifier>, its row of the table, and the declaration of its instance of that name.
#define DUQPP_GEMM_KERNELS(X)                                                        \
  /* few rows of x: they are the columns of the tile */                              \
  X(Sm100Swapped, "sm100_swapped_128x64", 100, 128, 64, 256, 1, true)                \
  /* and few tiles: K is split over SMs */                                           \
  X(Sm100SwappedStreamK, "sm100_swapped_128x64_streamk", 100, 128, 64, 256, 1, true) \
  /* pairs of SMs */                                                                 \
  X(Sm100Tile256x128, "sm100_256x128", 100, 256, 128, 256, 2, false)                 \
  X(Sm100Tile256x192, "sm100_256x192", 100, 256, 192, 256, 2, false)                 \
  X(Sm100Tile256x256, "sm100_256x256", 100, 256, 256, 256, 2, false)                 \
  X(Sm120Tile128x128, "sm120_128x128", 120, 128, 128, 128, 1, false)                 \
  /* rows of W x rows of x */                                                        \
  X(Sm80Tile16x8, "sm80_16x8", 80, 16, 8, 512, 1, true)                              \
  X(Sm80Tile32x8, "sm80_32x8", 80, 32, 8, 512, 1, true)                              \
  X(Sm80Tile64x8, "sm80_64x8", 80, 64, 8, 512, 1, true)                              \
  X(Sm80Tile16x16, "sm80_16x16", 80, 16, 16, 512, 1, true)                           \
  X(Sm80Tile32x16, "sm80_32x16", 80, 32, 16, 512, 1, true)                           \
  X(Sm80Tile64x16, "sm80_64x16", 80, 64, 16, 512, 1, true)                           \
  X(Sm80Tile32x32, "sm80_32x32", 80, 32, 32, 512, 1, true)

enum class GemmKernel : int32_t {
#define DUQPP_ENUMERATOR(identifier, ...) k##identifier,
  DUQPP_GEMM_KERNELS(DUQPP_ENUMERATOR)
#undef DUQPP_ENUMERATOR
};

struct GemmKernelInfo {
  const char* name;
  int arch;                    // the first of the architectures that run it: 80, 100 or 120
  int tile_m, tile_n, tile_k;  // GEMM tile; with `swapped`, tile_m counts rows of W
  int sms;                     // SMs that work on a tile together
  bool swapped;                // computes (W x^T)^T
};

inline constexpr GemmKernelInfo kGemmKernelInfo[] = {
#define DUQPP_ROW(identifier, ...) {__VA_ARGS__},
    DUQPP_GEMM_KERNELS(DUQPP_ROW)
#undef DUQPP_ROW
};
inline constexpr int kGemmKernels = std::size(kGemmKernelInfo);

constexpr const GemmKernelInfo& gemm_kernel_info(GemmKernel kernel) {
  return kGemmKernelInfo[static_cast<size_t>(kernel)];
}

// A kernel and the arguments that are not the problem's own.
struct GemmPlan {
  GemmKernel kernel;
  int splits;    // parts of K that a tile's sum is made of; 1 but for stream-K
  int sm_count;  // of the device: CUTLASS divides by it, so it is never left for CUTLASS to query
  // Whether W may be read before the kernel just before this one has ended: that one must not be
  // what writes it. Of the kernels here those for sm_80 make use of it.
  bool early_weights = false;
};

}  // namespace duqpp::cuda
