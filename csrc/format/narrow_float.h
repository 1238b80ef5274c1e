// bfloat16 and float16 as bits, to and from float32: rounding to nearest even, one quiet NaN each.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace duqpp {

inline constexpr uint32_t kQuietNanBits = 0x7FC00000u;

DUQPP_HOST_DEVICE constexpr bool is_nan_bits(uint32_t bits) {
  return (bits & 0x7FFFFFFFu) > 0x7F800000u;
}

DUQPP_HOST_DEVICE constexpr float decode_bfloat16(uint16_t half) {
  return float_from_bits(static_cast<uint32_t>(half) << 16);
}

DUQPP_HOST_DEVICE constexpr uint16_t encode_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if (is_nan_bits(bits)) return kQuietNanBits >> 16;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

DUQPP_HOST_DEVICE constexpr float decode_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_from_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // A float with the half's fields, 112 exponents too low; the product with 2^112 is exact, and it
  // turns a subnormal half into a normal float.
  const float value = float_from_bits(magnitude << 13) * 0x1p112f;
  return sign ? -value : value;
}

DUQPP_HOST_DEVICE constexpr uint16_t encode_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (is_nan_bits(bits)) return 0x7E00u;
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // from 2^16
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which is the ulp of 0.5
    const uint32_t rounded = float_bits(float_from_bits(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (rounded - 0x3F000000u));
  }
  // Exponents move down by 112; a carry out of the largest half lands on infinity.
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}
static_assert(encode_bfloat16(1.00390625f) == 0x3F80 && encode_bfloat16(1.01171875f) == 0x3F82 &&
              decode_bfloat16(0xC040) == -3.0f);
static_assert(encode_float16(65519.0f) == 0x7BFF && encode_float16(65520.0f) == 0x7C00 &&
              encode_float16(0x1p-25f) == 0 && encode_float16(0x1.8p-24f) == 2 &&
              encode_float16(-1.0f) == 0xBC00 && decode_float16(0x0001) == 0x1p-24f &&
              decode_float16(0x7BFF) == 65504.0f);

}  // namespace duqpp
