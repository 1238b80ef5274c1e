// Launch of gptq_block.cuh.
#include "cuda/device.h"
#include "cuda/gptq_block.cuh"
#include "cuda/gptq_block.h"

namespace duqpp::cuda {
namespace {

template <bool kFed>
__global__ void __launch_bounds__(kGptqThreads)
    gptq_block_kernel(const __grid_constant__ GptqBlockProblem problem) {
  __shared__ alignas(16) float factor[kFed ? kFactorSize : 4];
  if constexpr (kFed) {
    for (int i = threadIdx.x; i < kFactorSize / 4; i += kGptqThreads) {
      reinterpret_cast<float4*>(factor)[i] = reinterpret_cast<const float4*>(problem.factor)[i];
    }
    __syncthreads();
  }
  const int64_t row = int64_t{blockIdx.x} * kGptqThreads + threadIdx.x;
  if (row < problem.rows) gptq_block_row<kFed>(problem, row, factor);
}

}  // namespace

void gptq_block(const GptqBlockProblem& problem, void* stream) {
  const int64_t ctas = (problem.rows + kGptqThreads - 1) / kGptqThreads;
  if (ctas == 0) return;
  const auto kernel =
      problem.factor == nullptr ? gptq_block_kernel<false> : gptq_block_kernel<true>;
  kernel<<<static_cast<unsigned>(ctas), kGptqThreads, 0, as_stream(stream)>>>(problem);
  DUQPP_CHECK_CUDA("gptq_block", cudaGetLastError());
}

}  // namespace duqpp::cuda
