// The CPU kernels as torch ops (namespace duqpp_native): check, allocate, fill a problem, call.
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
#include "cpu/scratch.h"
#include "torch/problems.h"

namespace duqpp {
namespace {

void torch_parallel_for(int64_t tasks, int64_t grain, const cpu::ParallelBody& body) {
  torch::stable::parallel_for(0, tasks, grain, body);
}

std::tuple<Tensor, Tensor> quantize_on_cpu(const Tensor& x, RotateQuantizeProblem& problem) {
  Tensor codes = empty_on_device_of(x, {problem.M, problem.K / 2}, ScalarType::Byte);
  Tensor scales =
      empty_on_device_of(x, {problem.M, problem.K / kBlockSize}, ScalarType::Byte);
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
  RotateQuantizeProblem problem = rmsnorm_problem(x, norm_weight, epsilon, rotation, rule);
  return quantize_on_cpu(x, problem);
}

std::tuple<Tensor, Tensor> silu_mul_rotate_quantize_cpu(const Tensor& gate, const Tensor& up,
                                                        std::optional<Tensor> rotation,
                                                        int64_t rule) {
  RotateQuantizeProblem problem = silu_mul_problem(gate, up, rotation, rule);
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

void multiply_on_cpu(MXFP4GemmProblem& problem, const uint8_t* a_codes, const uint8_t* a_scales,
                     Tensor& out) {
  problem.a_codes = a_codes;
  problem.a_scales = a_scales;
  problem.out_dtype = float_dtype("out", out);
  problem.out = out.mutable_data_ptr();
  cpu::mxfp4_gemm(problem, cpu::selected_isa(), torch_parallel_for);
}

Tensor mxfp4_gemm_cpu(const Tensor& a_codes, const Tensor& a_scales, const Tensor& b_codes,
                      const Tensor& b_scales, std::optional<Tensor> bias, ScalarType out_dtype) {
  const int64_t K = check_mxfp4("a", a_codes, a_scales);
  STD_TORCH_CHECK(check_mxfp4("b", b_codes, b_scales) == K, "a and b must have equal K");
  MXFP4GemmProblem problem = gemm_problem(a_codes.size(0), b_codes, b_scales, bias);
  Tensor out = empty_on_device_of(a_codes, {problem.M, problem.N}, out_dtype);
  multiply_on_cpu(problem, static_cast<const uint8_t*>(a_codes.const_data_ptr()),
                  static_cast<const uint8_t*>(a_scales.const_data_ptr()), out);
  return out;
}

// rotate_quantize, then mxfp4_gemm. What is between them is no tensor: for a few rows, allocating
// two more would take as long as computing them.
Tensor mxfp4_linear_cpu(const Tensor& x, std::optional<Tensor> rotation, int64_t rule,
                        const Tensor& weight_codes, const Tensor& weight_scales,
                        std::optional<Tensor> bias) {
  RotateQuantizeProblem quantization = quantize_problem(x, rotation, rule);
  STD_TORCH_CHECK(check_mxfp4("weight", weight_codes, weight_scales) == quantization.K,
                  "x and weight must have equal K");
  MXFP4GemmProblem product = gemm_problem(quantization.M, weight_codes, weight_scales, bias);
  Tensor out = linear_result(x, product.N);
  const int64_t code_bytes = quantization.M * quantization.K / 2;
  const int64_t scale_bytes = quantization.M * quantization.K / kBlockSize;
  cpu::Scratch memory;
  quantization.codes = memory.reserve(code_bytes + scale_bytes);
  quantization.scales = quantization.codes + code_bytes;
  cpu::rotate_quantize(quantization, cpu::selected_isa(), torch_parallel_for);
  multiply_on_cpu(product, quantization.codes, quantization.scales, out);
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
  m.def(
      "mxfp4_linear(Tensor x, Tensor? rotation, int rule, Tensor weight_codes, "
      "Tensor weight_scales, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(duqpp_native, CPU, m) {
  m.impl("rotate_quantize", TORCH_BOX(&rotate_quantize_cpu));
  m.impl("rmsnorm_rotate_quantize", TORCH_BOX(&rmsnorm_rotate_quantize_cpu));
  m.impl("silu_mul_rotate_quantize", TORCH_BOX(&silu_mul_rotate_quantize_cpu));
  m.impl("prepare_weight", TORCH_BOX(&prepare_weight_cpu));
  m.impl("restore_weight", TORCH_BOX(&restore_weight_cpu));
  m.impl("mxfp4_gemm", TORCH_BOX(&mxfp4_gemm_cpu));
  m.impl("mxfp4_linear", TORCH_BOX(&mxfp4_linear_cpu));
}

}  // namespace duqpp
