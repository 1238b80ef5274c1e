#include "cuda/mxfp4_gemm.h"

#include "cuda/mxfp4_gemm_instance.h"

namespace duqpp::cuda {

// Weak: their address is null where the build leaves out the architecture.
#define DUQPP_DECLARE_WEAK(identifier, ...) \
  extern const GemmInstance k##identifier __attribute__((weak));
DUQPP_GEMM_KERNELS(DUQPP_DECLARE_WEAK)
#undef DUQPP_DECLARE_WEAK

namespace {

const GemmInstance* instance(GemmKernel kernel) {
#define DUQPP_ADDRESS(identifier, ...) &k##identifier,
  static const GemmInstance* const instances[] = {DUQPP_GEMM_KERNELS(DUQPP_ADDRESS)};
#undef DUQPP_ADDRESS
  return instances[static_cast<size_t>(kernel)];
}

}  // namespace

bool has_mxfp4_gemm_kernel(GemmKernel kernel) { return instance(kernel) != nullptr; }

int mxfp4_gemm_shared_memory(GemmKernel kernel) { return instance(kernel)->shared_memory; }

bool can_implement_mxfp4_gemm(const MXFP4GemmProblem& problem, const GemmPlan& plan) {
  return instance(plan.kernel)->can_implement(problem, plan);
}

int64_t mxfp4_gemm_workspace_size(const MXFP4GemmProblem& problem, const GemmPlan& plan) {
  return instance(plan.kernel)->workspace_size(problem, plan);
}

void clear_mxfp4_gemm_workspace(const MXFP4GemmProblem& problem, const GemmPlan& plan,
                                void* workspace, void* stream) {
  if (problem.M == 0) return;
  instance(plan.kernel)->clear_workspace(problem, plan, workspace, stream);
}

void run_mxfp4_gemm(const MXFP4GemmProblem& problem, const GemmPlan& plan, void* workspace,
                    void* stream) {
  if (problem.M == 0) return;
  instance(plan.kernel)->run(problem, plan, workspace, stream);
}

}  // namespace duqpp::cuda
