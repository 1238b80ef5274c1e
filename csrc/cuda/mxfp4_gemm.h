// mxfp4_gemm on a GPU: argument checks, and the launch of the kernel that a plan names. Needs
// no CUDA header, and nothing here but `clear_workspace` and `run` needs a GPU.
//
//   plan = select_gemm(M, N, K, arch, sm_count)        kernel_table.h
//   workspace = gemm_workspace_size(plan, M, N) bytes, 16-byte aligned, of the same device
//   clear_mxfp4_gemm_workspace(...)                     anywhere before the next line in the stream
//   run_mxfp4_gemm(...)
#pragma once

#include <cstdint>
#include <string>

#include "cuda/gemm_kernel.h"
#include "problem.h"

namespace duqpp::cuda {

// How a kernel reads W: row-major codes and swizzled scales, or both in fragment order
// (format/weight_fragment.h). x is always as rotate_quantize leaves it.
enum class WeightLayout : int32_t { kSwizzledScales = 0, kFragments = 1 };

constexpr WeightLayout weight_layout(int arch) {
  return arch >= 80 && arch <= 90 ? WeightLayout::kFragments : WeightLayout::kSwizzledScales;
}

// Why the kernels of gemm_kernel.h cannot compute the problem, naming the argument and what it
// should be, or an empty string. `*_scales_size` are the bytes behind the scale pointers.
std::string check_mxfp4_gemm(const MXFP4GemmProblem& problem, int64_t a_scales_size,
                             int64_t b_scales_size, WeightLayout layout);

// Whether the build holds the kernel: it may leave out architectures. What follows is for those
// that it holds.
bool has_mxfp4_gemm_kernel(GemmKernel kernel);

int mxfp4_gemm_shared_memory(GemmKernel kernel);  // bytes that a CTA takes

// CUTLASS's own answers for the planned kernel, computed on the host.
bool can_implement_mxfp4_gemm(const MXFP4GemmProblem& problem, const GemmPlan& plan);
int64_t mxfp4_gemm_workspace_size(const MXFP4GemmProblem& problem, const GemmPlan& plan);

// Zeroes the barriers of stream-K, an asynchronous memset that a CUDA graph can capture; nothing
// for other kernels. Queued ahead of rotate_quantize it leaves that kernel and the GEMM adjacent,
// so that the GEMM's start overlaps its end. `stream` is a cudaStream_t. Returns why it failed, or
// an empty string.
std::string clear_mxfp4_gemm_workspace(const MXFP4GemmProblem& problem, const GemmPlan& plan,
                                       void* workspace, void* stream);

// One launch on the stream: no allocation, no synchronization, no memset. Nothing if M is 0.
// Returns why it failed, or an empty string.
std::string run_mxfp4_gemm(const MXFP4GemmProblem& problem, const GemmPlan& plan, void* workspace,
                           void* stream);

}  // namespace duqpp::cuda
