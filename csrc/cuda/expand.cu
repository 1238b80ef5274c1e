// Launch of expand.cuh.
#include "cuda/device.h"
#include "cuda/device_info.h"
#include "cuda/expand.cuh"
#include "cuda/expand.h"
#include "cuda/gpu_lanes.cuh"

namespace duqpp::cuda {
namespace {

// The warp of expand.cuh on a GPU: one lane of it.
struct GpuExpandWarp : GpuLanes {
  static __device__ __forceinline__ void exchange_with_neighbour(Lanes<uint32_t>& word) {
    word.value = __shfl_xor_sync(~0u, word.value, 1);
  }
};

template <class Block>
__global__ void __launch_bounds__(kExpandThreads)
    expand_activation_kernel(const __grid_constant__ ExpandProblem problem) {
  const ActivationRow row = activation_row<Block>(problem, blockIdx.x);
  uint32_t exponent = 0;
  if constexpr (kRowScaled<Block>) {
    __shared__ uint32_t largest[kExpandWarps];
    const uint32_t mine = __reduce_max_sync(~0u, activation_maximum(row, threadIdx.x));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = mine;
    __syncthreads();
    for (const uint32_t one : largest) exponent = max(exponent, one);
    exponent = row_exponent(exponent);
    if (threadIdx.x == 0) problem.row_scales[blockIdx.x] = row_scale(exponent);
  }
  expand_activation_thread<Block>(row, exponent, threadIdx.x);
}

// For sm_80, 64 registers would be one too few for bfloat16, whose lanes store twice as much.
template <class Block>
inline constexpr int kMinCtas = kRowScaled<Block> ? kExpandCtasPerSm : kExpandCtasPerSm - 1;

template <class Block>
__global__ void __launch_bounds__(kExpandThreads, kMinCtas<Block>)
    expand_weight_kernel(const __grid_constant__ ExpandProblem problem, const uint32_t parts) {
  expand_weight_cta<Block, GpuExpandWarp>(problem, parts, blockIdx.x, threadIdx.x / 32);
}

template <class... Arguments>
void launch(const char* op, void (*kernel)(Arguments...), int64_t ctas, void* stream,
            const Arguments&... arguments) {
  if (ctas == 0) return;
  kernel<<<static_cast<unsigned>(ctas), kExpandThreads, 0, as_stream(stream)>>>(arguments...);
  DUQPP_CHECK_CUDA(op, cudaGetLastError());
}

}  // namespace

void expand_activation(const ExpandProblem& problem, void* stream) {
  const bool e4m3 = problem.format == WideFormat::kE4M3;
  const auto kernel =
      e4m3 ? expand_activation_kernel<E4M3Block> : expand_activation_kernel<BFloat16Block>;
  launch("expand_activation", kernel, problem.rows, stream, problem);
}

void expand_weight(const ExpandProblem& problem, void* stream) {
  constexpr const char* kOp = "expand_weight";
  const bool e4m3 = problem.format == WideFormat::kE4M3;
  const auto kernel = e4m3 ? expand_weight_kernel<E4M3Block> : expand_weight_kernel<BFloat16Block>;
  const ExpandWeightPlan plan =
      plan_expand_weight(problem.rows, problem.K, device_info(current_device(kOp)).sm_count);
  launch(kOp, kernel, plan.tiles * plan.parts, stream, problem, uint32_t(plan.parts));
}

}  // namespace duqpp::cuda
