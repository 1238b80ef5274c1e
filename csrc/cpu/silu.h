// silu(x) = x / (1 + exp(-x)) in float32 without library calls: plain multiplications and
// additions, so that it vectorizes, and has the same bytes on every instruction set.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace duqpp::cpu {

// exp(x) within 2 units in the last place, for x in [-87, 88.3]; below, that of -87; above,
// infinity. exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2; ln 2 is split in two
// so that r is nearly exact; exp(r) is its Taylor series to r^7 / 7!, whose first dropped term is
// below 6e-9.
DUQPP_HOST_DEVICE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;      // written so that a NaN stays a NaN
  x = x > 89.0f ? 89.0f : x;        // n = 128, whose exponent is that of infinity
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const float shifted = x * 1.44269504f + shift;
  const float n = shifted - shift;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float series = 1.0f / 5040.0f;
  series = series * r + 1.0f / 720.0f;
  series = series * r + 1.0f / 120.0f;
  series = series * r + 1.0f / 24.0f;
  series = series * r + 1.0f / 6.0f;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const uint32_t exponent = float_bits(shifted) - float_bits(shift) + 127u;
  return series * float_from_bits(exponent << 23);
}

DUQPP_HOST_DEVICE float silu(float x) { return x / (1.0f + fast_exp(-x)); }

}  // namespace duqpp::cpu
