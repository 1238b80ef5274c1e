// The CUDA kernels of expand_ops.cpp's ops.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/expand.h"
#include "torch/cuda_device.h"
#include "torch/expand_problem.h"

namespace duqpp {
namespace {

using torch::stable::accelerator::DeviceGuard;

using Kernel = void (*)(const ExpandProblem& problem, void* stream);

std::tuple<Tensor, Tensor> launch(const char* op, const Expansion& expansion, const Tensor& codes,
                                  const Tensor& scales, Kernel kernel) {
  check_same_device(op, "codes", codes, codes);
  check_same_device(op, "scales", scales, codes);
  check_aligned(op, "codes", expansion.problem.codes);
  check_aligned(op, "scales", expansion.problem.scales);
  const DeviceGuard guard(codes.get_device_index());
  kernel(expansion.problem, current_stream(codes.get_device_index()));
  return expansion.results();
}

std::tuple<Tensor, Tensor> expand_activation_cuda(const Tensor& codes, const Tensor& scales,
                                                  ScalarType dtype) {
  return launch("expand_activation", prepare_activation_expansion(codes, scales, dtype), codes,
                scales, cuda::expand_activation);
}

std::tuple<Tensor, Tensor> expand_weight_cuda(const Tensor& codes, const Tensor& scales,
                                              int64_t first_row, int64_t rows, ScalarType dtype) {
  return launch("expand_weight", prepare_weight_expansion(codes, scales, first_row, rows, dtype),
                codes, scales, cuda::expand_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(duqpp_native, CUDA, m) {
  m.impl("expand_activation", TORCH_BOX(&expand_activation_cuda));
  m.impl("expand_weight", TORCH_BOX(&expand_weight_cuda));
}

}  // namespace duqpp
