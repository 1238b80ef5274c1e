#include "cuda/mxfp4_gemm.h"

#include <array>
#include <limits>

#include "cuda/mxfp4_gemm_instance.h"
#include "format/mx_block.h"
#include "format/scale_layout.h"
#include "format/weight_fragment.h"

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

std::string refusal(const char* argument, const std::string& expected, const std::string& got) {
  return std::string("mxfp4_gemm: ") + argument + " must " + expected + ", got " + got;
}

std::string check_alignment(const char* argument, const void* pointer, uintptr_t alignment) {
  const uintptr_t remainder = reinterpret_cast<uintptr_t>(pointer) % alignment;
  if (remainder == 0) return {};
  return refusal(argument, "start at a multiple of " + std::to_string(alignment) + " bytes",
                 "an address " + std::to_string(remainder) + " bytes past one");
}

std::string check_scales(const char* argument, int64_t rows, int64_t K, int64_t size) {
  const int64_t expected = swizzled_size(rows, K / kBlockSize);
  if (size >= expected) return {};
  return refusal(argument,
                 "hold " + std::to_string(expected) + " bytes (swizzled, padding included)",
                 std::to_string(size));
}

std::string check_weight_scales(int64_t N, int64_t K, int64_t size, WeightLayout layout) {
  if (layout == WeightLayout::kSwizzledScales) return check_scales("b.scales", N, K, size);
  const int64_t expected = fragment_scales_size(N, K);
  if (size == expected) return {};
  return refusal("b.scales", "hold " + std::to_string(expected) + " bytes (fragment order)",
                 std::to_string(size));
}

}  // namespace

std::string check_mxfp4_gemm(const MXFP4GemmProblem& problem, int64_t a_scales_size,
                             int64_t b_scales_size, WeightLayout layout) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // CUTLASS holds sizes as int
  const auto [M, N, K] = std::array<int64_t, 3>{problem.M, problem.N, problem.K};
  const std::string range = " and at most " + std::to_string(kMost);
  if (M < 0 || M > kMost) return refusal("a", "have at least 0 rows" + range, std::to_string(M));
  if (N <= 0 || N > kMost || N % 8) {
    // TMA stores rows of out in units of 16 bytes.
    return refusal("b", "have a multiple of 8 rows, at least 8" + range,
                   std::to_string(N) + "; pad the weight with zero rows");
  }
  if (K <= 0 || K > kMost || K % kBlockSize) {
    return refusal("K", "be a multiple of 32, at least 32" + range, std::to_string(K));
  }
  if (problem.out_dtype == Dtype::kFloat32) {
    return refusal("out_dtype", "be bfloat16 or float16 on this device", "float32");
  }

  const uintptr_t bias_alignment = problem.bias_dtype == Dtype::kFloat32 ? 4 : 2;
  for (const std::string& message : {
           check_alignment("a.codes", problem.a_codes, 16),
           check_alignment("a.scales", problem.a_scales, 16),
           check_alignment("b.codes", problem.b_codes, 16),
           check_alignment("b.scales", problem.b_scales, 16),
           check_alignment("bias", problem.bias, bias_alignment),
           check_alignment("out", problem.out, 16),
           check_scales("a.scales", M, K, a_scales_size),
           check_weight_scales(N, K, b_scales_size, layout),
       }) {
    if (!message.empty()) return message;
  }
  return {};
}

bool has_mxfp4_gemm_kernel(GemmKernel kernel) { return instance(kernel) != nullptr; }

int mxfp4_gemm_shared_memory(GemmKernel kernel) { return instance(kernel)->shared_memory; }

bool can_implement_mxfp4_gemm(const MXFP4GemmProblem& problem, const GemmPlan& plan) {
  return instance(plan.kernel)->can_implement(problem, plan);
}

int64_t mxfp4_gemm_workspace_size(const MXFP4GemmProblem& problem, const GemmPlan& plan) {
  return instance(plan.kernel)->workspace_size(problem, plan);
}

std::string clear_mxfp4_gemm_workspace(const MXFP4GemmProblem& problem, const GemmPlan& plan,
                                       void* workspace, void* stream) {
  if (problem.M == 0) return {};
  return instance(plan.kernel)->clear_workspace(problem, plan, workspace, stream);
}

std::string run_mxfp4_gemm(const MXFP4GemmProblem& problem, const GemmPlan& plan, void* workspace,
                           void* stream) {
  if (problem.M == 0) return {};
  return instance(plan.kernel)->run(problem, plan, workspace, stream);
}

}  // namespace duqpp::cuda
