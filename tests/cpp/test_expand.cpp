// csrc/format/e4m3.h over whole domains, and expand.h for every code, every scale of a block and
// every largest scale of its row, against definitions by search among E4M3's values.

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "format/expand.h"

namespace {

using namespace duqpp;

constexpr double kGrid[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

std::mt19937 random_bits(1);

double e2m1_value(uint32_t code) { return code & 8 ? -kGrid[code & 7] : kGrid[code & 7]; }

// From the table of OCP 8-bit Floating Point: sign, 4 bits of exponent (bias 7), 3 of mantissa.
double e4m3_value(uint32_t code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9)
                                         : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

// The nearest E4M3 code by search; of two equally near, the even one.
uint32_t nearest_e4m3(double value) {
  const double magnitude = std::fabs(value);
  uint32_t best = 0;
  for (uint32_t code = 1; code < 0x7F; ++code) {
    const double distance = std::fabs(magnitude - e4m3_value(code));
    const double least = std::fabs(magnitude - e4m3_value(best));
    if (distance < least || (distance == least && code % 2 == 0)) best = code;
  }
  // 480 would be next: what is nearer to it, has no code.
  const bool too_large = std::isnan(value) || magnitude > 464;
  return (too_large ? 0x7Fu : best) | (std::signbit(value) ? 0x80u : 0u);
}

void check_encode(float value) {
  const uint32_t want = nearest_e4m3(value);
  CHECK(encode_e4m3(value) == want || (std::isnan(value) && (encode_e4m3(value) & 0x7F) == 0x7F),
        "%a: %#x, want %#x", value, encode_e4m3(value), want);
}

void test_e4m3() {
  for (uint32_t code = 0; code < 256; ++code) {
    const double want = e4m3_value(code);
    const double value = decode_e4m3(uint8_t(code));
    CHECK(value == want || (std::isnan(want) && std::isnan(value)), "%#x: %a", code, value);
    CHECK(std::isnan(want) || encode_e4m3(float(want)) == code, "%#x", code);
  }
  for (uint32_t bits = 0; bits < 0x10000; bits += 3) check_encode(float_from_bits(bits << 16));
  for (uint32_t code = 0; code < 0x7F; ++code) {  // around every value and every tie
    const double next = code == 0x7E ? 480 : e4m3_value(code + 1);
    for (const double center : {e4m3_value(code), (e4m3_value(code) + next) / 2}) {
      for (int step = -20; step <= 20; ++step) {
        const int64_t bits = int64_t{float_bits(float(center))} + step;
        if (bits < 0) continue;
        check_encode(float_from_bits(uint32_t(bits)));
        check_encode(-float_from_bits(uint32_t(bits)));
      }
    }
  }
}

// A word of eight codes, one of them `code` at `place`, and the code at each place.
uint32_t random_word(uint32_t code, int place, uint32_t (&codes)[8]) {
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    codes[i] = i == place ? code : random_bits() % 16;
    word |= codes[i] << (4 * i);
  }
  return word;
}

uint32_t byte_of(const E4M3Values& values, int i) {
  return (values.word[i / 4] >> (8 * (i % 4))) & 255;
}
uint32_t half_of(const BFloat16Values& values, int i) {
  return (values.word[i / 2] >> (16 * (i % 2))) & 0xFFFF;
}

// Every block exponent in rows of every largest exponent.
void test_e4m3_blocks() {
  int inexact = 0;
  for (uint32_t largest = 0; largest < 255; ++largest) {
    const uint32_t row = row_exponent(largest);
    const double scale = row_scale(row);
    CHECK(std::fpclassify(float(scale)) == FP_NORMAL, "%u", largest);
    CHECK(scale == std::ldexp(1.0, int(row) - 127 - kTopShift), "%u: %a", largest, scale);
    for (uint32_t exponent = 0; exponent <= largest; ++exponent) {
      const E4M3Block block(exponent, row);
      const double factor = std::ldexp(1.0, int(exponent) - int(row) + kTopShift);
      const bool exact = largest - exponent <= 14;
      CHECK(exact ? block_shift(exponent, row) >= kLeastShift : true, "%u %u", exponent, largest);
      for (uint32_t code = 0; code < 16; ++code) {
        uint32_t codes[8];
        const int place = int(random_bits() % 8);
        const E4M3Values values = block(random_word(code, place, codes));
        for (int i = 0; i < 8; ++i) {
          const double want = e2m1_value(codes[i]) * factor;
          const double value = e4m3_value(byte_of(values, i));
          if (exact) {
            CHECK(value == want, "code %u, exponents %u of %u: %a", codes[i], exponent, largest,
                  value);
          } else {
            CHECK(std::fabs(value - want) <= 0x1p-10, "code %u, exponents %u of %u: %a", codes[i],
                  exponent, largest, value);
            inexact += value != want;
          }
          CHECK(byte_of(values, i) >> 7 == codes[i] >> 3, "code %u: sign", codes[i]);
        }
        CHECK(byte_of(values, place) == nearest_e4m3(e2m1_value(code) * factor),
              "code %u, exponents %u of %u: %#x", code, exponent, largest, byte_of(values, place));
      }
    }
    const E4M3Values nan = E4M3Block(kNanScale, row)(uint32_t(random_bits()));
    for (int i = 0; i < 8; ++i) CHECK((byte_of(nan, i) & 0x7F) == 0x7F, "NaN, %u", largest);
  }
  CHECK(inexact > 1000, "%d inexact values: no evidence", inexact);
}

void test_bfloat16_blocks() {
  for (uint32_t exponent = 0; exponent < 256; ++exponent) {
    const BFloat16Block block(exponent);
    for (uint32_t code = 0; code < 16; ++code) {
      for (int place = 0; place < 8; ++place) {
        uint32_t codes[8];
        const BFloat16Values values = block(random_word(code, place, codes));
        for (int i = 0; i < 8; ++i) {
          const uint32_t half = half_of(values, i);
          const float value = decode_bfloat16(uint16_t(half));
          const double want = std::ldexp(e2m1_value(codes[i]), int(exponent) - 127);
          if (exponent == kNanScale) {
            CHECK(std::isnan(value), "code %u: %a", codes[i], value);
          } else if (std::fabs(want) >= 0x1p128) {
            CHECK(std::isinf(value) && (value < 0) == (want < 0), "%u, %u", codes[i], exponent);
          } else {
            CHECK(value == want, "code %u, exponent %u: %a", codes[i], exponent, value);
            CHECK(half >> 15 == codes[i] >> 3, "code %u: sign", codes[i]);
          }
        }
      }
    }
  }
}

void test_row_maximum() {
  for (int round = 0; round < 10000; ++round) {
    uint32_t largest = random_bits() % 3 ? random_bits() % 255 : 0, want = largest, word = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t exponent = random_bits() % 4 ? random_bits() % 255 : 255;
      word |= exponent << (8 * i);
      if (exponent < 255 && exponent > want) want = exponent;
    }
    CHECK(row_maximum_of_4(largest, word) == want, "%u, %#x", largest, word);
  }
  CHECK(row_exponent(0) == 7 && row_exponent(7) == 7, "%u", row_exponent(0));
  CHECK(row_exponent(8) == 8 && row_exponent(254) == 254, "%u", row_exponent(8));
}

}  // namespace

int main() {
  test_e4m3();
  test_e4m3_blocks();
  test_bfloat16_blocks();
  test_row_maximum();
  return duqpp::testing::finish("test_expand");
}
