// The problem of gptq_block from tensors, and where its results go.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "torch/allocate.h"
#include "torch/checks.h"

namespace duqpp {

using GptqBlockResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// A block that is ready to be rounded: checked, and its results allocated.
struct GptqBlock {
  GptqBlockProblem problem;
  Tensor codes, scales, compensated, rounded;

  GptqBlockResults results() const { return {codes, scales, compensated, rounded}; }
};

// A float32 matrix [rows, 32], contiguous.
inline void check_columns(const char* name, const Tensor& tensor, int64_t rows) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  check_contiguous(name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == kBlockSize, name,
                  " must be [", rows, ", 32]");
}

inline GptqBlock prepare_gptq_block(const Tensor& values, const std::optional<Tensor>& factor,
                                    int64_t rule) {
  GptqBlock block{};
  GptqBlockProblem& problem = block.problem;
  STD_TORCH_CHECK(rule >= 0 && rule <= 3, "rule must be 0 (floor) to 3 (mse)");
  problem.rule = static_cast<ScaleRule>(rule);
  problem.rows = values.size(0);
  check_columns("values", values, problem.rows);
  problem.values = static_cast<const float*>(values.const_data_ptr());
  if (factor.has_value()) {
    check_columns("factor", *factor, kBlockSize);
    problem.factor = static_cast<const float*>(factor->const_data_ptr());
  }
  block.codes = empty_on_device_of(values, {problem.rows, kBlockSize / 2}, ScalarType::Byte);
  block.scales = empty_on_device_of(values, {problem.rows}, ScalarType::Byte);
  block.compensated = torch::stable::empty_like(values);
  block.rounded = torch::stable::empty_like(values);
  problem.codes = static_cast<uint8_t*>(block.codes.mutable_data_ptr());
  problem.scales = static_cast<uint8_t*>(block.scales.mutable_data_ptr());
  problem.compensated = static_cast<float*>(block.compensated.mutable_data_ptr());
  problem.rounded = static_cast<float*>(block.rounded.mutable_data_ptr());
  return block;
}

}  // namespace duqpp
