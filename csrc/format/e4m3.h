// E4M3, the 8-bit float of tensor cores (torch.float8_e4m3fn): bias 7, subnormals in steps of 2^-9,
// largest 448, NaN 0x7F, no infinity. Source: OCP 8-bit Floating Point v1.0, table 2.
#pragma once

#include <cstdint>

#include "format/narrow_float.h"

namespace duqpp {

inline constexpr uint32_t kE4M3Nan = 0x7F;

// Rounds to nearest even; magnitudes that round above 448 become NaN.
DUQPP_HOST_DEVICE constexpr uint8_t encode_e4m3(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x44000000u) return static_cast<uint8_t>(sign | kE4M3Nan);  // 512, infinity, NaN
  if (magnitude < 0x3C800000u) {  // below 2^-6: a multiple of 2^-9, which is the ulp of 2^14
    const uint32_t rounded = float_bits(float_from_bits(magnitude) + 0x1p14f);
    return static_cast<uint8_t>(sign | (rounded - 0x46800000u));
  }
  // Exponents move down by 120. What rounds to 480 has the bits of NaN already.
  const uint32_t rounded = magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u) - (120u << 23);
  const uint32_t code = rounded >> 20;
  return static_cast<uint8_t>(sign | (code < kE4M3Nan ? code : kE4M3Nan));
}

DUQPP_HOST_DEVICE constexpr float decode_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7Fu;
  if (magnitude == kE4M3Nan) return float_from_bits(kQuietNanBits);
  // A float with the code's fields, 120 exponents too low: 2^120 turns a subnormal into a number.
  const float value = float_from_bits(magnitude << 20) * 0x1p120f;
  return (code & 0x80u) ? -value : value;
}
static_assert(encode_e4m3(448.0f) == 0x7E && encode_e4m3(465.0f) == kE4M3Nan &&
              encode_e4m3(0x1p-9f) == 1 && encode_e4m3(0x1p-10f) == 0 &&
              encode_e4m3(0x1.8p-9f) == 2 && encode_e4m3(-1.0f) == 0xB8);
static_assert(decode_e4m3(0x7E) == 448.0f && decode_e4m3(0x81) == -0x1p-9f &&
              decode_e4m3(0x08) == 0x1p-6f);

}  // namespace duqpp
