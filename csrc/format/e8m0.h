// E8M0, the block scale of MXFP4: a byte e means 2^(e - 127), 255 is NaN; and the rules that choose
// it from a block's largest magnitude. Source: OCP MX v1.0, section 5.4.1.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace duqpp {

// How the largest magnitude of a block becomes its exponent; duqpp/format/e8m0.py says each in full.
enum class ScaleRule : int32_t { kFloor = 0, kEven = 1, kCeil = 2, kMse = 3 };

inline constexpr uint32_t kNanScale = 255;
inline constexpr uint32_t kInfinityBits = 0x7F800000u;

// Added to the bits of amax so that its exponent field steps up where the rule says: where the
// significand reaches 1.75 (even: 2^23 - 0x600000) or just exceeds 1.5 (ceil: 2^22 - 1). The
// two-exponent rule mse starts from floor's exponent.
DUQPP_HOST_DEVICE constexpr uint32_t scale_addend(ScaleRule rule) {
  return rule == ScaleRule::kEven ? 0x200000u : rule == ScaleRule::kCeil ? 0x3FFFFFu : 0u;
}

// The biased exponent max(0, ((amax_bits + addend) >> 23) - 2): 0 for a block of zeros, 255 where
// amax is infinite or NaN, at most 253 otherwise. `amax_bits` has its sign bit clear.
DUQPP_HOST_DEVICE constexpr uint32_t scale_exponent(uint32_t amax_bits, uint32_t addend) {
  const uint32_t exponent = (amax_bits + addend) >> 23;
  const uint32_t biased = exponent < 2u ? 0u : exponent - 2u;
  return amax_bits >= kInfinityBits ? kNanScale : biased;
}

// The exact factor 2^(127 - e) that brings a block onto the E2M1 grid, always a normal number.
// For e = 255 it is that of 253: the block is NaN and its codes carry no meaning.
DUQPP_HOST_DEVICE constexpr float inverse_scale(uint32_t exponent) {
  return float_from_bits((254u - (exponent < 253u ? exponent : 253u)) << 23);
}

// The value of a scale byte: 2^(e - 127), a subnormal for e = 0; NaN for 255.
DUQPP_HOST_DEVICE constexpr float decode_e8m0(uint32_t exponent) {
  return float_from_bits(exponent == 0          ? 0x00400000u
                         : exponent == kNanScale ? 0x7FC00000u
                                                 : exponent << 23);
}
static_assert(scale_exponent(float_bits(6.0f), 0) == 127 && decode_e8m0(127) == 1.0f &&
              scale_exponent(float_bits(7.0f), scale_addend(ScaleRule::kEven)) == 128 &&
              scale_exponent(float_bits(6.0f), scale_addend(ScaleRule::kCeil)) == 127 &&
              scale_exponent(float_bits(7.0f), scale_addend(ScaleRule::kCeil)) == 128);

}  // namespace duqpp
