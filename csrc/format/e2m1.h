// E2M1, the 4-bit element of MXFP4: code = sign << 3 | index of the magnitude in
// {0, 0.5, 1, 1.5, 2, 3, 4, 6}. Source: OCP MX v1.0, section 5.3.3.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace duqpp {

// Rounds a value, already divided by its block scale, to the nearest E2M1 code: ties go to the even
// code, magnitudes above 6 saturate, -0 keeps its sign. Equals cvt.rn.satfinite.e2m1x2.f32 for
// every value that is not a NaN; a NaN's code has no meaning, because its block's scale says NaN.
//
// From 1 upwards a code is the float's exponent and first mantissa bit, so that rounding to nearest
// even is integer arithmetic on the bits; below 1 the grid is {0, 0.5, 1}, with ties at 0.25
// (down, to code 0) and 0.75 (up, to code 2).
DUQPP_HOST_DEVICE constexpr uint32_t encode_e2m1(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 28) & 8u;
  const uint32_t rounded = magnitude + 0x1FFFFFu + ((magnitude >> 22) & 1u);
  const uint32_t normal = (rounded >> 22) - 252u;  // 1.0 is 0x3F800000 = 254 << 22, code 2
  const uint32_t below_one = (magnitude > 0x3E800000u ? 1u : 0u) + (magnitude >= 0x3F400000u);
  const uint32_t code = magnitude >= 0x3F800000u ? normal : below_one;
  return sign | (code < 7u ? code : 7u);
}
static_assert(encode_e2m1(0.25f) == 0 && encode_e2m1(0.75f) == 2 && encode_e2m1(1.25f) == 2 &&
              encode_e2m1(1.75f) == 4 && encode_e2m1(2.5f) == 4 && encode_e2m1(3.5f) == 6 &&
              encode_e2m1(5.0f) == 6 && encode_e2m1(-1e30f) == 15 && encode_e2m1(-0.0f) == 8);

// Twice the value of a code, an integer in [-12, 12]: what integer dot products multiply.
DUQPP_HOST_DEVICE constexpr int32_t doubled_e2m1(uint32_t code) {
  // Magnitudes 0, 1, 2, 3, 4, 6, 8, 12, a nibble each, lowest index first.
  const int32_t magnitude = static_cast<int32_t>((0xC8643210u >> (4 * (code & 7u))) & 15u);
  return (code & 8u) ? -magnitude : magnitude;
}

// The value of a code; code 8 is -0.
DUQPP_HOST_DEVICE constexpr float decode_e2m1(uint32_t code) {
  const float magnitude = 0.5f * static_cast<float>(doubled_e2m1(code & 7u));
  return (code & 8u) ? -magnitude : magnitude;
}
static_assert(decode_e2m1(7) == 6.0f && decode_e2m1(15) == -6.0f && decode_e2m1(1) == 0.5f);

// decode_e2m1(encode_e2m1(value)) without the codes: the nearest multiple of the grid's step at that
// magnitude, which is half of its power of two, and 1/2 below 1. Adding and subtracting 1.5 * 2^23
// steps rounds to a multiple, ties to even, and a multiple is even where its code is. What is
// compared are integers: of floats, a compiler makes no vector code where a comparison may trap.
DUQPP_HOST_DEVICE constexpr float round_to_e2m1(float value) {
  constexpr int32_t kOne = 0x3F800000, kSix = 0x40C00000;  // bits of 1 and 6
  const int32_t magnitude = static_cast<int32_t>(float_bits(value) & 0x7FFFFFFFu);
  const int32_t bounded = magnitude < kSix ? magnitude : kSix;
  const int32_t power = bounded & 0x7F800000;
  const float steps = 6291456.0f * float_from_bits(power > kOne ? power : kOne);
  const float rounded = (float_from_bits(bounded) + steps) - steps;
  return float_from_bits((float_bits(value) & 0x80000000u) | float_bits(rounded));
}
static_assert(round_to_e2m1(0.25f) == 0.0f && round_to_e2m1(0.75f) == 1.0f &&
              round_to_e2m1(1.75f) == 2.0f && round_to_e2m1(-2.5f) == -2.0f &&
              round_to_e2m1(3.5f) == 4.0f && round_to_e2m1(5.0f) == 4.0f &&
              round_to_e2m1(5.5f) == 6.0f && round_to_e2m1(-7.0f) == -6.0f);

// Two codes a byte, the even column in the low nibble.
DUQPP_HOST_DEVICE constexpr uint8_t pack_e2m1(uint32_t even_column, uint32_t odd_column) {
  return static_cast<uint8_t>(even_column | (odd_column << 4));
}

}  // namespace duqpp
