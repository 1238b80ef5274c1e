// GPTQ's inner loop, that of the CPU and that of a GPU run on the host, against its definition, which
// is written out here row by row.
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/gptq_block.h"
#include "cuda/gptq_block.cuh"
#include "format/e2m1.h"
#include "format/mx_block.h"

namespace duqpp::testing {
namespace {

constexpr ScaleRule kRules[] = {ScaleRule::kFloor, ScaleRule::kEven, ScaleRule::kCeil,
                                ScaleRule::kMse};

using Row = std::array<float, kBlockSize>;

// Memory of exactly the size, at a multiple of 16 bytes, as a GPU's loads want it.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    void* pointer = nullptr;
    if (posix_memalign(&pointer, 16, count * sizeof(T)) != 0) std::abort();
    data_ = static_cast<T*>(pointer);
    std::memset(pointer, 0xA5, count * sizeof(T));
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

// A problem of so many rows, and where its results go.
struct Case {
  explicit Case(int64_t rows)
      : values(rows * kBlockSize),
        factor(kBlockSize * kBlockSize),
        compensated(rows * kBlockSize),
        rounded(rows * kBlockSize),
        codes(rows * kBlockSize / 2),
        scales(rows),
        problem{rows, ScaleRule::kFloor, values.data(), factor.data(), codes.data(),
                scales.data(), compensated.data(), rounded.data()} {}

  Buffer<float> values, factor, compensated, rounded;
  Buffer<uint8_t> codes, scales;
  GptqBlockProblem problem;
};

// Rows of all magnitudes, with outliers, zeros of both signs, ties and subnormals among them.
float value_of_row(int64_t row, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  const float value = normal(generator) * (generator() % 40 == 0 ? 30.0f : 1.0f);
  switch (row % 8) {
    case 0:
      return generator() % 2 ? -0.0f : 0.0f;
    case 1:
      return 0.25f * static_cast<float>(static_cast<int>(generator() % 65) - 32);
    case 2:
      return std::ldexp(value, -130);
    case 3:
      return std::ldexp(value, 100);
    case 4:
      return generator() % 3 ? 0.0f : value;
    default:
      return std::ldexp(value, static_cast<int>(row % 11) - 5);
  }
}

void fill(Case& c, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < c.problem.rows * kBlockSize; ++i) {
    c.values[i] = value_of_row(i / kBlockSize, generator);
  }
  for (int i = 0; i < kBlockSize * kBlockSize; ++i) {
    const bool above = i % kBlockSize > i / kBlockSize;
    c.factor[i] = above ? 0.3f * normal(generator) : 1e30f;  // the others are not read
  }
}

// duqpp/ops/gptq_block.py, for a row.
void check_row(Case& c, int64_t row, const char* where) {
  const GptqBlockProblem& p = c.problem;
  Row values;
  std::memcpy(values.data(), p.values + row * kBlockSize, sizeof(values));
  const auto& block = reinterpret_cast<const float (&)[kBlockSize]>(*values.data());
  const uint32_t exponent = block_scale(block, p.rule);
  const float scale = decode_e8m0(exponent), inverse = inverse_scale(exponent);
  CHECK(p.scales[row] == exponent, "%s, row %d, rule %d: scale %u for %u", where, int(row),
        int(p.rule), p.scales[row], exponent);
  for (int j = 0; j < kBlockSize; ++j) {
    const uint32_t code = encode_e2m1(values[j] * inverse);
    const float rounded = decode_e2m1(code) * scale, error = values[j] - rounded;
    const int64_t at = row * kBlockSize + j;
    const uint32_t stored = (p.codes[at / 2] >> (j % 2 ? 4 : 0)) & 15u;
    CHECK(stored == code && float_bits(p.rounded[at]) == float_bits(rounded) &&
              float_bits(p.compensated[at]) == float_bits(values[j]),
          "%s, row %d, column %d, rule %d: code %u for %u, rounded %a for %a, from %a for %a",
          where, int(row), j, int(p.rule), stored, code, p.rounded[at], rounded,
          p.compensated[at], values[j]);
    for (int i = j + 1; p.factor != nullptr && i < kBlockSize; ++i) {
      const float share = error * p.factor[j * kBlockSize + i];
      values[i] = values[i] - share;
    }
  }
}

void run_as_a_gpu(const GptqBlockProblem& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.factor != nullptr) {
      cuda::gptq_block_row<true>(p, row, p.factor);
    } else {
      cuda::gptq_block_row<false>(p, row, nullptr);
    }
  }
}

void run_on_the_cpu(const GptqBlockProblem& p) { cpu::gptq_block(p, cpu::run_serially); }

void run_in_parts(const GptqBlockProblem& p) {
  cpu::gptq_block(p, [](int64_t tasks, int64_t, const cpu::ParallelBody& body) {
    for (int64_t begin = 0; begin < tasks; begin += 7) body(begin, std::min(tasks, begin + 7));
  });
}

void check_blocks() {
  std::mt19937 generator(1);
  const struct {
    const char* name;
    void (*run)(const GptqBlockProblem&);
  } kernels[] = {{"gpu", run_as_a_gpu}, {"cpu", run_on_the_cpu}, {"cpu in parts", run_in_parts}};
  for (const int64_t rows : {0, 1, 31, 33, 200}) {
    for (const ScaleRule rule : kRules) {
      for (const bool fed : {true, false}) {
        for (const auto& kernel : kernels) {
          Case c(rows);
          fill(c, generator);
          c.problem.rule = rule;
          if (!fed) c.problem.factor = nullptr;
          kernel.run(c.problem);
          for (int64_t row = 0; row < rows; ++row) check_row(c, row, kernel.name);
        }
      }
    }
  }
}

// Values at and beside every tie and power of two, of either sign.
void check_rounding() {
  for (uint32_t high = 0; high < 1u << 16; ++high) {
    for (const uint32_t low : {0u, 1u, 0x7FFFu, 0x8000u, 0xFFFFu}) {
      const float value = float_from_bits(high << 16 | low);
      if (std::isnan(value)) continue;
      const float expected = decode_e2m1(encode_e2m1(value));
      CHECK(float_bits(round_to_e2m1(value)) == float_bits(expected), "%a: %a for %a", value,
            round_to_e2m1(value), expected);
    }
  }
}

}  // namespace
}  // namespace duqpp::testing

int main() {
  duqpp::testing::check_rounding();
  duqpp::testing::check_blocks();
  return duqpp::testing::finish("test_gptq_block");
}
