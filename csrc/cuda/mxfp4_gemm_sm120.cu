// mxfp4_gemm on the block-scaled mma.sync of sm_120 and sm_121 (built once as sm_120f).
#include "cuda/mxfp4_gemm_cutlass.cuh"

namespace duqpp::cuda {

// One tile shape for every problem: CUTLASS 4.2 compiles none narrower than 128 here. Two groups of
// warps share a tile (the schedule without Pingpong in its name): with a tile each, a thread holds
// 128 accumulators and spills registers.
template <GemmKernel kernel>
struct Sm120Config {
  static constexpr GemmKernel kKernel = kernel;
  using Arch = cutlass::arch::Sm120;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedMxf4Sm120;
  using EpilogueSchedule = cutlass::epilogue::collective::EpilogueScheduleAuto;
  using Scheduler = void;
};

const GemmInstance kSm120Tile128x128 =
    CutlassGemm<Sm120Config<GemmKernel::kSm120Tile128x128>>::kInstance;

}  // namespace duqpp::cuda
