// The CUDA kernels as torch ops (namespace duqpp_native): check, allocate, fill a problem, launch
// on torch's current stream. Workspaces come from torch's allocator; nothing waits for the device.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "cuda/device_info.h"
#include "cuda/kernel_table.h"
#include "cuda/mxfp4_gemm.h"
#include "cuda/rotate_quantize.h"
#include "format/scale_layout.h"
#include "torch/problems.h"

namespace duqpp {
namespace {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream. The function is in libtorch_cuda, which a CPU build of torch lacks: it is
// looked up in the library that is loaded already, so that this one loads under either.
void* current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol =
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Function>(symbol);
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

void check_aligned(const char* name, const void* pointer) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, name,
                  " must start at a multiple of 16 bytes; pass a copy");
}

void check_same_device(const char* name, const Tensor& tensor, const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
                  " must be on the device of the first argument");
}

std::tuple<Tensor, Tensor> launch_rotate_quantize(const Tensor& x, RotateQuantizeProblem problem,
                                                  const std::optional<Tensor>& rotation) {
  STD_TORCH_CHECK(problem.dtype != Dtype::kFloat32, "x must be bfloat16 or float16 on CUDA");
  STD_TORCH_CHECK(problem.M <= (int64_t{1} << 31) / problem.K, "x must have at most 2^31 values");
  if (rotation.has_value()) check_same_device("rotation", *rotation, x);
  check_aligned("x", problem.x);
  check_aligned("up", problem.up);
  check_aligned("norm_weight", problem.norm_weight);
  check_aligned("rotation", problem.rotation);
  const DeviceGuard guard(x.get_device_index());
  Tensor codes = torch::stable::new_empty(x, {problem.M, problem.K / 2}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(x, {swizzled_size(problem.M, problem.K / kBlockSize)},
                                           ScalarType::Byte);
  problem.scale_layout = ScaleLayout::kSwizzled;
  problem.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  problem.scales = static_cast<uint8_t*>(scales.mutable_data_ptr());
  if (problem.M > 0) {
    cuda::rotate_quantize(problem, current_stream(x.get_device_index()));
  }
  return {codes, scales};
}

std::tuple<Tensor, Tensor> rotate_quantize_cuda(const Tensor& x, std::optional<Tensor> rotation,
                                                int64_t rule) {
  return launch_rotate_quantize(x, quantize_problem(x, rotation, rule), rotation);
}

std::tuple<Tensor, Tensor> rmsnorm_rotate_quantize_cuda(const Tensor& x,
                                                        std::optional<Tensor> norm_weight,
                                                        double epsilon,
                                                        std::optional<Tensor> rotation,
                                                        int64_t rule) {
  if (norm_weight.has_value()) check_same_device("norm_weight", *norm_weight, x);
  return launch_rotate_quantize(x, rmsnorm_problem(x, norm_weight, epsilon, rotation, rule),
                                rotation);
}

std::tuple<Tensor, Tensor> silu_mul_rotate_quantize_cuda(const Tensor& gate, const Tensor& up,
                                                         std::optional<Tensor> rotation,
                                                         int64_t rule) {
  check_same_device("up", up, gate);
  return launch_rotate_quantize(gate, silu_mul_problem(gate, up, rotation, rule), rotation);
}

void check_status(const std::string& message) { STD_TORCH_CHECK(message.empty(), message); }

Tensor mxfp4_gemm_cuda(const Tensor& a_codes, const Tensor& a_scales, const Tensor& b_codes,
                       const Tensor& b_scales, std::optional<Tensor> bias, ScalarType out_dtype) {
  STD_TORCH_CHECK(a_codes.dim() == 2 && b_codes.dim() == 2, "codes must be [rows, K/2]");
  check_bytes("a.codes", a_codes, a_codes.size(0), a_codes.size(1));
  check_bytes("b.codes", b_codes, b_codes.size(0), a_codes.size(1));
  for (const Tensor* scales : {&a_scales, &b_scales}) {
    STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Byte, "scales must be uint8");
    check_contiguous("scales", *scales);
    check_same_device("scales", *scales, a_codes);
  }
  check_same_device("b.codes", b_codes, a_codes);
  if (bias.has_value()) check_same_device("bias", *bias, a_codes);

  const int device = a_codes.get_device_index();
  const DeviceGuard guard(device);
  MXFP4GemmProblem problem = gemm_problem(a_codes, b_codes, bias);
  problem.a_scales = static_cast<const uint8_t*>(a_scales.const_data_ptr());
  problem.b_scales = static_cast<const uint8_t*>(b_scales.const_data_ptr());
  Tensor out = torch::stable::new_empty(a_codes, {problem.M, problem.N}, out_dtype);
  problem.out_dtype = float_dtype("out", out);
  problem.out = out.mutable_data_ptr();
  check_status(cuda::check_mxfp4_gemm(problem, a_scales.numel(), b_scales.numel()));

  const cuda::DeviceInfo info = cuda::device_info(device);
  const std::optional<cuda::GemmPlan> plan =
      cuda::select_gemm(problem.M, problem.N, problem.K, info.arch, info.sm_count);
  STD_TORCH_CHECK(plan.has_value() && cuda::has_mxfp4_gemm_kernel(plan->kernel),
                  "mxfp4_gemm: no kernel in this build for compute capability ", info.arch / 10,
                  ".", info.arch % 10);
  const int64_t bytes = cuda::gemm_workspace_size(*plan, problem.M, problem.N);
  const Tensor workspace = torch::stable::new_empty(a_codes, {bytes}, ScalarType::Byte);
  void* stream = current_stream(device);
  void* data = workspace.mutable_data_ptr();
  check_status(cuda::clear_mxfp4_gemm_workspace(problem, *plan, data, stream));
  check_status(cuda::run_mxfp4_gemm(problem, *plan, data, stream));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(duqpp_native, CUDA, m) {
  m.impl("rotate_quantize", TORCH_BOX(&rotate_quantize_cuda));
  m.impl("rmsnorm_rotate_quantize", TORCH_BOX(&rmsnorm_rotate_quantize_cuda));
  m.impl("silu_mul_rotate_quantize", TORCH_BOX(&silu_mul_rotate_quantize_cuda));
  m.impl("mxfp4_gemm", TORCH_BOX(&mxfp4_gemm_cuda));
}

}  // namespace duqpp
