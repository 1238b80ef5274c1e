// Quantize and dequantize one block of 32 values: what every backend must equal, byte for byte.
#pragma once

#include <cstdint>

#include "format/e2m1.h"
#include "format/e8m0.h"

namespace duqpp {

inline constexpr int kBlockSize = 32;  // OCP MX v1.0, section 5.2

// Bits of the largest magnitude of a block. NaN wins: its bits exceed those of every number.
DUQPP_HOST_DEVICE constexpr uint32_t block_amax_bits(const float (&values)[kBlockSize]) {
  uint32_t amax = 0;
  for (int i = 0; i < kBlockSize; ++i) {
    const uint32_t magnitude = float_bits(values[i]) & 0x7FFFFFFFu;
    amax = amax > magnitude ? amax : magnitude;
  }
  return amax;
}

// The error that one value adds when its block's exponent is one above floor's, less what it adds
// at floor's: (high - scaled)^2 - (low - scaled)^2 with `scaled` in floor's units and low, high the
// values that it rounds to. Factored, each term fits 33 bits, so that a double sum of 32 of them is
// exact in any order and equal errors are seen to be equal.
DUQPP_HOST_DEVICE constexpr double error_change(float scaled) {
  const double low = round_to_e2m1(scaled);
  const double high = 2.0f * round_to_e2m1(0.5f * scaled);
  return (high - low) * (high + low - 2.0 * static_cast<double>(scaled));
}

// The scale byte of a block under a rule.
DUQPP_HOST_DEVICE constexpr uint32_t block_scale(const float (&values)[kBlockSize],
                                                 ScaleRule rule) {
  const uint32_t exponent = scale_exponent(block_amax_bits(values), scale_addend(rule));
  if (rule != ScaleRule::kMse || exponent == kNanScale) return exponent;
  const float factor = inverse_scale(exponent);
  double change = 0;
  for (int i = 0; i < kBlockSize; ++i) change += error_change(values[i] * factor);
  return change < 0 ? exponent + 1 : exponent;
}

// Writes the 16 code bytes of a block and returns its scale byte.
DUQPP_HOST_DEVICE constexpr uint8_t quantize_block(const float (&values)[kBlockSize],
                                                   ScaleRule rule, uint8_t* codes) {
  const uint32_t scale = block_scale(values, rule);
  const float factor = inverse_scale(scale);
  for (int i = 0; i < kBlockSize; i += 2) {
    codes[i / 2] = pack_e2m1(encode_e2m1(values[i] * factor), encode_e2m1(values[i + 1] * factor));
  }
  return static_cast<uint8_t>(scale);
}

}  // namespace duqpp
