// GPTQ's inner loop as a torch op (namespace duqpp_native), and its CPU kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/gptq_block.h"
#include "torch/gptq_block_problem.h"

namespace duqpp {
namespace {

void torch_parallel_for(int64_t tasks, int64_t grain, const cpu::ParallelBody& body) {
  torch::stable::parallel_for(0, tasks, grain, body);
}

GptqBlockResults gptq_block_cpu(const Tensor& values, std::optional<Tensor> factor, int64_t rule) {
  const GptqBlock block = prepare_gptq_block(values, factor, rule);
  cpu::gptq_block(block.problem, torch_parallel_for);
  return block.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(duqpp_native, m) {
  m.def(
      "gptq_block(Tensor values, Tensor? factor, int rule) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(duqpp_native, CPU, m) {
  m.impl("gptq_block", TORCH_BOX(&gptq_block_cpu));
}

}  // namespace duqpp
