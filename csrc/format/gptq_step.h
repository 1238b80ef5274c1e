// One column of GPTQ's inner loop (duqpp/ops/gptq_block.py), for one row: every operation rounds to
// float32 by itself, so that every device computes the same bytes.
#pragma once

#include <cstdint>

#include "format/e2m1.h"
#include "format/host_device.h"

namespace duqpp {

// a b and a - b, not fused with what they are part of. On the host -ffp-contract=off sees to that.
DUQPP_HOST_DEVICE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
DUQPP_HOST_DEVICE float rounded_difference(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

struct GptqStep {
  uint32_t code;
  float rounded, error;  // what the code means under the scale; value - rounded
};

// `inverse` is the inverse of `scale`, as format/e8m0.h has it.
DUQPP_HOST_DEVICE GptqStep gptq_step(float value, float scale, float inverse) {
  const float scaled = rounded_product(value, inverse);
  const float rounded = rounded_product(round_to_e2m1(scaled), scale);
  return {encode_e2m1(scaled), rounded, rounded_difference(value, rounded)};
}

// A later column's value once an earlier column's error is fed into it.
DUQPP_HOST_DEVICE float gptq_feed(float value, float error, float factor) {
  return rounded_difference(value, rounded_product(error, factor));
}

}  // namespace duqpp
