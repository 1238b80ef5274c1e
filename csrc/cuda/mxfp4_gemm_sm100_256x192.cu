#include "cuda/mxfp4_gemm_sm100.cuh"

namespace duqpp::cuda {
const GemmInstance kSm100Tile256x192 = kSm100Instance<GemmKernel::kSm100Tile256x192>;
}  // namespace duqpp::cuda
