#include "cuda/mxfp4_gemm_sm100.cuh"

namespace duqpp::cuda {
const GemmInstance kSm100SwappedStreamK = kSm100Instance<GemmKernel::kSm100SwappedStreamK>;
}  // namespace duqpp::cuda
