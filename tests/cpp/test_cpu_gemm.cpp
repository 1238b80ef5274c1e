// mxfp4_gemm on the CPU, on every instruction set of this machine, against its definition.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/mxfp4_gemm.h"
#include "gemm_oracle.h"

namespace duqpp::testing {
namespace {

using cpu::Isa;
using cpu::ParallelBody;
using cpu::ParallelFor;

struct ScaleRange {
  int low, high;
};
constexpr ScaleRange kNear = {120, 130};
// Twelve exponents in all: sums of fewer than 2^11 products, multiples of 2^-14, are exact.
constexpr ScaleRange kExact = {121, 124};
constexpr ScaleRange kAll = {0, 254};

Matrix random_matrix(int64_t rows, int64_t K, ScaleRange range, uint32_t seed) {
  std::mt19937 generator(seed);
  Matrix matrix = {rows, K, {}, {}};
  for (int64_t i = 0; i < rows * K / 2; ++i) matrix.codes.push_back(generator() & 255);
  for (int64_t i = 0; i < rows * K / 32; ++i) {
    matrix.scales.push_back(range.low + generator() % (range.high - range.low + 1));
  }
  return matrix;
}

// Threads that take ranges of uneven length, in no order.
void run_unevenly(int64_t tasks, int64_t grain, const ParallelBody& body) {
  std::vector<std::thread> threads;
  int64_t begin = 0;
  for (int64_t length = grain; begin < tasks; length = length * 2 + 1) {
    const int64_t end = std::min(tasks, begin + length);
    threads.emplace_back([&body, begin, end] { body(begin, end); });
    begin = end;
  }
  for (std::thread& thread : threads) thread.join();
}

Matrix tiled(const Matrix& b) {
  Matrix result = {b.rows, b.K, std::vector<uint8_t>(b.codes.size()),
                   std::vector<uint8_t>(b.scales.size())};
  cpu::prepare_weight(b.rows, b.K, b.codes.data(), b.scales.data(), result.codes.data(),
                      result.scales.data(), run_unevenly);
  return result;
}

struct Options {
  Dtype out_dtype = Dtype::kFloat32;
  const void* bias = nullptr;
  Dtype bias_dtype = Dtype::kFloat32;
  ParallelFor parallel_for = cpu::run_serially;
};

int element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// The bytes of `out`, from a buffer of exactly its size.
std::vector<uint8_t> run(Isa isa, const Matrix& a, const Matrix& tiled_b, const Options& options) {
  std::vector<uint8_t> out(a.rows * tiled_b.rows * element_bytes(options.out_dtype), 0xAB);
  MXFP4GemmProblem problem = {};
  problem.M = a.rows;
  problem.N = tiled_b.rows;
  problem.K = a.K;
  problem.a_codes = a.codes.data();
  problem.a_scales = a.scales.data();
  problem.b_codes = tiled_b.codes.data();
  problem.b_scales = tiled_b.scales.data();
  problem.bias = options.bias;
  problem.bias_dtype = options.bias_dtype;
  problem.out = out.data();
  problem.out_dtype = options.out_dtype;
  cpu::mxfp4_gemm(problem, isa, options.parallel_for);
  return out;
}

uint32_t element_bits(const std::vector<uint8_t>& out, int64_t index, Dtype dtype) {
  uint32_t bits = 0;
  std::memcpy(&bits, out.data() + index * element_bytes(dtype), element_bytes(dtype));
  return bits;
}

// Equal as bits, where every NaN is the one that the outputs use.
bool same_float(uint32_t bits, float expected) {
  return bits == (std::isnan(expected) ? 0x7FC00000u : __builtin_bit_cast(uint32_t, expected));
}

void check_against_definition(const Matrix& a, const Matrix& b, const char* what) {
  const Matrix tiled_b = tiled(b);
  std::vector<float> expected;
  for (int64_t m = 0; m < a.rows; ++m) {
    for (int64_t n = 0; n < b.rows; ++n) expected.push_back(dot_in_order(a, b, m, n));
  }
  for (const Isa isa : cpu::supported_isas()) {
    const std::vector<uint8_t> out = run(isa, a, tiled_b, {});
    for (size_t i = 0; i < expected.size(); ++i) {
      const uint32_t bits = element_bits(out, i, Dtype::kFloat32);
      CHECK(same_float(bits, expected[i]), "%s, %s, M %ld N %ld K %ld, [%ld, %ld]: %g, expected %g",
            what, cpu::isa_name(isa), long(a.rows), long(b.rows), long(a.K), long(i / b.rows),
            long(i % b.rows), __builtin_bit_cast(float, bits), expected[i]);
    }
  }
}

void test_round_trip_and_layout() {
  for (const int64_t N : {1, 15, 16, 17, 40}) {
    for (const int64_t K : {32, 96, 160}) {
      const Matrix b = random_matrix(N, K, {0, 255}, 1);
      const Matrix t = tiled(b);
      Matrix back = {N, K, std::vector<uint8_t>(b.codes.size()),
                     std::vector<uint8_t>(b.scales.size())};
      cpu::restore_weight(N, K, t.codes.data(), t.scales.data(), back.codes.data(),
                          back.scales.data(), run_unevenly);
      CHECK(back.codes == b.codes && back.scales == b.scales, "N %ld K %ld", long(N), long(K));
      // Columns 8w .. 8w + 7 of row 16t + l are four bytes at word w, lane l of tile t.
      const int64_t n = N - 1, tile = n / 16, lane = n % 16,
                    width = std::min<int64_t>(16, N - tile * 16);
      for (int64_t w = 0; w < K / 8; ++w) {
        const uint8_t* const word = t.codes.data() + (tile * 16 * (K / 8) + w * width + lane) * 4;
        CHECK(std::memcmp(word, b.codes.data() + n * K / 2 + w * 4, 4) == 0, "word %ld", long(w));
      }
      for (int64_t i = 0; i < K / 32; ++i) {
        CHECK(t.scales[tile * 16 * (K / 32) + i * width + lane] == b.scales[n * (K / 32) + i],
              "scale %ld", long(i));
      }
    }
  }
}

void test_definition_on_every_shape() {
  uint32_t seed = 10;
  for (const int64_t M : {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 20}) {
    for (const int64_t N : {0, 1, 7, 8, 9, 16, 17, 31, 32, 33, 50}) {
      for (const int64_t K : {32, 96, 160}) {
        const Matrix a = random_matrix(M, K, kNear, seed++);
        check_against_definition(a, random_matrix(N, K, kNear, seed++), "shape");
      }
    }
  }
  check_against_definition(random_matrix(7, 4096, kNear, 3), random_matrix(19, 4096, kNear, 4),
                           "long");
  for (const int64_t K : {512, 544, 1120}) {  // a whole segment, one and a block, two and three
    check_against_definition(random_matrix(20, K, kNear, 3), random_matrix(35, K, kNear, 4),
                             "segments");
    check_against_definition(random_matrix(9, K, kAll, 3), random_matrix(19, K, kAll, 4),
                             "segments of any scales");
  }
  check_against_definition(random_matrix(5, 0, kNear, 3), random_matrix(19, 0, kNear, 4), "K = 0");
}

// Codes of the largest magnitude, all of one sign: where narrow accumulators would overflow.
void test_largest_codes() {
  for (const uint8_t a_byte : {0x77, 0xFF, 0x7F, 0x00}) {
    for (const uint8_t b_byte : {0x77, 0xFF, 0xF7, 0x88}) {
      Matrix a = random_matrix(7, 96, kNear, 5), b = random_matrix(17, 96, kNear, 6);
      std::fill(a.codes.begin(), a.codes.end(), a_byte);
      std::fill(b.codes.begin(), b.codes.end(), b_byte);
      check_against_definition(a, b, "largest");
    }
  }
}

// All 65536 pairs of scale bytes, NaN included: products from 2^-254 to 2^254.
void test_every_pair_of_scales() {
  Matrix a = random_matrix(256, 32, kNear, 7), b = random_matrix(256, 32, kNear, 8);
  for (int i = 0; i < 256; ++i) a.scales[i] = b.scales[i] = i;
  check_against_definition(a, b, "pair of scales");
}

// Sums of blocks whose scales have nothing in common: overflow, underflow, and a large block that a
// later one takes back.
void test_scales_of_any_spread() {
  check_against_definition(random_matrix(40, 96, kAll, 11), random_matrix(33, 96, kAll, 12),
                           "spread");
  check_against_definition(random_matrix(40, 96, {220, 254}, 13),
                           random_matrix(33, 96, {0, 40}, 14), "large times small");
  check_against_definition(random_matrix(40, 96, {225, 240}, 15),
                           random_matrix(33, 96, {120, 144}, 16), "near overflow");
  check_against_definition(random_matrix(40, 96, {0, 8}, 17), random_matrix(33, 96, {100, 130}, 18),
                           "near underflow");
}

// Whatever the order of summation, an exact sum is the float64 result rounded once.
void test_exact_sums_equal_float64() {
  const int64_t M = 9, N = 35, K = 4096;
  const Matrix a = random_matrix(M, K, kExact, 21), b = random_matrix(N, K, kExact, 22);
  const Matrix tiled_b = tiled(b);
  Options options;
  options.out_dtype = Dtype::kBFloat16;
  for (const Isa isa : cpu::supported_isas()) {
    const std::vector<uint8_t> out = run(isa, a, tiled_b, options);
    for (int64_t i = 0; i < M * N; ++i) {
      double sum = 0;
      for (int64_t block = 0; block < K / 32; ++block)
        sum += block_product(a, b, i / N, i % N, block);
      const uint32_t bits = element_bits(out, i, Dtype::kBFloat16) << 16;
      CHECK(same_float(bits, static_cast<float>(round_to_bfloat16(sum))),
            "%s [%ld, %ld]: %g, exact %g", cpu::isa_name(isa), long(i / N), long(i % N),
            __builtin_bit_cast(float, bits), sum);
    }
  }
}

void test_nan_stays_in_its_row_and_column() {
  for (const int64_t M : {6, 14}) {
    const int64_t N = 37, K = 160;
    Matrix a = random_matrix(M, K, kNear, 31), b = random_matrix(N, K, kNear, 32);
    a.scales[2 * (K / 32) + 3] = 255;
    b.scales[33 * (K / 32) + 4] = 255;
    std::fill(b.codes.begin() + 33 * K / 2, b.codes.begin() + 34 * K / 2, 0);  // NaN also times 0
    check_against_definition(a, b, "NaN");
    for (const Isa isa : cpu::supported_isas()) {
      for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat32}) {
        Options options;
        options.out_dtype = dtype;
        const std::vector<uint8_t> out = run(isa, a, tiled(b), options);
        const uint32_t nan = dtype == Dtype::kBFloat16  ? 0x7FC0u
                             : dtype == Dtype::kFloat16 ? 0x7E00u
                                                        : 0x7FC00000u;
        for (int64_t i = 0; i < M * N; ++i) {
          const bool expected = i / N == 2 || i % N == 33;
          CHECK((element_bits(out, i, dtype) == nan) == expected, "%s [%ld, %ld]",
                cpu::isa_name(isa), long(i / N), long(i % N));
        }
      }
    }
  }
}

// The bias and the output's type: two roundings, in this order. Scales up to where float16
// overflows and down to where it is subnormal.
void test_bias_and_output_types() {
  const int64_t M = 7, N = 43, K = 96;
  std::mt19937 generator(41);
  for (const ScaleRange range : {ScaleRange{112, 114}, kNear, ScaleRange{130, 134}, kAll}) {
    const Matrix a = random_matrix(M, K, range, 42), b = random_matrix(N, K, range, 43);
    const Matrix tiled_b = tiled(b);
    std::vector<float> bias_floats(N);
    std::vector<uint16_t> bias_halves(N);
    // Few significant bits: the same value in every type.
    for (int64_t n = 0; n < N; ++n) {
      bias_floats[n] = (static_cast<int>(generator() % 255) - 127) / 16.0f;
      bias_halves[n] = __builtin_bit_cast(uint32_t, bias_floats[n]) >> 16;
    }
    std::vector<uint16_t> bias_float16(N);
    for (int64_t n = 0; n < N; ++n) {
      if (bias_floats[n] == 0) continue;
      const int exponent = std::ilogb(bias_floats[n]);
      const double mantissa = std::abs(bias_floats[n]) / std::ldexp(1.0, exponent) - 1;
      bias_float16[n] = (bias_floats[n] < 0 ? 0x8000 : 0) | (exponent + 15) << 10 |
                        static_cast<int>(mantissa * 1024);
    }
    for (int bias = 0; bias < 4; ++bias) {
      for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat32}) {
        Options options;
        options.out_dtype = dtype;
        const void* const biases[] = {nullptr, bias_floats.data(), bias_halves.data(),
                                      bias_float16.data()};
        const Dtype types[] = {Dtype::kFloat32, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
        options.bias = biases[bias];
        options.bias_dtype = types[bias];
        for (const Isa isa : cpu::supported_isas()) {
          const std::vector<uint8_t> out = run(isa, a, tiled_b, options);
          for (int64_t i = 0; i < M * N; ++i) {
            float value = dot_in_order(a, b, i / N, i % N);
            if (bias) value += bias_floats[i % N];
            const uint32_t bits = element_bits(out, i, dtype);
            bool same;
            if (dtype == Dtype::kFloat32) {
              same = same_float(bits, value);
            } else if (dtype == Dtype::kBFloat16) {
              same = same_float(bits << 16, static_cast<float>(round_to_bfloat16(value)));
            } else {
              const double rounded = round_to_float16(value);
              const int exponent = (bits >> 10) & 31;
              const double magnitude = exponent == 31 ? ((bits & 0x3FF) ? NAN : INFINITY)
                                       : exponent ? std::ldexp(1024 + (bits & 0x3FF), exponent - 25)
                                                  : std::ldexp(bits & 0x3FF, -24);
              same = std::isnan(rounded)
                         ? bits == 0x7E00
                         : magnitude == std::abs(rounded) && (bits >> 15) == std::signbit(rounded);
            }
            CHECK(same, "%s, bias %d, out type %d, [%ld, %ld]: bits %x, expected %g",
                  cpu::isa_name(isa), bias, static_cast<int>(dtype), long(i / N), long(i % N), bits,
                  value);
          }
        }
      }
    }
  }
}

// Bytes depend neither on the instruction set, nor on the threads, nor on the rows beside a row:
// small batches, large ones, ones in several chunks of memory, with and without rows beyond the
// kernels' range.
void test_bytes_are_invariant() {
  struct Shape {
    int64_t M, N, K;
  };
  for (const Shape& shape : {Shape{1, 300, 4096}, Shape{6, 77, 4096}, Shape{64, 100, 160},
                             Shape{129, 33, 96}, Shape{61, 33, 114688}}) {
    for (const bool beyond : {false, true}) {
      Matrix a = random_matrix(shape.M, shape.K, kNear, 51);
      const Matrix tiled_b = tiled(random_matrix(shape.N, shape.K, kNear, 52));
      const int64_t blocks = shape.K / 32;
      if (beyond) {
        for (int64_t m = 0; m < shape.M; m += 3) a.scales[m * blocks + m % blocks] = 234 + m % 21;
      }
      Options options;
      options.out_dtype = Dtype::kBFloat16;
      const std::vector<uint8_t> expected = run(Isa::kPortable, a, tiled_b, options);
      for (const Isa isa : cpu::supported_isas()) {
        for (const ParallelFor& parallel_for :
             {ParallelFor(cpu::run_serially), ParallelFor(run_unevenly)}) {
          options.parallel_for = parallel_for;
          CHECK(run(isa, a, tiled_b, options) == expected, "%s, M %ld N %ld K %ld, beyond %d",
                cpu::isa_name(isa), long(shape.M), long(shape.N), long(shape.K), beyond);
        }
        for (const int64_t m : {int64_t{0}, shape.M / 2, shape.M - 1}) {
          const Matrix row = {
              1,
              shape.K,
              {a.codes.begin() + m * shape.K / 2, a.codes.begin() + (m + 1) * shape.K / 2},
              {a.scales.begin() + m * blocks, a.scales.begin() + (m + 1) * blocks}};
          const std::vector<uint8_t> alone = run(isa, row, tiled_b, options);
          CHECK(std::memcmp(alone.data(), expected.data() + m * shape.N * 2, shape.N * 2) == 0,
                "%s, row %ld alone, M %ld N %ld K %ld", cpu::isa_name(isa), long(m), long(shape.M),
                long(shape.N), long(shape.K));
        }
      }
    }
  }
}

void test_isa_selection() {
  const std::vector<Isa> isas = cpu::supported_isas();
  CHECK(isas.front() == Isa::kPortable && std::is_sorted(isas.begin(), isas.end()), "%zu",
        isas.size());
  CHECK(cpu::choose_isa("") == isas.back(), "without an override");
  for (const Isa isa : isas) {
    CHECK(cpu::choose_isa(cpu::isa_name(isa)) == isa, "%s", cpu::isa_name(isa));
  }
  std::string message;
  try {
    cpu::choose_isa("avx9");
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(message.find("avx9") != std::string::npos && message.find("portable") != std::string::npos,
        "message '%s'", message.c_str());
}

int run_all() {
  for (const Isa isa : cpu::supported_isas()) std::printf("runs: %s\n", cpu::isa_name(isa));
  test_isa_selection();
  test_round_trip_and_layout();
  test_definition_on_every_shape();
  test_largest_codes();
  test_every_pair_of_scales();
  test_scales_of_any_spread();
  test_exact_sums_equal_float64();
  test_nan_stays_in_its_row_and_column();
  test_bias_and_output_types();
  test_bytes_are_invariant();
  return finish("test_cpu_gemm");
}

}  // namespace
}  // namespace duqpp::testing

int main() { return duqpp::testing::run_all(); }
