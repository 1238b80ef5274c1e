// The qualifier of functions that run on the host and on a GPU, and the bits of a float on both.
//
// Such a function is always inlined: the CPU kernels compile the same headers once per instruction
// set, and of equal out-of-line copies the linker keeps one, which might be the copy for a better
// CPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DUQPP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DUQPP_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace duqpp {

DUQPP_HOST_DEVICE constexpr uint32_t float_bits(float value) {
  return __builtin_bit_cast(uint32_t, value);
}

DUQPP_HOST_DEVICE constexpr float float_from_bits(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

}  // namespace duqpp
