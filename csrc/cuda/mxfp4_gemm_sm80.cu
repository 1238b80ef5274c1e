// Configuration and launch of mxfp4_gemm_sm80.cuh.
#include "cuda/device.h"
#include "cuda/device_info.h"
#include "cuda/kernel_table.h"
#include "cuda/mxfp4_gemm_instance.h"
#include "cuda/mxfp4_gemm_sm80.cuh"
#include "cuda/mxfp4_gemm_sm80_warp.cuh"

namespace duqpp::cuda {
namespace {

constexpr const char* kOp = "mxfp4_gemm";

// The wait for the kernel before, which names no memory; code for sm_80 has none.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads)
    gemm_sm80_kernel(const __grid_constant__ GemmSm80Params params) {
  extern __shared__ __align__(16) uint8_t shared[];
  auto* const all_memory = reinterpret_cast<WarpMemory<Traits>*>(shared);
  auto* const totals = reinterpret_cast<float*>(all_memory + params.plan.warps);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = __shfl_sync(~0u, thread / kWarpLanes, 0);
  const CtaTask task = cta_task<Traits>(params, static_cast<int>(blockIdx.x),
                                        static_cast<int>(blockIdx.y + gridDim.y * blockIdx.z));
  if (task.first_n >= params.problem.N) return;  // the grid is a box
  WarpMemory<Traits>& memory = all_memory[warp];

  GpuGemmWarp::Lanes<LaneConstants80<Traits>> constants;
  GpuGemmWarp::Lanes<LaneScales<Traits>> scales;
  make_constants<Traits, GpuGemmWarp>(params, task, constants);
  if (!params.early_weights) wait_for_kernel_before();
  copy_first_weights<Traits, GpuGemmWarp>(task, warp, constants, memory);
  GpuGemmWarp::for_each_lane([&](int lane) {
    load_weight_scales<Traits, GpuGemmWarp>(params, task, warp, lane, scales[lane]);
  });
  wait_for_kernel_before();  // returns at once where it has
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  GpuGemmWarp::for_each_lane([&](int lane) {
    load_activation_scales<Traits, GpuGemmWarp>(params, task, warp, lane, scales[lane]);
  });
  copy_first_activations<Traits, GpuGemmWarp>(task, warp, constants, memory);

  for (int round = 0; round < params.plan.rounds; ++round) {
    const int segment = round * params.plan.warps + warp;
    if (segment < task.segments) {
      multiply_segment<Traits, GpuGemmWarp>(params, task, segment, memory, constants, scales);
    }
    __syncthreads();
    add_round<Traits>(params, task, round, all_memory, totals, thread, threads);
    __syncthreads();
  }
}

template <int kRowTiles, int kColumnTiles>
struct GemmSm80 {
  using Traits = GemmSm80Traits<kRowTiles, kColumnTiles>;

  static constexpr int kSharedMemory = gemm_sm80_shared_memory(
      gemm_sm80_max_warps(kRowTiles, kColumnTiles), kRowTiles, kColumnTiles);
  static_assert(sizeof(WarpMemory<Traits>) == gemm_sm80_warp_memory(kRowTiles, kColumnTiles));
  static_assert(kSharedMemory <= gemm_sm80_most_shared_memory(90), "all warps, on sm_90");
  static_assert(gemm_sm80_warps(kRowTiles, kColumnTiles, gemm_sm80_most_shared_memory(86)) > 4,
                "more than a warp for each scheduler, on any device");

  static void run(const MXFP4GemmProblem& problem, const GemmPlan& plan, void*, void* stream) {
    constexpr int64_t kMostInGrid = 65535;  // along y, and along z
    const int index = current_device(kOp);
    const DeviceInfo device = device_info(index);
    const GemmSm80Params params{
        problem, plan_gemm_sm80(problem.K, kRowTiles, kColumnTiles, device.shared_memory),
        plan.early_weights};
    const int warps = gemm_sm80_warps(kRowTiles, kColumnTiles, device.shared_memory);
    allow_shared_memory<gemm_sm80_kernel<Traits>>(
        kOp, index, gemm_sm80_shared_memory(warps, kRowTiles, kColumnTiles));
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    // Parts of x side by side: those that read the same W run at the same time, and share it in L2.
    const int64_t parts = ceil_div(problem.M, 8 * kColumnTiles);
    const int64_t tiles = ceil_div(problem.N, kFragmentRows * kRowTiles);
    const int64_t layers = ceil_div(tiles, kMostInGrid);
    config.gridDim =
        dim3(static_cast<unsigned>(parts), static_cast<unsigned>(ceil_div(tiles, layers)),
             static_cast<unsigned>(layers));
    config.blockDim = dim3(params.plan.warps * kWarpLanes);
    config.dynamicSmemBytes = gemm_sm80_shared_memory(params.plan.warps, kRowTiles, kColumnTiles);
    config.stream = as_stream(stream);
    config.attrs = &overlap;
    config.numAttrs = device.arch >= 90 && has_wait<gemm_sm80_kernel<Traits>>(kOp, index) ? 1 : 0;
    DUQPP_CHECK_CUDA(kOp, cudaLaunchKernelEx(&config, gemm_sm80_kernel<Traits>, params));
  }

  // Any M and N that are 32-bit integers fit the grid.
  static bool can_implement(const MXFP4GemmProblem& problem, const GemmPlan&) {
    return problem.N % 8 == 0 && problem.K % kBlockSize == 0;
  }
  static int64_t workspace_size(const MXFP4GemmProblem&, const GemmPlan&) { return 0; }
  static void clear_workspace(const MXFP4GemmProblem&, const GemmPlan&, void*, void*) {}

  static constexpr GemmInstance kInstance = {kSharedMemory, can_implement, workspace_size,
                                             clear_workspace, run};
};

template <GemmKernel kernel>
inline constexpr GemmInstance kInstance = GemmSm80<gemm_kernel_info(kernel).tile_m / kFragmentRows,
                                                   gemm_kernel_info(kernel).tile_n / 8>::kInstance;

}  // namespace

const GemmInstance kSm80Tile16x8 = kInstance<GemmKernel::kSm80Tile16x8>;
const GemmInstance kSm80Tile32x8 = kInstance<GemmKernel::kSm80Tile32x8>;
const GemmInstance kSm80Tile64x8 = kInstance<GemmKernel::kSm80Tile64x8>;
const GemmInstance kSm80Tile16x16 = kInstance<GemmKernel::kSm80Tile16x16>;
const GemmInstance kSm80Tile32x16 = kInstance<GemmKernel::kSm80Tile32x16>;
const GemmInstance kSm80Tile64x16 = kInstance<GemmKernel::kSm80Tile64x16>;
const GemmInstance kSm80Tile32x32 = kInstance<GemmKernel::kSm80Tile32x32>;

}  // namespace duqpp::cuda
