// One instantiation of mxfp4_gemm, as the functions that the dispatcher calls.
#pragma once

#include <cstdint>

#include "cuda/gemm_kernel.h"
#include "problem.h"

namespace duqpp::cuda {

// `stream` is a cudaStream_t. What CUDA or CUTLASS refuses is a std::runtime_error.
struct GemmInstance {
  int shared_memory;  // bytes that a CTA takes
  bool (*can_implement)(const MXFP4GemmProblem&, const GemmPlan&);
  int64_t (*workspace_size)(const MXFP4GemmProblem&, const GemmPlan&);
  void (*clear_workspace)(const MXFP4GemmProblem&, const GemmPlan&, void* workspace, void* stream);
  void (*run)(const MXFP4GemmProblem&, const GemmPlan&, void* workspace, void* stream);
};

// Each in a source of its own, but for those of sm_80, which share one.
#define DUQPP_DECLARE(identifier, ...) extern const GemmInstance k##identifier;
DUQPP_GEMM_KERNELS(DUQPP_DECLARE)
#undef DUQPP_DECLARE

}  // namespace duqpp::cuda
