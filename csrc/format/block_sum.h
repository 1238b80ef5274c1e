// How mxfp4_gemm adds up an output: the meaning that the CPU and the CUDA kernels share bit for
// bit.
//
// In float32, every step rounded once to nearest even:
//   for each segment along K: sum = 0; for each of its blocks, in order:
//     sum = round(sum + d 2^(ea - 127) 2^(eb - 127))
//   total = 0; for each segment, in order: total = round(total + its sum)
// where d is the exact dot product of the 32 E2M1 values of a block, and a segment is
// kSegmentBlocks blocks, fewer in the last. Segments are what a product may be divided into along K
// without a change of the result.
#pragma once

#include <cmath>

#include "format/host_device.h"

namespace duqpp {

inline constexpr int kSegmentBlocks = 16;  // 512 columns

// sum + d 2^(ea - 127) 2^(eb - 127), rounded once to float32. quadruple_dot = 4 d is an integer,
// a_scale = 2^(ea - 127) / 4 and b_scale = 2^(eb - 127), all exact (a NaN scale is a NaN), and
// their product with the sum is one fused multiply-add.
DUQPP_HOST_DEVICE float add_block_product(float sum, int32_t quadruple_dot, float a_scale,
                                          float b_scale) {
  const float dot = static_cast<float>(quadruple_dot);
  if (!(a_scale >= 0x1p105f)) return fmaf(dot * a_scale, b_scale, sum);
  // |4 d| is below 2^13, so that dot * a_scale may overflow though the sum does not: 2^32 changes
  // sides. Where b_scale cannot take it, a d other than 0 gives 2^200 or more, as 2^127 still does.
  const float raised = b_scale >= 0x1p95f ? 0x1p127f : b_scale * 0x1p32f;
  return fmaf(dot * (a_scale * 0x1p-32f), raised, sum);
}

}  // namespace duqpp
