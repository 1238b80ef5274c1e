// Problems from tensors: what the ops of every device have in common. Pointers to results are left
// to the caller, who allocates them.
#pragma once


#include <optional>
#include <vector>

#include "torch/allocate.h"
#include "torch/checks.h"

namespace duqpp {

// What the forms of rotate_quantize have in common: fills all of the problem but its prologue's
// own.
inline RotateQuantizeProblem quantize_problem(const Tensor& x,
                                              const std::optional<Tensor>& rotation, int64_t rule) {
  RotateQuantizeProblem problem{};
  problem.dtype = float_dtype("x", x);
  problem.K = check_rows("x", x);
  problem.M = x.numel() / problem.K;
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

inline RotateQuantizeProblem rmsnorm_problem(const Tensor& x,
                                             const std::optional<Tensor>& norm_weight,
                                             double epsilon, const std::optional<Tensor>& rotation,
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
  return problem;
}

inline RotateQuantizeProblem silu_mul_problem(const Tensor& gate, const Tensor& up,
                                              const std::optional<Tensor>& rotation, int64_t rule) {
  RotateQuantizeProblem problem = quantize_problem(gate, rotation, rule);
  problem.prologue = Prologue::kSiluMul;
  STD_TORCH_CHECK(up.scalar_type() == gate.scalar_type() && check_rows("up", up) == problem.K &&
                      up.numel() == gate.numel(),
                  "up must have the shape and dtype of gate");
  problem.up = up.const_data_ptr();
  return problem;
}

// All but a and out, of a weight that was checked: b, whose K is that of a.
inline MXFP4GemmProblem gemm_problem(int64_t M, const Tensor& b_codes, const Tensor& b_scales,
                                     const std::optional<Tensor>& bias) {
  MXFP4GemmProblem problem{};
  problem.M = M;
  problem.N = b_codes.size(0);
  problem.K = b_codes.size(1) * 2;
  problem.b_codes = static_cast<const uint8_t*>(b_codes.const_data_ptr());
  problem.b_scales = static_cast<const uint8_t*>(b_scales.const_data_ptr());
  if (bias.has_value()) {
    problem.bias_dtype = float_dtype("bias", *bias);
    check_contiguous("bias", *bias);
    STD_TORCH_CHECK(bias->numel() == problem.N, "bias must be [N]");
    problem.bias = bias->const_data_ptr();
  }
  return problem;
}

// The result [..., N] of a linear over x [..., K], uninitialized.
inline Tensor linear_result(const Tensor& x, int64_t N) {
  const auto sizes = x.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  result.back() = N;
  return empty_on_device_of(x, result, x.scalar_type());
}

}  // namespace duqpp
