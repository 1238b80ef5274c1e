// The kernels as torch ops (namespace duqpp_native): check, allocate, fill a problem, call.
//
// Through torch's stable ABI only, so that one build loads under every torch from 2.11 on, with
// CUDA or without.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/mxfp4_gemm.h"
#include "cpu/rotate_quantize.h"
#include "torch/checks.h"

namespace duqpp {
namespace {

void torch_parallel_for(int64_t tasks, int64_t grain, const cpu::ParallelBody& body) {
  torch::stable::parallel_for(0, tasks, grain, body);
}

// What the forms of rotate_quantize have in common: fills all of the problem but its prologue's
// own.
RotateQuantizeProblem quantize_problem(const Tensor& x, const std::optional<Tensor>& rotation,
                                       int64_t rule) {
  RotateQuantizeProblem problem{};
  problem.dtype = float_dtype("x", x);
  check_rows("x", x);
  problem.M = x.size(0);
  problem.K = x.size(1);
  problem.x = x.const_data_ptr();
  STD_TORCH_CHECK(rule >= 0 && rule <= 3, "rule must be 0 (floor) to 3 (mse)");
  problem.rule = static_cast<ScaleRule>(rule);
  if (rotation.has_value()) {
    STD_TORCH_CHECK(rotation->scalar_type() == ScalarType::BFloat16, "rotation must be bfloat16");
    check_contiguous("rotation", *rotation);
    problem.rotation = static_cast<const uint16_t*>(rotation->const_data_ptr());
    problem.rotation_matrices = rotation->numel() / (kBlockSize * kBlockSize);
    STD_TORCH_CHECK(
        rotation->numel() % (kBlockSize * kBlockSize) == 0 &&
            (problem.rotation_matrices == 1 || problem.rotation_matrices == problem.K / kBlockSize),
        "rotation must be [32, 32] or [K/32, 32, 32]");
  }
  return problem;
}

std::tuple<Tensor, Tensor> quantize_on_cpu(const Tensor& x, RotateQuantizeProblem& problem) {
  Tensor codes = torch::stable::new_empty(x, {problem.M, problem.K / 2}, ScalarType::Byte);
  Tensor scales =
      torch::stable::new_empty(x, {problem.M, problem.K / kBlockSize}, ScalarType::Byte);
  problem.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  problem.scales = static_cast<uint8_t*>(scales.mutable_data_ptr());
  cpu::rotate_quantize(problem, cpu::selected_isa(), torch_parallel_for);
  return {codes, scales};
}

std::tuple<Tensor, Tensor> rotate_quantize_cpu(const Tensor& x, std::optional<Tensor> rotation,
                                               int64_t rule) {
  RotateQuantizeProblem problem = quantize_problem(x, rotation, rule);
  return quantize_on_cpu(x, problem);
}

std::tuple<Tensor, Tensor> rmsnorm_rotate_quantize_cpu(const Tensor& x,
                                                       std::optional<Tensor> norm_weight,
                                                       double epsilon,
                                                       std::optional<Tensor> rotation,
                                                       int64_t rule) {
  RotateQuantizeProblem problem = quantize_problem(x, rotation, rule);
  problem.prologue = Prologue::kRmsNorm;
  problem.epsilon = static_cast<float>(epsilon);
  if (norm_weight.has_value()) {
    STD_TORCH_CHECK(
        norm_weight->scalar_type() == x.scalar_type() && norm_weight->numel() == problem.K,
        "norm_weight must be [K], in the dtype of x");
    check_contiguous("norm_weight", *norm_weight);
    problem.norm_weight = norm_weight->const_data_ptr();
  }
  return quantize_on_cpu(x, problem);
}

std::tuple<Tensor, Tensor> silu_mul_rotate_quantize_cpu(const Tensor& gate, const Tensor& up,
                                                        std::optional<Tensor> rotation,
                                                        int64_t rule) {
  RotateQuantizeProblem problem = quantize_problem(gate, rotation, rule);
  problem.prologue = Prologue::kSiluMul;
  check_rows("up", up);
  STD_TORCH_CHECK(
      up.scalar_type() == gate.scalar_type() && up.size(0) == problem.M && up.size(1) == problem.K,
      "up must have the shape and dtype of gate");
  problem.up = up.const_data_ptr();
  return quantize_on_cpu(gate, problem);
}

using Relayout = void (*)(int64_t N, int64_t K, const uint8_t* codes, const uint8_t* scales,
                          uint8_t* new_codes, uint8_t* new_scales, const cpu::ParallelFor&);

std::tuple<Tensor, Tensor> relayout(const Tensor& codes, const Tensor& scales, Relayout function) {
  const int64_t K = check_mxfp4("weight", codes, scales);
  Tensor new_codes = torch::stable::empty_like(codes);
  Tensor new_scales = torch::stable::empty_like(scales);
  function(codes.size(0), K, static_cast<const uint8_t*>(codes.const_data_ptr()),
           static_cast<const uint8_t*>(scales.const_data_ptr()),
           static_cast<uint8_t*>(new_codes.mutable_data_ptr()),
           static_cast<uint8_t*>(new_scales.mutable_data_ptr()), torch_parallel_for);
  return {new_codes, new_scales};
}

std::tuple<Tensor, Tensor> prepare_weight_cpu(const Tensor& codes, const Tensor& scales) {
  return relayout(codes, scales, cpu::prepare_weight);
}

std::tuple<Tensor, Tensor> restore_weight_cpu(const Tensor& codes, const Tensor& scales) {
  return relayout(codes, scales, cpu::restore_weight);
}

Tensor mxfp4_gemm_cpu(const Tensor& a_codes, const Tensor& a_scales, const Tensor& b_codes,
                      const Tensor& b_scales, std::optional<Tensor> bias, ScalarType out_dtype) {
  MXFP4GemmProblem problem{};
  problem.K = check_mxfp4("a", a_codes, a_scales);
  STD_TORCH_CHECK(check_mxfp4("b", b_codes, b_scales) == problem.K, "a and b must have equal K");
  problem.M = a_codes.size(0);
  problem.N = b_codes.size(0);
  problem.alpha = 1.0f;
  problem.a_codes = static_cast<const uint8_t*>(a_codes.const_data_ptr());
  problem.a_scales = static_cast<const uint8_t*>(a_scales.const_data_ptr());
  problem.b_codes = static_cast<const uint8_t*>(b_codes.const_data_ptr());
  problem.b_scales = static_cast<const uint8_t*>(b_scales.const_data_ptr());
  if (bias.has_value()) {
    problem.bias_dtype = float_dtype("bias", *bias);
    check_contiguous("bias", *bias);
    STD_TORCH_CHECK(bias->numel() == problem.N, "bias must be [N]");
    problem.bias = bias->const_data_ptr();
  }
  Tensor out = torch::stable::new_empty(a_codes, {problem.M, problem.N}, out_dtype);
  problem.out_dtype = float_dtype("out", out);
  problem.out = out.mutable_data_ptr();
  cpu::mxfp4_gemm(problem, cpu::selected_isa(), torch_parallel_for);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(duqpp_native, m) {
  m.def("rotate_quantize(Tensor x, Tensor? rotation, int rule) -> (Tensor, Tensor)");
  m.def(
      "rmsnorm_rotate_quantize(Tensor x, Tensor? norm_weight, float epsilon, Tensor? rotation, "
      "int rule) -> (Tensor, Tensor)");
  m.def(
      "silu_mul_rotate_quantize(Tensor gate, Tensor up, Tensor? rotation, int rule) "
      "-> (Tensor, Tensor)");
  m.def("prepare_weight(Tensor codes, Tensor scales) -> (Tensor, Tensor)");
  m.def("restore_weight(Tensor codes, Tensor scales) -> (Tensor, Tensor)");
  m.def(
      "mxfp4_gemm(Tensor a_codes, Tensor a_scales, Tensor b_codes, Tensor b_scales, Tensor? bias, "
      "ScalarType out_dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(duqpp_native, CPU, m) {
  m.impl("rotate_quantize", TORCH_BOX(&rotate_quantize_cpu));
  m.impl("rmsnorm_rotate_quantize", TORCH_BOX(&rmsnorm_rotate_quantize_cpu));
  m.impl("silu_mul_rotate_quantize", TORCH_BOX(&silu_mul_rotate_quantize_cpu));
  m.impl("prepare_weight", TORCH_BOX(&prepare_weight_cpu));
  m.impl("restore_weight", TORCH_BOX(&restore_weight_cpu));
  m.impl("mxfp4_gemm", TORCH_BOX(&mxfp4_gemm_cpu));
}

}  // namespace duqpp
