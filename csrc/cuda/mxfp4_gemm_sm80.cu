// Configuration and launch of mxfp4_gemm_sm80.cuh.
#include <limits>

#include "cuda/device.h"
#include "cuda/kernel_table.h"
#include "cuda/mxfp4_gemm_instance.h"
#include "cuda/mxfp4_gemm_sm80.cuh"
#include "cuda/mxfp4_gemm_sm80_warp.cuh"

namespace duqpp::cuda {
namespace {

constexpr const char* kOp = "mxfp4_gemm";

// W is a model's constant, and read before the wait; x, and what out replaces, are not.
template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads)
    gemm_sm80_kernel(const __grid_constant__ GemmSm80Params params) {
  extern __shared__ __align__(16) uint8_t shared[];
  auto* const memory = reinterpret_cast<WarpMemory<Traits>*>(shared);
  auto* const totals = reinterpret_cast<float*>(memory + params.plan.warps);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = __shfl_sync(~0u, thread / kWarpLanes, 0);
  const CtaTask task = cta_task<Traits>(params, blockIdx.x);

  GpuGemmWarp::Lanes<LaneConstants80<Traits>> constants;
  GpuGemmWarp::Lanes<LaneWeights<Traits>> weights{};
  GpuGemmWarp::Lanes<LaneScales<Traits>> scales;
  GpuGemmWarp::Lanes<LaneActivations<Traits>> activations{};
  make_constants<Traits, GpuGemmWarp>(params, task, constants);
  load_first_codes<Traits, GpuGemmWarp>(task, warp, constants, weights);
  GpuGemmWarp::for_each_lane([&](int lane) {
    load_weight_scales<Traits, GpuGemmWarp>(params, task, warp, lane, scales[lane]);
  });
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  GpuGemmWarp::for_each_lane([&](int lane) {
    load_activation_scales<Traits, GpuGemmWarp>(params, task, warp, lane, scales[lane]);
  });
  load_first_activations<Traits, GpuGemmWarp>(task, warp, constants, activations);

  for (int round = 0; round < params.plan.rounds; ++round) {
    const int segment = round * params.plan.warps + warp;
    if (segment < task.segments) {
      multiply_segment<Traits, GpuGemmWarp>(params, task, segment, memory[warp], constants, weights,
                                            scales, activations);
    }
    __syncthreads();
    add_round<Traits>(params, task, round, memory, totals, thread, threads);
    __syncthreads();
  }
}

// Whether the device's code of a kernel has the wait. Code for sm_80 has none, and a driver may
// have compiled it for a newer device from PTX: launched to overlap, it would race.
template <class Traits>
bool has_wait() {
  static const bool answer = [] {
    cudaFuncAttributes attributes{};
    DUQPP_CHECK_CUDA(kOp, cudaFuncGetAttributes(&attributes, gemm_sm80_kernel<Traits>));
    return attributes.ptxVersion >= 90;
  }();
  return answer;
}

template <int kRowTiles, int kColumnTiles>
struct GemmSm80 {
  using Traits = GemmSm80Traits<kRowTiles, kColumnTiles>;

  static constexpr int kSharedMemory = gemm_sm80_shared_memory(
      gemm_sm80_max_warps(kRowTiles, kColumnTiles), kRowTiles, kColumnTiles);
  static_assert(sizeof(WarpMemory<Traits>) == 1024 * (kRowTiles + kColumnTiles));
  static_assert(kSharedMemory <= 99 * 1024, "what a CTA of sm_86 and sm_89 can have");

  static void launch(const MXFP4GemmProblem& problem, cudaStream_t stream) {
    const auto ceil_div = [](int64_t a, int64_t b) {
      return static_cast<unsigned>((a + b - 1) / b);
    };
    GemmSm80Params params{problem, plan_gemm_sm80(problem.K, kRowTiles, kColumnTiles), 1};
    // More than 48 KiB must be asked for.
    DUQPP_CHECK_CUDA(
        kOp, cudaFuncSetAttribute(gemm_sm80_kernel<Traits>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedMemory));
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    // Parts of x side by side: those that read the same W run at the same time, and share it in L2.
    params.row_parts = static_cast<int>(ceil_div(problem.M, 8 * kColumnTiles));
    config.gridDim = dim3(ceil_div(problem.N, kFragmentRows * kRowTiles) * params.row_parts);
    config.blockDim = dim3(params.plan.warps * kWarpLanes);
    config.dynamicSmemBytes = gemm_sm80_shared_memory(params.plan.warps, kRowTiles, kColumnTiles);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = current_device(kOp).capability_major >= 9 && has_wait<Traits>() ? 1 : 0;
    DUQPP_CHECK_CUDA(kOp, cudaLaunchKernelEx(&config, gemm_sm80_kernel<Traits>, params));
  }

  static bool can_implement(const MXFP4GemmProblem& problem, const GemmPlan& plan) {
    return problem.N % 8 == 0 && problem.K % kBlockSize == 0 &&
           gemm_tiles(plan.kernel, problem.M, problem.N) <= std::numeric_limits<int32_t>::max();
  }
  static int64_t workspace_size(const MXFP4GemmProblem&, const GemmPlan&) { return 0; }
  static std::string clear_workspace(const MXFP4GemmProblem&, const GemmPlan&, void*, void*) {
    return {};
  }
  static std::string run(const MXFP4GemmProblem& problem, const GemmPlan&, void*, void* stream) {
    try {
      launch(problem, as_stream(stream));
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return {};
  }

  static constexpr GemmInstance kInstance = {kSharedMemory, can_implement, workspace_size,
                                             clear_workspace, run};
};

}  // namespace

const GemmInstance kSm80Tile16x8 = GemmSm80<1, 1>::kInstance;
const GemmInstance kSm80Tile32x8 = GemmSm80<2, 1>::kInstance;
const GemmInstance kSm80Tile64x8 = GemmSm80<4, 1>::kInstance;
const GemmInstance kSm80Tile16x16 = GemmSm80<1, 2>::kInstance;
const GemmInstance kSm80Tile32x16 = GemmSm80<2, 2>::kInstance;
const GemmInstance kSm80Tile64x16 = GemmSm80<4, 2>::kInstance;
const GemmInstance kSm80Tile32x32 = GemmSm80<2, 4>::kInstance;

}  // namespace duqpp::cuda
