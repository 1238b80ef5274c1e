// MXFP4 matrices in a wider format as torch ops (namespace duqpp_native), and their CPU kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/expand.h"
#include "torch/expand_problem.h"

namespace duqpp {
namespace {

void torch_parallel_for(int64_t tasks, int64_t grain, const cpu::ParallelBody& body) {
  torch::stable::parallel_for(0, tasks, grain, body);
}

std::tuple<Tensor, Tensor> expand_activation_cpu(const Tensor& codes, const Tensor& scales,
                                                 ScalarType dtype) {
  const Expansion expansion = prepare_activation_expansion(codes, scales, dtype);
  cpu::expand_activation(expansion.problem, torch_parallel_for);
  return expansion.results();
}

std::tuple<Tensor, Tensor> expand_weight_cpu(const Tensor& codes, const Tensor& scales,
                                             int64_t first_row, int64_t rows, ScalarType dtype) {
  const Expansion expansion = prepare_weight_expansion(codes, scales, first_row, rows, dtype);
  cpu::expand_weight(expansion.problem, torch_parallel_for);
  return expansion.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(duqpp_native, m) {
  m.def("expand_activation(Tensor codes, Tensor scales, ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "expand_weight(Tensor codes, Tensor scales, int first_row, int rows, ScalarType dtype) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(duqpp_native, CPU, m) {
  m.impl("expand_activation", TORCH_BOX(&expand_activation_cpu));
  m.impl("expand_weight", TORCH_BOX(&expand_weight_cpu));
}

}  // namespace duqpp
