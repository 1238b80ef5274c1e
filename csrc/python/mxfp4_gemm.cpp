#include "python/mxfp4_gemm.h"

#include <dlfcn.h>

#include "cuda/device_info.h"
#include "cuda/mxfp4_gemm.h"

namespace duqpp::python {

namespace py = pybind11;
using namespace py::literals;

namespace {

// A problem whose pointers are aligned and never read.
MXFP4GemmProblem problem_of_shape(int64_t M, int64_t N, int64_t K) {
  uint8_t* const anywhere = reinterpret_cast<uint8_t*>(uintptr_t{256});
  MXFP4GemmProblem problem{};
  problem.M = M;
  problem.N = N;
  problem.K = K;
  problem.a_codes = problem.a_scales = problem.b_codes = problem.b_scales = anywhere;
  problem.out = anywhere;
  return problem;
}

// The plan, if this build holds its kernel.
const cuda::GemmPlan& built(const cuda::GemmPlan& plan) {
  if (cuda::has_mxfp4_gemm_kernel(plan.kernel)) return plan;
  throw py::value_error(std::string(cuda::gemm_kernel_info(plan.kernel).name) +
                        " is not in this build");
}

}  // namespace

void bind_mxfp4_gemm(py::module_& module) {
  module.def(
      "has_mxfp4_gemm_kernel",
      [](const cuda::GemmPlan& plan) { return cuda::has_mxfp4_gemm_kernel(plan.kernel); }, "plan"_a,
      "Whether this build holds the plan's kernel.");
  module.def(
      "can_implement_mxfp4_gemm",
      [](const cuda::GemmPlan& plan, int64_t M, int64_t N, int64_t K) {
        return cuda::can_implement_mxfp4_gemm(problem_of_shape(M, N, K), built(plan));
      },
      "plan"_a, "M"_a, "N"_a, "K"_a, "CUTLASS's answer for the plan's kernel.");
  module.def(
      "mxfp4_gemm_workspace_size",
      [](const cuda::GemmPlan& plan, int64_t M, int64_t N, int64_t K) {
        return cuda::mxfp4_gemm_workspace_size(problem_of_shape(M, N, K), built(plan));
      },
      "plan"_a, "M"_a, "N"_a, "K"_a, "CUTLASS's answer for the plan's kernel, in bytes.");
  module.def(
      "mxfp4_gemm_shared_memory",
      [](const cuda::GemmPlan& plan) { return cuda::mxfp4_gemm_shared_memory(built(plan).kernel); },
      "plan"_a, "Bytes of shared memory that a CTA of the plan's kernel takes.");
  module.def(
      "cuda_versions",
      [] {
        const cuda::CudaVersions versions = cuda::cuda_versions();
        return py::make_tuple(versions.runtime, versions.driver);
      },
      "Of the CUDA runtime in this library, and the newest that the driver serves (0: no driver): "
      "1000 x major + 10 x minor. Builds without CUDA lack this function.");
  module.def(
      "cuda_library",
      [] {
        Dl_info info{};
        dladdr(reinterpret_cast<const void*>(&cuda::run_mxfp4_gemm), &info);
        return std::string(info.dli_fname);
      },
      "Path of the shared library that holds the CUDA kernels.");
}

}  // namespace duqpp::python
