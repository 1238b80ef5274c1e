// The warp policy of rotate_quantize.cuh on a GPU: one lane of a warp, CUTLASS's wrappers, and
// instructions by hand where CUTLASS has none.
#pragma once

#include <cstdint>

#include "cuda/gpu_lanes.cuh"
#include "cuda/rotate_quantize.cuh"
#include "cute/arch/mma_sm80.hpp"
#include "cutlass/arch/grid_dependency_control.h"
#include "cutlass/arch/memory.h"
#include "cutlass/functional.h"
#include "cutlass/numeric_conversion.h"
#include "cutlass/numeric_types.h"
#include "format/e2m1_word.h"
#include "format/fragment.h"
#include "problem.h"

namespace duqpp::cuda {

// The CUTLASS type of a 16-bit dtype.
template <Dtype kDtype>
using Element =
    cute::conditional_t<kDtype == Dtype::kFloat16, cutlass::half_t, cutlass::bfloat16_t>;

struct GpuWarp : GpuLanes {
  // 128 bits where `valid`; otherwise `words` keeps its value. The volatile instruction cannot move
  // above the wait for the kernel before this one, which plain loads may: that wait names no
  // memory.
  static __device__ __forceinline__ void load(Words& words, const void* address, bool valid) {
    cutlass::arch::global_load<Words, sizeof(Words)>(words, address, valid);
  }

  template <Dtype kDtype>
  static __device__ __forceinline__ void unpack(const Words& words, float (&values)[kLaneValues]) {
    using Source = cutlass::Array<Element<kDtype>, kLaneValues>;
    const auto converted = cutlass::NumericArrayConverter<float, Element<kDtype>, kLaneValues>{}(
        reinterpret_cast<const Source&>(words));
    for (int i = 0; i < kLaneValues; ++i) values[i] = converted[i];
  }

  template <Dtype kDtype>
  static __device__ __forceinline__ Words pack(const float (&values)[kLaneValues]) {
    const auto converted = cutlass::NumericArrayConverter<Element<kDtype>, float, kLaneValues>{}(
        reinterpret_cast<const cutlass::Array<float, kLaneValues>&>(values));
    return reinterpret_cast<const Words&>(converted);
  }

  // Hardware exp2 and reciprocal: a few units in the last place of float32, which the rounding to
  // 16 bits that follows hides but for rare ties.
  static __device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

  static __device__ __forceinline__ void mma(const Lanes<MmaA>& a, const Lanes<MmaB>& b,
                                             Lanes<MmaC>& c) {
    const auto& [a0, a1, a2, a3] = a.value.word;
    const auto& [b0, b1] = b.value.word;
    auto& [c0, c1, c2, c3] = c.value.value;
    cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, c0, c1, c2,
                                              c3);
  }

  // Bits of the largest magnitude; NaN wins.
  static __device__ __forceinline__ uint32_t amax_bits(const float (&values)[kLaneValues]) {
    const cutlass::maximum<float, /*PropagateNaN=*/true> maximum;
    float amax = fabsf(values[0]);
    for (int i = 1; i < kLaneValues; ++i) amax = maximum(amax, fabsf(values[i]));
    return float_bits(amax) & 0x7FFFFFFFu;
  }

  // Reductions over the quad that holds a row.
  static __device__ __forceinline__ void quad_max(Lanes<uint32_t>& bits) {
    bits.value = max(bits.value, __shfl_xor_sync(~0u, bits.value, 1));
    bits.value = max(bits.value, __shfl_xor_sync(~0u, bits.value, 2));
  }
  static __device__ __forceinline__ void quad_sum(Lanes<uint32_t>& sum) {
    sum.value += __shfl_xor_sync(~0u, sum.value, 1);
    sum.value += __shfl_xor_sync(~0u, sum.value, 2);
  }

  // Sum over the warp, the same in every lane.
  static __device__ __forceinline__ float tree_sum(const Lanes<float>& sum) {
    float total = sum.value;
    for (int distance = 16; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(~0u, total, distance);
    }
    return total;
  }

  // Eight codes of values * factor, the lowest column in the lowest nibble.
  template <bool kSaturate>
  static __device__ __forceinline__ uint32_t encode(const float (&values)[kLaneValues],
                                                    float factor) {
#if defined(CUDA_PTX_FP4FP6_CVT_ENABLED)
    cutlass::Array<float, kLaneValues> scaled;
    for (int i = 0; i < kLaneValues; ++i) scaled[i] = values[i] * factor;
    const auto codes =
        cutlass::NumericArrayConverter<cutlass::float_e2m1_t, float, kLaneValues>{}(scaled);
    return reinterpret_cast<const uint32_t&>(codes);
#else
    return encode_e2m1_word<kSaturate>(values, factor);
#endif
  }
};

}  // namespace duqpp::cuda
