// Launch of expand.cuh.
#include "cuda/device.h"
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

template <class Block>
__global__ void __launch_bounds__(kExpandThreads)
    expand_weight_kernel(const __grid_constant__ ExpandProblem problem) {
  const WeightTile tile = weight_tile(problem, blockIdx.x);
  __shared__ uint32_t exponents[kFragmentRows];
  if constexpr (kRowScaled<Block>) {
    if (threadIdx.x < kFragmentRows) exponents[threadIdx.x] = row_exponent(0);
    __syncthreads();
    atomicMax(&exponents[row_of_thread(threadIdx.x)], weight_maximum(tile, threadIdx.x));
    __syncthreads();
    if (threadIdx.x < kFragmentRows && tile.values_row + threadIdx.x < problem.rows) {
      problem.row_scales[tile.values_row + threadIdx.x] = row_scale(exponents[threadIdx.x]);
    }
  }
  expand_weight_warp<Block, GpuExpandWarp>(problem, tile, threadIdx.x / 32, exponents);
}

using Kernel = void (*)(ExpandProblem);

void launch(const char* op, Kernel kernel, int64_t ctas, const ExpandProblem& problem,
            void* stream) {
  if (ctas == 0) return;
  kernel<<<static_cast<unsigned>(ctas), kExpandThreads, 0, as_stream(stream)>>>(problem);
  DUQPP_CHECK_CUDA(op, cudaGetLastError());
}

}  // namespace

void expand_activation(const ExpandProblem& problem, void* stream) {
  const bool e4m3 = problem.format == WideFormat::kE4M3;
  const Kernel kernel =
      e4m3 ? expand_activation_kernel<E4M3Block> : expand_activation_kernel<BFloat16Block>;
  launch("expand_activation", kernel, problem.rows, problem, stream);
}

void expand_weight(const ExpandProblem& problem, void* stream) {
  const bool e4m3 = problem.format == WideFormat::kE4M3;
  const Kernel kernel =
      e4m3 ? expand_weight_kernel<E4M3Block> : expand_weight_kernel<BFloat16Block>;
  const int64_t tiles = (problem.rows + kFragmentRows - 1) / kFragmentRows;
  launch("expand_weight", kernel, tiles, problem, stream);
}

}  // namespace duqpp::cuda
