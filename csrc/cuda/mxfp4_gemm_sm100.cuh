// mxfp4_gemm on tcgen05 tensor cores (sm_100 and sm_103, built once as sm_100f).
#pragma once

#include "cuda/mxfp4_gemm_cutlass.cuh"

namespace duqpp::cuda {

template <GemmKernel kernel>
struct Sm100Config {
  static constexpr GemmKernel kKernel = kernel;
  static constexpr GemmKernelInfo kInfo = gemm_kernel_info(kernel);
  static constexpr bool kPair = kInfo.sms == 2;  // two SMs issue one MMA and share B

  // CUTLASS's collective takes these tiles only; 256 along K is four MMA steps and a 128-byte
  // swizzle.
  static_assert(kInfo.arch == 100 && kInfo.tile_m == 128 * kInfo.sms && kInfo.tile_k == 256);
  static_assert(kInfo.tile_n == 64 || kInfo.tile_n == 128 || kInfo.tile_n == 192 ||
                kInfo.tile_n == 256);

  using Arch = cutlass::arch::Sm100;
  using Cluster = cute::Shape<cute::Int<kInfo.sms>, cute::_1, cute::_1>;
  using MainloopSchedule =
      std::conditional_t<kPair, cutlass::gemm::KernelTmaWarpSpecialized2SmMxf4Sm100,
                         cutlass::gemm::KernelTmaWarpSpecialized1SmMxf4Sm100>;
  using EpilogueSchedule = std::conditional_t<kPair, cutlass::epilogue::TmaWarpSpecialized2Sm,
                                              cutlass::epilogue::TmaWarpSpecialized1Sm>;
  // Stream-K at 128x64 only: at 128x128 its epilogue spills registers (CUTLASS 4.2).
  using Scheduler = std::conditional_t<kernel == GemmKernel::kSm100SwappedStreamK,
                                       cutlass::gemm::StreamKScheduler, void>;
};

template <GemmKernel kernel>
inline constexpr GemmInstance kSm100Instance = CutlassGemm<Sm100Config<kernel>>::kInstance;

}  // namespace duqpp::cuda
