#include "cuda/mxfp4_gemm_sm100.cuh"

namespace duqpp::cuda {
const GemmInstance kSm100Swapped = kSm100Instance<GemmKernel::kSm100Swapped>;
}  // namespace duqpp::cuda
