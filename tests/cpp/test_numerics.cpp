// The numerics of csrc/format over whole domains: every bfloat16 value, dense windows around every
// tie, every exponent, against definitions by search and by logarithm; and the two rewritings that
// GPUs use (e2m1_word.h, error_change.h) against the functions that they stand for.

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "format/e2m1_word.h"
#include "format/e8m0.h"
#include "format/error_change.h"
#include "format/mx_block.h"

namespace {

using namespace duqpp;

constexpr double kGrid[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

std::mt19937 random_bits(1);

// The nearest code by search; of two equally near, the even one.
uint32_t nearest_code(double value) {
  const double magnitude = std::fmin(std::fabs(value), 100.0);
  int best = 0;
  for (int i = 1; i < 8; ++i) {
    const double distance = std::fabs(magnitude - kGrid[i]);
    const double least = std::fabs(magnitude - kGrid[best]);
    if (distance < least || (distance == least && i % 2 == 0)) best = i;
  }
  return uint32_t(best) | (std::signbit(value) ? 8u : 0u);
}

void check_encode(float value) {
  if (std::isnan(value)) return;
  const uint32_t want = nearest_code(value);
  CHECK(encode_e2m1(value) == want, "%a: %u, want %u", value, encode_e2m1(value), want);
}

// The floats within `steps` of `center` on both sides, and their negatives.
template <class Body>
void for_window(float center, int steps, Body&& body) {
  for (int step = -steps; step <= steps; ++step) {
    const int64_t bits = int64_t{float_bits(center)} + step;
    if (bits < 0 || bits >= 0x7F800000) continue;
    body(float_from_bits(uint32_t(bits)));
    body(-float_from_bits(uint32_t(bits)));
  }
}

// The points where a rounding, or a choice of exponent, may change.
const float kKnots[] = {0,     0.125f, 0.25f, 0.375f, 0.5f, 0.75f, 1,    1.25f, 1.5f, 1.75f, 2,
                        2.25f, 2.5f,   3,     3.25f,  3.5f, 4,     4.5f, 5,     6,    7,     8};

void test_encode() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) check_encode(float_from_bits(bits << 16));
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 4001) {
    check_encode(float_from_bits(uint32_t(bits)));
  }
  for (const float knot : kKnots) for_window(knot, 2000, check_encode);
  for (uint32_t code = 0; code < 16; ++code) {
    const double value = code & 8 ? -kGrid[code & 7] : kGrid[code & 7];
    CHECK(decode_e2m1(code) == value && std::signbit(decode_e2m1(code)) == (code >= 8), "%u", code);
    CHECK(doubled_e2m1(code) == int(2 * value), "%u", code);
    CHECK(encode_e2m1(decode_e2m1(code)) == code, "%u", code);
    for (uint32_t odd = 0; odd < 16; ++odd) {
      CHECK(pack_e2m1(code, odd) == 16 * odd + code, "%u %u", code, odd);
    }
  }
}

// encode_e2m1_word in every place of a word, beside neighbours of any value, at every scale.
void check_word(float value, uint32_t exponent) {
  float values[8];
  for (float& other : values) other = float(int(random_bits() % 4097) - 2048) * 0x1p-9f;
  values[random_bits() % 8] = value;
  for (float& each : values) each *= decode_e8m0(exponent);
  const float factor = inverse_scale(exponent);
  uint32_t want = 0;
  bool below_seven = true;
  for (int i = 0; i < 8; ++i) {
    want |= encode_e2m1(values[i] * factor) << (4 * i);
    below_seven = below_seven && std::fabs(values[i] * factor) < 7;
  }
  const uint32_t got = encode_e2m1_word<true>(values, factor);
  CHECK(got == want, "%a at exponent %u: %08x, want %08x", value, exponent, got, want);
  if (!below_seven) return;
  const uint32_t unsaturated = encode_e2m1_word<false>(values, factor);
  CHECK(unsaturated == want, "%a at exponent %u: %08x, want %08x", value, exponent, unsaturated,
        want);
}

void test_encode_word() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = float_from_bits(bits << 16);
    if (std::fabs(value) < 8) check_word(value, 127);
    if (std::fabs(value) < 8) check_word(value, random_bits() % 252);
  }
  for (const float knot : kKnots) {
    for_window(knot, 1000, [](float value) {
      if (std::fabs(value) < 8) check_word(value, 127);
    });
  }
}

// 2^(floor(log2 amax) - 2), or the next one where amax's significand says so.
uint32_t defined_exponent(double amax, ScaleRule rule) {
  if (amax == 0) return 0;
  int exponent;
  const double significand = 2 * std::frexp(amax, &exponent);  // in [1, 2)
  exponent = exponent - 1 - 2 + 127;
  if (rule == ScaleRule::kEven) exponent += significand >= 1.75;
  if (rule == ScaleRule::kCeil) exponent += significand > 1.5;
  return exponent < 0 ? 0 : uint32_t(exponent);
}

void check_exponent(uint32_t bits) {
  const double amax = float_from_bits(bits);
  for (const ScaleRule rule : {ScaleRule::kFloor, ScaleRule::kEven, ScaleRule::kCeil}) {
    const uint32_t got = scale_exponent(bits, scale_addend(rule));
    const uint32_t want = defined_exponent(amax, rule);
    CHECK(got == want, "amax %a, rule %d: %u, want %u", amax, int(rule), got, want);
    if (got > 0) {
      const double scaled = amax * inverse_scale(got);
      const double low = rule == ScaleRule::kFloor ? 4 : rule == ScaleRule::kEven ? 3.5 : 3;
      CHECK(scaled >= low && scaled < 8 && (rule != ScaleRule::kCeil || scaled <= 6),
            "amax %a, rule %d is scaled to %a", amax, int(rule), scaled);
    }
  }
}

void test_exponents() {
  for (uint32_t bits = 0; bits < 0x7F80; ++bits) check_exponent(bits << 16);
  for (uint32_t exponent = 0; exponent < 255; ++exponent) {
    for (const uint32_t fraction : {0x000000u, 0x400000u, 0x600000u, 0x7FFFFFu}) {
      for (int step = -200; step <= 200; ++step) {
        const int64_t bits = (int64_t{exponent} << 23) + fraction + step;
        if (bits >= 0 && bits < int64_t{kInfinityBits}) check_exponent(uint32_t(bits));
      }
    }
  }
  for (const uint32_t bits : {kInfinityBits, 0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu}) {
    for (const uint32_t addend : {0u, 0x200000u, 0x3FFFFFu}) {
      CHECK(scale_exponent(bits, addend) == kNanScale, "%08x", bits);
    }
  }
  for (uint32_t exponent = 0; exponent < 255; ++exponent) {
    CHECK(decode_e8m0(exponent) == std::ldexp(1.0, int(exponent) - 127), "%u", exponent);
    if (exponent < 254) {
      CHECK(double(decode_e8m0(exponent)) * double(inverse_scale(exponent)) == 1, "%u", exponent);
    }
  }
  CHECK(std::isnan(decode_e8m0(255)) && std::isnormal(inverse_scale(255)), "255");
}

// The float32 and integer form of the mse rule against the exact sum of error_change.
void check_error_change(const float (&values)[kBlockSize]) {
  const uint32_t floor = scale_exponent(block_amax_bits(values), 0);
  const float factor = inverse_scale(floor);
  double change = 0;
  for (const float value : values) change += error_change(value * factor);
  ErrorChange sums{0, 0};
  for (int part = 0; part < 4; ++part) {
    float eight[8];
    for (int i = 0; i < 8; ++i) eight[i] = values[8 * part + i];
    const ErrorChange sum = error_change_sums(eight, factor);
    sums.gain += sum.gain;
    sums.saving += sum.saving;
  }
  CHECK(std::ldexp(sums.gain, -25) - std::ldexp(sums.saving, -19) == change,
        "gain %u, saving %u, change %a", sums.gain, sums.saving, change);
  CHECK(next_exponent_is_better(sums.gain, sums.saving) == (change < 0),
        "gain %u, saving %u, change %a", sums.gain, sums.saving, change);
}

float random_scaled() {
  const float knot = kKnots[random_bits() % 22];
  const uint32_t bits = float_bits(knot == 0 ? 0x1p-20f : knot) + random_bits() % 65 - 32;
  const float near = float_from_bits(bits);
  const float any = float(random_bits() >> 8) * 0x1p-21f;  // 24 bits, below 8
  const float value = random_bits() % 2 ? near : any;
  return std::fmin(value, 0x1.fffffep2f) * (random_bits() % 2 ? 1.0f : -1.0f);
}

void test_error_change() {
  int stepped = 0;
  for (int round = 0; round < 100000; ++round) {
    float values[kBlockSize];
    for (float& value : values) value = random_scaled() * (round % 3 ? 1.0f : 0x1p-100f);
    // Mostly small values, so that one near 8 decides; in every fourth block the sums are equal.
    if (round % 2) {
      for (int i = 0; i < 30; ++i) values[i] *= 0.25f;
    }
    if (round % 4 == 1) {
      for (float& value : values) value = 1;
      values[0] = 7.0f + 0x1p-20f * float(round % 1000);
      values[1] = 0.25f + 4 * (values[0] - 7.0f);
    }
    check_error_change(values);
    stepped += block_scale(values, ScaleRule::kMse) != block_scale(values, ScaleRule::kFloor);
  }
  CHECK(stepped > 10000 && stepped < 90000, "%d of 100000 blocks stepped: no evidence", stepped);

  // A gain that exceeds the saving by one unit of 2^-25, and the tie: neither steps.
  for (const float excess : {0.0f, 0x1p-25f}) {
    float values[kBlockSize] = {7.0f + 0x1p-6f, 0.3125f + excess};
    check_error_change(values);
    CHECK(block_scale(values, ScaleRule::kMse) == 127, "excess %a", excess);
  }
  // The largest sums do not overflow.
  float values[kBlockSize];
  for (float& value : values) value = 0x1.fffffep2f;
  check_error_change(values);
  for (float& value : values) value = 0.5f;
  values[0] = 7.0f;
  check_error_change(values);
}

}  // namespace

int main() {
  test_encode();
  test_encode_word();
  test_exponents();
  test_error_change();
  return duqpp::testing::finish("test_numerics");
}
