// The CUDA kernel of gptq_block_ops.cpp's op.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/gptq_block.h"
#include "torch/cuda_device.h"
#include "torch/gptq_block_problem.h"

namespace duqpp {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kOp = "gptq_block";

GptqBlockResults gptq_block_cuda(const Tensor& values, std::optional<Tensor> factor, int64_t rule) {
  check_same_device(kOp, "values", values, values);
  if (factor.has_value()) check_same_device(kOp, "factor", *factor, values);
  const DeviceGuard guard(values.get_device_index());
  const GptqBlock block = prepare_gptq_block(values, factor, rule);
  check_aligned(kOp, "values", block.problem.values);
  check_aligned(kOp, "factor", block.problem.factor);
  cuda::gptq_block(block.problem, current_stream(values.get_device_index()));
  return block.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(duqpp_native, CUDA, m) {
  m.impl("gptq_block", TORCH_BOX(&gptq_block_cuda));
}

}  // namespace duqpp
