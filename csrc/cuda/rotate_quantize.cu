// Configuration and launch of rotate_quantize.cuh.
#include "cuda/device.h"
#include "cuda/device_info.h"
#include "cuda/gpu_warp.cuh"
#include "cuda/rotate_quantize.cuh"
#include "cuda/rotate_quantize.h"
#include "cutlass/cutlass.h"

namespace duqpp::cuda {
namespace {

constexpr const char* kOp = "rotate_quantize";

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinCtas)
    rotate_quantize_kernel(const __grid_constant__ RotateQuantizeParams params) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static_assert(cutlass::arch::IsGdcGloballyEnabled,
                "without CUTLASS_ENABLE_GDC_FOR_SM90 and _SM100 the wait below is empty, and the "
                "kernel races with the one that writes x");
#endif
  const int warp = cutlass::canonical_warp_idx_sync();
  const WarpTask task = warp_task(params.plan, blockIdx.x, warp);
  GpuWarp::Lanes<LaneConstants> constants;
  load_constants<Traits, GpuWarp>(params, task.first_block, constants);

  cutlass::arch::wait_on_dependent_grids();
  asm volatile("" ::: "memory");  // the wait itself tells the compiler nothing about memory
  cutlass::arch::launch_dependent_grids();

  const float* reciprocal_rms = nullptr;
  if constexpr (Traits::kNorm) {
    __shared__ NormRows rows;
    sum_norm_rows<Traits, GpuWarp>(params, task, warp, rows);
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    if (row < params.plan.rows_per_cta) finish_norm_row(params.problem, row, rows);
    __syncthreads();
    reciprocal_rms = rows.reciprocal_rms;
  }
  rotate_quantize_warp<Traits, GpuWarp>(params, task, constants, reciprocal_rms);
}

template <class Traits>
void launch(const RotateQuantizeProblem& problem, cudaStream_t stream) {
  const int index = current_device(kOp);
  const DeviceInfo device = device_info(index);
  RotateQuantizeParams params{};
  params.problem = problem;
  params.plan = plan_rotate_quantize(problem, device.sm_count);
  params.scale_strides =
      scale_strides(problem.scale_layout, static_cast<uint32_t>(problem.K / kBlockSize));

  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(params.plan.column_chunks * params.plan.row_strips);
  config.blockDim = dim3(params.plan.teams * kTeamWarps * kWarpLanes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs =
      device.arch >= 90 && has_wait<rotate_quantize_kernel<Traits>>(kOp, index) ? 1 : 0;
  DUQPP_CHECK_CUDA(kOp, cudaLaunchKernelEx(&config, rotate_quantize_kernel<Traits>, params));
}

// From the fields of a problem to the kernel that was compiled for them, one field at a time.
template <Dtype kDtype, Prologue kPrologue, ScaleRule kRule>
void launch(const RotateQuantizeProblem& problem, cudaStream_t stream) {
  if (problem.rotation == nullptr) {
    return launch<RotateQuantizeTraits<kDtype, kPrologue, kRule, false>>(problem, stream);
  }
  launch<RotateQuantizeTraits<kDtype, kPrologue, kRule, true>>(problem, stream);
}

template <Dtype kDtype, Prologue kPrologue>
void launch(const RotateQuantizeProblem& problem, cudaStream_t stream) {
  switch (problem.rule) {
    case ScaleRule::kFloor:
      return launch<kDtype, kPrologue, ScaleRule::kFloor>(problem, stream);
    case ScaleRule::kEven:
      return launch<kDtype, kPrologue, ScaleRule::kEven>(problem, stream);
    case ScaleRule::kCeil:
      return launch<kDtype, kPrologue, ScaleRule::kCeil>(problem, stream);
    case ScaleRule::kMse:
      return launch<kDtype, kPrologue, ScaleRule::kMse>(problem, stream);
  }
}

template <Dtype kDtype>
void launch(const RotateQuantizeProblem& problem, cudaStream_t stream) {
  switch (problem.prologue) {
    case Prologue::kNone:
      return launch<kDtype, Prologue::kNone>(problem, stream);
    case Prologue::kRmsNorm:
      return launch<kDtype, Prologue::kRmsNorm>(problem, stream);
    case Prologue::kSiluMul:
      return launch<kDtype, Prologue::kSiluMul>(problem, stream);
  }
}

}  // namespace

void rotate_quantize(const RotateQuantizeProblem& problem, void* stream) {
  if (problem.M == 0 || problem.K == 0) return;
  if (problem.dtype == Dtype::kFloat16) {
    return launch<Dtype::kFloat16>(problem, as_stream(stream));
  }
  launch<Dtype::kBFloat16>(problem, as_stream(stream));
}

}  // namespace duqpp::cuda
