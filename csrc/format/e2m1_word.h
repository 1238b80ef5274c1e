// Eight E2M1 codes at once, by float32 additions: for GPUs without the conversion instruction.
#pragma once

#include <math.h>

#include <cstdint>

#include "format/e2m1.h"

namespace duqpp {

// The codes of values[i] * factor, i = 0 in the lowest nibble; each equals encode_e2m1 of that
// product. `factor` is a power of two; no product may be NaN. Without kSaturate, magnitudes are
// below 7.
//
// With m the magnitude of a product and rn rounding to the nearest integer, ties to even,
//   code = min(rn(2 m), 2 + rn(m), 4 + rn(m / 2), 7):
// the grid is 1/2 apart up to 2, 1 up to 4, 2 up to 6, and each of the three overestimates the code
// beyond its part. A float32 in [2^22, 2^23) counts halves, so that adding 2^22 rounds 2 m as rn
// does, ties included, and leaves it in the low bits; the other two lines are the same of half and
// a quarter of m, with their 2 and 4 added as 1 and 2. Products by a power of two are exact, and
// fused, so that a tiny one is not rounded before the sum.
template <bool kSaturate>
DUQPP_HOST_DEVICE uint32_t encode_e2m1_word(const float (&values)[8], float factor) {
  constexpr float kBase = 0x1p22f;
  constexpr uint32_t kBaseBits = float_bits(kBase);
  const float half = 0.5f * factor, quarter = 0.25f * factor;
  uint32_t word = 0;
  for (int i = 7; i >= 0; --i) {
    const float magnitude = fabsf(values[i]);
    const float fine = fmaf(magnitude, factor, kBase);
    const float middle = fmaf(magnitude, half, kBase + 1.0f);
    const float coarse = fmaf(magnitude, quarter, kBase + 2.0f);
    float code = fminf(fminf(fine, middle), coarse);
    if (kSaturate) code = fminf(code, kBase + 3.5f);
    word = (word << 1) | (float_bits(values[i]) >> 31);
    word = (word << 3) + float_bits(code);
  }
  // Each code came with the bits of 2^22; those of i = 3 and above were shifted out.
  return word - (kBaseBits + (kBaseBits << 4) + (kBaseBits << 8));
}

}  // namespace duqpp
