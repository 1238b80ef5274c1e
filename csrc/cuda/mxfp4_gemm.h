// mxfp4_gemm on a GPU: the launch of the kernel that a plan names. Needs no CUDA header, and
// nothing here but `clear_mxfp4_gemm_workspace` and `run_mxfp4_gemm` needs a GPU.
//
// Problems arrive checked (csrc/torch/cuda_ops.cpp): N a multiple of 8, K of 32, both positive and,
// like M, 32-bit integers; codes, scales and out start at multiples of 16 bytes; x is as
// rotate_quantize leaves it, W as select_gemm's architecture reads it (weight_scales_size); out is
// of 16-bit floats.
//
//   plan = select_gemm(M, N, K, arch, sm_count)        kernel_table.h
//   workspace = gemm_workspace_size(plan, M, N) bytes, 16-byte aligned, of the same device
//   clear_mxfp4_gemm_workspace(...)                     anywhere before the next line in the stream
//   run_mxfp4_gemm(...)
#pragma once

#include <cstdint>

#include "cuda/gemm_kernel.h"
#include "problem.h"

namespace duqpp::cuda {

// Whether the build holds the kernel: it may leave out architectures. What follows is for those
// that it holds.
bool has_mxfp4_gemm_kernel(GemmKernel kernel);

int mxfp4_gemm_shared_memory(GemmKernel kernel);  // bytes that a CTA takes

// CUTLASS's own answers for the planned kernel, computed on the host.
bool can_implement_mxfp4_gemm(const MXFP4GemmProblem& problem, const GemmPlan& plan);
int64_t mxfp4_gemm_workspace_size(const MXFP4GemmProblem& problem, const GemmPlan& plan);

// The next two throw std::runtime_error when CUDA or CUTLASS refuses.

// Zeroes the barriers of stream-K, an asynchronous memset that a CUDA graph can capture; nothing
// for other kernels. Queued ahead of rotate_quantize it leaves that kernel and the GEMM adjacent,
// so that the GEMM's start overlaps its end. `stream` is a cudaStream_t.
void clear_mxfp4_gemm_workspace(const MXFP4GemmProblem& problem, const GemmPlan& plan,
                                void* workspace, void* stream);

// One launch on the stream: no allocation, no synchronization, no memset. Nothing if M is 0.
void run_mxfp4_gemm(const MXFP4GemmProblem& problem, const GemmPlan& plan, void* workspace,
                    void* stream);

}  // namespace duqpp::cuda
