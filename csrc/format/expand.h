// MXFP4 in wider formats, for tensor cores that multiply those: eight codes at a time, exactly, by
// looking up bytes. The formats:
//
//   E4M3 under one power of two per row. The blocks of a row's largest exponent are multiplied by
//   2^6, so that their largest value, 6 * 2^6 = 384, is just below 448; a block 14 exponents lower
//   by 2^-8, so that its least, 0.5 * 2^-8, is E4M3's least. So 15 binades of exponents are exact.
//   Below, values round to multiples of 2^-9, an error of at most 2^-10 or 2^-16 of the row's
//   largest scale: below 2^-17 of the row's largest value, where that is above 2 of its scales, as
//   the rules of format/e8m0.h choose them.
//
//   bfloat16, each value on its own: what decode_e2m1 * decode_e8m0 is in float32, which bfloat16
//   holds exactly (subnormals down to 2^-128 included), and which is infinite from 2^128 on.
//
// A block whose scale is NaN is NaN in both.
#pragma once

#include <cstdint>

#include "format/e2m1.h"
#include "format/e4m3.h"
#include "format/e8m0.h"

namespace duqpp {

inline constexpr int kTopShift = 6;      // of the blocks of a row's largest exponent
inline constexpr int kLeastShift = -8;   // of the lowest blocks that are exact
inline constexpr int kNormalShift = -5;  // of the lowest whose values are E4M3 normals

// The larger of a row's largest exponent so far and a block's; a NaN has no say.
DUQPP_HOST_DEVICE constexpr uint32_t row_maximum(uint32_t largest, uint32_t exponent) {
  return exponent != kNanScale && exponent > largest ? exponent : largest;
}
// The same of four scale bytes.
DUQPP_HOST_DEVICE constexpr uint32_t row_maximum_of_4(uint32_t largest, uint32_t exponents) {
  for (int i = 0; i < 4; ++i) largest = row_maximum(largest, (exponents >> (8 * i)) & 255u);
  return largest;
}

// What a row is aligned to: its largest exponent, or one large enough for row_scale to be a normal
// float32. Then no block is more than 14 below, and the row is exact all the more.
DUQPP_HOST_DEVICE constexpr uint32_t row_exponent(uint32_t largest) {
  constexpr uint32_t kLeast = kTopShift + 1;
  return largest > kLeast ? largest : kLeast;
}

// The power of two that the row's E4M3 values are to be multiplied by.
DUQPP_HOST_DEVICE constexpr float row_scale(uint32_t row_exponent) {
  return float_from_bits((row_exponent - kTopShift) << 23);
}

// The power of two, by its exponent, that a block's E2M1 values are multiplied by: at most 6.
DUQPP_HOST_DEVICE constexpr int block_shift(uint32_t exponent, uint32_t row_exponent) {
  return static_cast<int>(exponent) - static_cast<int>(row_exponent) + kTopShift;
}

// Bytes of `low` (0 .. 3) and `high` (4 .. 7) by the four lowest nibbles of `selector`, each below
// 8.
DUQPP_HOST_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, selector);
#else
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    const int place = (selector >> (4 * i)) & 7;
    picked |= static_cast<uint32_t>((bytes >> (8 * place)) & 255u) << (8 * i);
  }
  return picked;
#endif
}

// The selectors that put two words' bytes in turn, low first: those of their low halves, and those
// of their high halves.
inline constexpr uint32_t kLowInTurn = 0x5140, kHighInTurn = 0x7362;

// Sign bits of eight codes, each the uppermost of its byte.
struct SignBytes {
  uint32_t low, high;  // of codes 0 .. 3, of codes 4 .. 7
};
DUQPP_HOST_DEVICE SignBytes sign_bytes(uint32_t codes) {
  constexpr uint32_t kSigns = 0x80808080u;
  const uint32_t even = codes << 4;
  return {pick_bytes(even, codes, kLowInTurn) & kSigns,
          pick_bytes(even, codes, kHighInTurn) & kSigns};
}

// A byte for each E2M1 magnitude: 0 .. 3 in `low`, 4 .. 7 in `high`.
struct MagnitudeBytes {
  uint32_t low, high;

  // Those of codes 0 .. 3 of a word, and of codes 4 .. 7.
  DUQPP_HOST_DEVICE uint32_t of_low(uint32_t codes) const {
    return pick_bytes(low, high, codes & 0x7777u);
  }
  DUQPP_HOST_DEVICE uint32_t of_high(uint32_t codes) const {
    return pick_bytes(low, high, (codes >> 16) & 0x7777u);
  }
};

// Eight values in a row, the lower column first.
struct E4M3Values {
  uint32_t word[2];
};
struct BFloat16Values {
  uint32_t word[4];
};

// The magnitudes of a block so low that some are subnormal: their integers times 2^(shift + 8), in
// units of 2^-9, which have those integers for codes up to 15 and are rounded to nearest, ties to
// even.
DUQPP_HOST_DEVICE constexpr MagnitudeBytes low_magnitudes(int shift) {
  switch (shift) {
    case -6:
      return {0x0C080400, 0x1C181410};  // 0, 4, 8, 12; 16, 24, 32, 48
    case -7:
      return {0x06040200, 0x14100C08};
    case -8:
      return {0x03020100, 0x0C080604};  // 0, 1, 2, 3; 4, 6, 8, 12
    case -9:
      return {0x02010000, 0x06040302};  // 0, 0.5, 1, 1.5; 2, 3, 4, 6
    case -10:
      return {0x01000000, 0x03020201};
    case -11:
      return {0x00000000, 0x02010100};
    case -12:
      return {0x00000000, 0x01000000};  // 0, 1/16, 1/8, 3/16; 1/4, 3/8, 1/2, 3/4
    default:
      return {0, 0};
  }
}

// The values of a block's codes in E4M3.
struct E4M3Block {
  using Values = E4M3Values;
  MagnitudeBytes magnitudes;

  DUQPP_HOST_DEVICE E4M3Block(uint32_t exponent, uint32_t row_exponent) {
    const int shift = block_shift(exponent, row_exponent);
    if (exponent == kNanScale) {
      magnitudes = {kE4M3Nan * 0x01010101u, kE4M3Nan * 0x01010101u};
    } else if (shift >= kNormalShift) {  // 0, 0.5, 1, 1.5; 2, 3, 4, 6: all but 0 with an exponent
      const uint32_t steps = static_cast<uint32_t>(shift) << 3;
      magnitudes = {0x3C383000u + steps * 0x01010100u, 0x4C484440u + steps * 0x01010101u};
    } else {
      magnitudes = low_magnitudes(shift);
    }
  }

  DUQPP_HOST_DEVICE Values operator()(uint32_t codes) const {
    const SignBytes signs = sign_bytes(codes);
    return {{magnitudes.of_low(codes) | signs.low, magnitudes.of_high(codes) | signs.high}};
  }
};

// The values of a block's codes in bfloat16.
struct BFloat16Block {
  using Values = BFloat16Values;
  static constexpr uint32_t kInfinities = 0x7F807F80, kNans = 0x7FC07FC0;
  MagnitudeBytes upper, lower;  // the two bytes of each magnitude

  DUQPP_HOST_DEVICE explicit BFloat16Block(uint32_t exponent, uint32_t /*row_exponent*/ = 0) {
    const uint32_t steps = (exponent - 127u) << 7;
    uint32_t pair[4] = {0x3F000000u + (steps << 16), 0x3FC03F80u + steps * 0x00010001u,
                        0x40404000u + steps * 0x00010001u, 0x40C04080u + steps * 0x00010001u};
    if (exponent < 2) {  // subnormals, in units of 2^-133: 2^(exponent + 5) is the least
      pair[0] = 0x00200000u << exponent;
      if (exponent == 0) pair[1] = 0x00600040u;
    } else if (exponent > 252) {  // 4 and 6 are infinite, at 254 also 2 and 3; or all are NaN
      if (exponent > 253) pair[2] = kInfinities;
      pair[3] = kInfinities;
      if (exponent == kNanScale) pair[0] = pair[1] = pair[2] = pair[3] = kNans;
    }
    lower = {pick_bytes(pair[0], pair[1], 0x6420), pick_bytes(pair[2], pair[3], 0x6420)};
    upper = {pick_bytes(pair[0], pair[1], 0x7531), pick_bytes(pair[2], pair[3], 0x7531)};
  }

  DUQPP_HOST_DEVICE Values operator()(uint32_t codes) const {
    const SignBytes signs = sign_bytes(codes);
    const uint32_t low_upper = upper.of_low(codes) | signs.low, low_lower = lower.of_low(codes);
    const uint32_t high_upper = upper.of_high(codes) | signs.high,
                   high_lower = lower.of_high(codes);
    return {{pick_bytes(low_lower, low_upper, kLowInTurn),
             pick_bytes(low_lower, low_upper, kHighInTurn),
             pick_bytes(high_lower, high_upper, kLowInTurn),
             pick_bytes(high_lower, high_upper, kHighInTurn)}};
  }
};

}  // namespace duqpp
