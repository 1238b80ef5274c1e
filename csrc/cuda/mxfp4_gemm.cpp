#include "cuda/mxfp4_gemm.h"

#include <array>

#include "cuda/mxfp4_gemm_instance.h"

namespace duqpp::cuda {

// Weak: their address is null where the build leaves out the architecture.
extern const GemmInstance kSm100Swapped __attribute__((weak));
extern const GemmInstance kSm100SwappedStreamK __attribute__((weak));
extern const GemmInstance kSm100Tile256x128 __attribute__((weak));
extern const GemmInstance kSm100Tile256x192 __attribute__((weak));
extern const GemmInstance kSm100Tile256x256 __attribute__((weak));
extern const GemmInstance kSm120Tile128x128 __attribute__((weak));
extern const GemmInstance kSm80Tile16x8 __attribute__((weak));
extern const GemmInstance kSm80Tile32x8 __attribute__((weak));
extern const GemmInstance kSm80Tile64x8 __attribute__((weak));
extern const GemmInstance kSm80Tile16x16 __attribute__((weak));
extern const GemmInstance kSm80Tile32x16 __attribute__((weak));
extern const GemmInstance kSm80Tile64x16 __attribute__((weak));
extern const GemmInstance kSm80Tile32x32 __attribute__((weak));

namespace {

const GemmInstance* instance(GemmKernel kernel) {
  static const std::array<const GemmInstance*, kGemmKernels> instances = {
      &kSm100Swapped,     &kSm100SwappedStreamK, &kSm100Tile256x128, &kSm100Tile256x192,
      &kSm100Tile256x256, &kSm120Tile128x128,    &kSm80Tile16x8,     &kSm80Tile32x8,
      &kSm80Tile64x8,     &kSm80Tile16x16,       &kSm80Tile32x16,    &kSm80Tile64x16,
      &kSm80Tile32x32,
  };
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
