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
