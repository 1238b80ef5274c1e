// The CUDA kernels as torch ops (namespace duqpp_native): check, allocate, fill a problem, launch
// on torch's current stream. Workspaces come from torch's allocator; nothing waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "cuda/device_info.h"
#include "cuda/kernel_table.h"
#include "cuda/mxfp4_gemm.h"
#include "cuda/rotate_quantize.h"
#include "cuda/streamk_switch.h"
#include "format/scale_layout.h"
#include "torch/cuda_device.h"
#include "torch/problems.h"

namespace duqpp {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kQuantize = "rotate_quantize";
constexpr const char* kGemm = "mxfp4_gemm";

// A rotate_quantize that is ready to launch: checked, and its results allocated.
struct Quantization {
  RotateQuantizeProblem problem;
  Tensor codes, scales;

  void launch(void* stream) const { cuda::rotate_quantize(problem, stream); }
};

Quantization prepare_quantization(const Tensor& x, RotateQuantizeProblem problem,
                                  const std::optional<Tensor>& rotation) {
  STD_TORCH_CHECK(problem.dtype != Dtype::kFloat32, kQuantize,
                  ": x must be bfloat16 or float16 on CUDA, got float32");
  STD_TORCH_CHECK(x.numel() <= int64_t{1} << 31, kQuantize,
                  ": x must have at most 2^31 values, got ", x.numel());
  check_aligned(kQuantize, "x", problem.x);
  check_aligned(kQuantize, "up", problem.up);
  check_aligned(kQuantize, "norm_weight", problem.norm_weight);
  check_aligned(kQuantize, "rotation", problem.rotation);
  if (rotation.has_value()) check_same_device(kQuantize, "rotation", *rotation, x);
  Tensor codes = empty_on_device_of(x, {problem.M, problem.K / 2}, ScalarType::Byte);
  Tensor scales = empty_on_device_of(x, {swizzled_size(problem.M, problem.K / kBlockSize)},
                                           ScalarType::Byte);
  problem.scale_layout = ScaleLayout::kSwizzled;
  problem.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  problem.scales = static_cast<uint8_t*>(scales.mutable_data_ptr());
  return {problem, codes, scales};
}

std::tuple<Tensor, Tensor> quantize_on_cuda(const Tensor& x, const RotateQuantizeProblem& problem,
                                            const std::optional<Tensor>& rotation) {
  const Quantization quantization = prepare_quantization(x, problem, rotation);
  const DeviceGuard guard(x.get_device_index());
  quantization.launch(current_stream(x.get_device_index()));
  return {quantization.codes, quantization.scales};
}

std::tuple<Tensor, Tensor> rotate_quantize_cuda(const Tensor& x, std::optional<Tensor> rotation,
                                                int64_t rule) {
  return quantize_on_cuda(x, quantize_problem(x, rotation, rule), rotation);
}

std::tuple<Tensor, Tensor> rmsnorm_rotate_quantize_cuda(const Tensor& x,
                                                        std::optional<Tensor> norm_weight,
                                                        double epsilon,
                                                        std::optional<Tensor> rotation,
                                                        int64_t rule) {
  if (norm_weight.has_value()) check_same_device(kQuantize, "norm_weight", *norm_weight, x);
  return quantize_on_cuda(x, rmsnorm_problem(x, norm_weight, epsilon, rotation, rule), rotation);
}

std::tuple<Tensor, Tensor> silu_mul_rotate_quantize_cuda(const Tensor& gate, const Tensor& up,
                                                         std::optional<Tensor> rotation,
                                                         int64_t rule) {
  check_same_device(kQuantize, "up", up, gate);
  return quantize_on_cuda(gate, silu_mul_problem(gate, up, rotation, rule), rotation);
}

// An mxfp4_gemm that is ready to launch: checked, planned, its result and workspace allocated, and
// the workspace cleared on the stream.
struct Product {
  MXFP4GemmProblem problem;
  cuda::GemmPlan plan;
  Tensor out;
  std::optional<Tensor> workspace;

  void launch(void* stream) const {
    cuda::run_mxfp4_gemm(problem, plan, workspace ? workspace->mutable_data_ptr() : nullptr,
                         stream);
  }
};

Product prepare_product(const Tensor& a_codes, const Tensor& a_scales, const Tensor& b_codes,
                        const Tensor& b_scales, const std::optional<Tensor>& bias,
                        const Tensor& out, void* stream) {
  MXFP4GemmProblem problem = gemm_problem(a_codes.size(0), b_codes, b_scales, bias);
  problem.a_codes = static_cast<const uint8_t*>(a_codes.const_data_ptr());
  problem.a_scales = static_cast<const uint8_t*>(a_scales.const_data_ptr());
  problem.out_dtype = float_dtype("out", out);
  problem.out = out.mutable_data_ptr();
  const cuda::DeviceInfo info = cuda::device_info(a_codes.get_device_index());
  const int64_t scales_size = cuda::weight_scales_size(problem.N, problem.K, info.arch);
  STD_TORCH_CHECK(b_scales.numel() == scales_size, kGemm, ": the weight's scales must have ",
                  scales_size, " bytes on compute capability ", info.arch / 10, ".", info.arch % 10,
                  ", got ", b_scales.numel());
  const std::optional<cuda::GemmPlan> plan = cuda::select_gemm(
      problem.M, problem.N, problem.K, info.arch, info.sm_count, cuda::streamk_switch());
  STD_TORCH_CHECK(plan.has_value() && cuda::has_mxfp4_gemm_kernel(plan->kernel), kGemm,
                  ": no kernel in this build for compute capability ", info.arch / 10, ".",
                  info.arch % 10);
  Product product{problem, *plan, out, std::nullopt};
  const int64_t bytes = cuda::gemm_workspace_size(*plan, problem.M, problem.N);
  if (bytes > 0) {
    product.workspace = empty_on_device_of(a_codes, {bytes}, ScalarType::Byte);
    cuda::clear_mxfp4_gemm_workspace(problem, *plan, product.workspace->mutable_data_ptr(), stream);
  }
  return product;
}

// What memory safety needs of an operand; its row-major codes have K / 2 bytes a row. How many
// scales it must have depends on their layout.
void check_operand(const std::string& name, const Tensor& codes, const Tensor& scales, int64_t K) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // CUTLASS holds sizes as int
  const std::string codes_name = name + ".codes", scales_name = name + ".scales";
  STD_TORCH_CHECK(codes.dim() == 2, codes_name, " must be [rows, K/2]");
  check_bytes(codes_name.c_str(), codes, codes.size(0), K / 2);
  STD_TORCH_CHECK(codes.size(0) <= kMost, kGemm, ": ", name, " must have at most ", kMost,
                  " rows, got ", codes.size(0));
  STD_TORCH_CHECK(K > 0 && K <= kMost && K % kBlockSize == 0, kGemm,
                  ": K must be a multiple of 32, at least 32 and at most ", kMost, ", got ", K);
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Byte, scales_name, " must be uint8");
  check_contiguous(scales_name.c_str(), scales);
  check_aligned(kGemm, codes_name.c_str(), codes.const_data_ptr());
  check_aligned(kGemm, scales_name.c_str(), scales.const_data_ptr());
}

// And of a weight: kernels store rows of out in units of 16 bytes.
void check_weight(const std::string& name, const Tensor& codes, const Tensor& scales, int64_t K) {
  check_operand(name, codes, scales, K);
  STD_TORCH_CHECK(codes.size(0) > 0 && codes.size(0) % 8 == 0, kGemm, ": ", name,
                  " must have a multiple of 8 rows, at least 8, got ", codes.size(0),
                  "; pad the weight with zero rows");
}

Tensor mxfp4_gemm_cuda(const Tensor& a_codes, const Tensor& a_scales, const Tensor& b_codes,
                       const Tensor& b_scales, std::optional<Tensor> bias, ScalarType out_dtype) {
  const int64_t K = a_codes.size(-1) * 2;
  check_operand("a", a_codes, a_scales, K);
  check_weight("b", b_codes, b_scales, K);
  const int64_t a_scales_size = swizzled_size(a_codes.size(0), K / kBlockSize);
  STD_TORCH_CHECK(a_scales.numel() == a_scales_size, kGemm, ": a.scales must have ", a_scales_size,
                  " bytes (swizzled, padding included), got ", a_scales.numel());
  STD_TORCH_CHECK(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half, kGemm,
                  ": out_dtype must be bfloat16 or float16 on CUDA");
  check_same_device(kGemm, "a.codes", a_codes, a_codes);
  check_same_device(kGemm, "a.scales", a_scales, a_codes);
  check_same_device(kGemm, "b.codes", b_codes, a_codes);
  check_same_device(kGemm, "b.scales", b_scales, a_codes);
  if (bias.has_value()) check_same_device(kGemm, "bias", *bias, a_codes);
  const DeviceGuard guard(a_codes.get_device_index());
  void* stream = current_stream(a_codes.get_device_index());
  const Tensor out =
      empty_on_device_of(a_codes, {a_codes.size(0), b_codes.size(0)}, out_dtype);
  const Product product = prepare_product(a_codes, a_scales, b_codes, b_scales, bias, out, stream);
  product.launch(stream);
  return product.out;
}

// rotate_quantize, then mxfp4_gemm. The product is prepared first: the memset that clears a
// workspace of stream-K comes before both kernels, which are then adjacent in the stream, so that
// the GEMM's start overlaps the end of rotate_quantize (programmatic dependent launch). In
// mxfp4_gemm_cuda, which is handed what a kernel has quantized already, that memset stands between.
Tensor mxfp4_linear_cuda(const Tensor& x, std::optional<Tensor> rotation, int64_t rule,
                         const Tensor& weight_codes, const Tensor& weight_scales,
                         std::optional<Tensor> bias) {
  const RotateQuantizeProblem problem = quantize_problem(x, rotation, rule);
  check_weight("weight", weight_codes, weight_scales, problem.K);
  check_same_device(kGemm, "weight.codes", weight_codes, x);
  check_same_device(kGemm, "weight.scales", weight_scales, x);
  if (bias.has_value()) check_same_device(kGemm, "bias", *bias, x);
  const DeviceGuard guard(x.get_device_index());
  void* stream = current_stream(x.get_device_index());
  const Quantization a = prepare_quantization(x, problem, rotation);
  Product product = prepare_product(a.codes, a.scales, weight_codes, weight_scales, bias,
                                    linear_result(x, weight_codes.size(0)), stream);
  product.plan.early_weights = true;  // rotate_quantize is just before it
  a.launch(stream);
  product.launch(stream);
  return product.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(duqpp_native, CUDA, m) {
  m.impl("rotate_quantize", TORCH_BOX(&rotate_quantize_cuda));
  m.impl("rmsnorm_rotate_quantize", TORCH_BOX(&rmsnorm_rotate_quantize_cuda));
  m.impl("silu_mul_rotate_quantize", TORCH_BOX(&silu_mul_rotate_quantize_cuda));
  m.impl("mxfp4_gemm", TORCH_BOX(&mxfp4_gemm_cuda));
  m.impl("mxfp4_linear", TORCH_BOX(&mxfp4_linear_cuda));
}

}  // namespace duqpp
