// The qualifiers of functions that call a warp policy: one lane on a GPU, 32 in a loop on the host.
#pragma once

#include "format/host_device.h"

#if defined(__CUDACC__)
#define DUQPP_WARP_PROGRAM __device__ __forceinline__
#define DUQPP_UNROLL _Pragma("unroll")
#define DUQPP_NO_UNROLL _Pragma("unroll 1")
#else
#define DUQPP_WARP_PROGRAM inline
#define DUQPP_UNROLL
#define DUQPP_NO_UNROLL
#endif

namespace duqpp::cuda {

// One rounding each: nvcc fuses a product and a sum that it can see.
DUQPP_WARP_PROGRAM float multiply_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

DUQPP_WARP_PROGRAM float add_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

}  // namespace duqpp::cuda
