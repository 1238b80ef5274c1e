// rotate_quantize on the CPU, on every instruction set of this machine, against format/mx_block.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/rotate_quantize.h"
#include "cpu/silu.h"
#include "format/mx_block.h"
#include "format/narrow_float.h"
#include "format/scale_layout.h"

namespace duqpp::testing {
namespace {

using cpu::Isa;

// Values of a dtype, as its bytes and as the floats that they mean.
struct Values {
  std::vector<uint8_t> bytes;
  std::vector<float> floats;
};

Values make_values(Dtype dtype, int64_t count, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  Values values;
  for (int64_t i = 0; i < count; ++i) {
    float value = normal(generator) * (generator() % 50 == 0 ? 40.0f : 1.0f);
    uint8_t stored[4];
    size_t size = 2;
    if (dtype == Dtype::kFloat32) {
      size = 4;
      std::memcpy(stored, &value, 4);
    } else {
      const bool wide = dtype == Dtype::kBFloat16;
      const uint16_t half = wide ? encode_bfloat16(value) : encode_float16(value);
      value = wide ? decode_bfloat16(half) : decode_float16(half);
      std::memcpy(stored, &half, 2);
    }
    values.bytes.insert(values.bytes.end(), stored, stored + size);
    values.floats.push_back(value);
  }
  return values;
}

struct Result {
  std::vector<uint8_t> codes, scales;
};

// The definition: prologue, then sums over k in order by fused multiply-adds, then quantize_block.
Result expected(const RotateQuantizeProblem& p, const Values& x, const Values& up,
                const Values& norm) {
  const int64_t blocks = p.K / kBlockSize;
  const bool swizzled = p.scale_layout == ScaleLayout::kSwizzled;
  Result result{std::vector<uint8_t>(p.M * p.K / 2),
                std::vector<uint8_t>(swizzled ? swizzled_size(p.M, blocks) : p.M * blocks)};
  for (int64_t row = 0; row < p.M; ++row) {
    float partial[kBlockSize] = {}, mean = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      const float value = x.floats[row * p.K + k];
      partial[k % kBlockSize] += value * value;
    }
    for (const float sum : partial) mean += sum;
    const float inverse_rms = 1.0f / std::sqrt(mean / static_cast<float>(p.K) + p.epsilon);
    for (int64_t block = 0; block < blocks; ++block) {
      float in[kBlockSize], out[kBlockSize];
      for (int i = 0; i < kBlockSize; ++i) {
        const int64_t k = block * kBlockSize + i;
        in[i] = x.floats[row * p.K + k];
        if (p.prologue == Prologue::kRmsNorm) {
          in[i] *= inverse_rms;
          if (p.norm_weight != nullptr) in[i] *= norm.floats[k];
        }
        if (p.prologue == Prologue::kSiluMul) in[i] = cpu::silu(in[i]) * up.floats[row * p.K + k];
        if (p.prologue == Prologue::kNone) continue;
        if (p.dtype == Dtype::kBFloat16) in[i] = decode_bfloat16(encode_bfloat16(in[i]));
        if (p.dtype == Dtype::kFloat16) in[i] = decode_float16(encode_float16(in[i]));
      }
      for (int n = 0; n < kBlockSize; ++n) {
        out[n] = in[n];
        if (p.rotation == nullptr) continue;
        const uint16_t* matrix = p.rotation + (p.rotation_matrices == 1 ? 0 : block) * 1024;
        out[n] = 0;
        for (int k = 0; k < kBlockSize; ++k) {
          out[n] = std::fma(in[k], decode_bfloat16(matrix[k * kBlockSize + n]), out[n]);
        }
      }
      const int64_t index = row * blocks + block;
      const int64_t at =
          swizzled ? swizzled_offset<int64_t>(row, block, scale_tiles_along_k(blocks)) : index;
      result.scales[at] = quantize_block(out, p.rule, result.codes.data() + index * 16);
    }
  }
  return result;
}

// Tasks in pieces of odd sizes, last first.
void run_in_pieces(int64_t tasks, int64_t grain, const cpu::ParallelBody& body) {
  const int64_t piece = grain + 2;
  for (int64_t begin = (tasks - 1) / piece * piece; begin >= 0 && tasks > 0; begin -= piece) {
    body(begin, std::min(tasks, begin + piece));
  }
}

void check_problem(RotateQuantizeProblem p, std::mt19937& generator, bool with_norm_weight) {
  const Values x = make_values(p.dtype, p.M * p.K, generator);
  const Values up = make_values(p.dtype, p.M * p.K, generator);
  const Values norm = make_values(p.dtype, p.K, generator);
  const Values matrices = make_values(Dtype::kBFloat16, p.rotation_matrices * 1024, generator);
  p.x = x.bytes.data();
  p.up = up.bytes.data();
  p.norm_weight = with_norm_weight ? norm.bytes.data() : nullptr;
  p.epsilon = 0.25f;
  std::vector<uint16_t> rotation(p.rotation_matrices * 1024);
  if (!rotation.empty()) {
    std::memcpy(rotation.data(), matrices.bytes.data(), matrices.bytes.size());
  }
  p.rotation = p.rotation_matrices == 0 ? nullptr : rotation.data();
  const Result want = expected(p, x, up, norm);
  for (const Isa isa : cpu::supported_isas()) {
    Result got{std::vector<uint8_t>(want.codes.size(), 0xFF),  // poison: padding must be written
               std::vector<uint8_t>(want.scales.size(), 0xFF)};
    p.codes = got.codes.data();
    p.scales = got.scales.data();
    cpu::rotate_quantize(p, isa, run_in_pieces);
    CHECK(got.codes == want.codes && got.scales == want.scales,
          "%s, [%ld, %ld], dtype %d, prologue %d, rule %d, %ld matrices, layout %d",
          cpu::isa_name(isa), static_cast<long>(p.M), static_cast<long>(p.K),
          static_cast<int>(p.dtype), static_cast<int>(p.prologue), static_cast<int>(p.rule),
          static_cast<long>(p.rotation_matrices), static_cast<int>(p.scale_layout));
  }
}

void test_every_variant() {
  std::mt19937 generator(1);
  const std::pair<int64_t, int64_t> shapes[] = {{1, 32}, {3, 96}, {16, 160}, {17, 64}, {130, 32}};
  for (const auto& [M, K] : shapes) {
    for (int variant = 0; variant < 3 * 3 * 4 * 3 * 2; ++variant) {
      RotateQuantizeProblem p{};
      p.M = M;
      p.K = K;
      p.dtype = static_cast<Dtype>(variant % 3);
      p.prologue = static_cast<Prologue>(variant / 3 % 3);
      p.rule = static_cast<ScaleRule>(variant / 9 % 4);
      p.rotation_matrices = variant / 36 % 3 == 0 ? 0 : variant / 36 % 3 == 1 ? 1 : K / 32;
      p.scale_layout = static_cast<ScaleLayout>(variant / 108);
      check_problem(p, generator, variant % 2 == 0);
    }
  }
  RotateQuantizeProblem wide{};  // one row, cut along K
  wide.M = 1;
  wide.K = 16384;
  wide.rotation_matrices = wide.K / 32;
  wide.rule = ScaleRule::kEven;
  check_problem(wide, generator, false);
}

void test_values_that_are_not_finite() {
  for (const float bad :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    for (const Isa isa : cpu::supported_isas()) {
      std::vector<float> x(96, 1.0f);
      x[40] = bad;
      uint8_t codes[48], scales[3];
      RotateQuantizeProblem p{};
      p.M = 1;
      p.K = 96;
      p.dtype = Dtype::kFloat32;
      p.x = x.data();
      p.codes = codes;
      p.scales = scales;
      cpu::rotate_quantize(p, isa, cpu::run_serially);
      CHECK(scales[0] != 255 && scales[1] == 255 && scales[2] != 255, "%s: %d %d %d",
            cpu::isa_name(isa), scales[0], scales[1], scales[2]);
    }
  }
}

// round_to_e2m1 equals a decoded code, and silu its value in double, on bits drawn from everywhere.
void test_arithmetic() {
  double worst = 0;
  for (uint64_t bits = 0; bits < (1ull << 32); bits += 4099) {
    const float value = float_from_bits(static_cast<uint32_t>(bits));
    if (std::isnan(value)) continue;
    CHECK(round_to_e2m1(value) == decode_e2m1(encode_e2m1(value)), "bits %llx",
          static_cast<unsigned long long>(bits));
    if (!(std::fabs(value) < 80.0f)) continue;
    const double exact = value / (1.0 + std::exp(-static_cast<double>(value)));
    if (std::fabs(exact) > 1e-30) {
      worst = std::max(worst, std::fabs(cpu::silu(value) - exact) / std::fabs(exact));
    }
  }
  // exp's 2 units in the last place, a rounded sum and a rounded quotient.
  CHECK(worst < 4 * 0x1p-23, "silu is off by %g, relative", worst);
  CHECK(cpu::silu(-1e30f) == 0.0f && cpu::silu(1e30f) == 1e30f && cpu::silu(0.0f) == 0.0f, "%g %g",
        cpu::silu(-1e30f), cpu::silu(1e30f));
  CHECK(std::isnan(cpu::silu(std::numeric_limits<float>::quiet_NaN())), "NaN");
}

}  // namespace
}  // namespace duqpp::testing

int main() {
  duqpp::testing::test_every_variant();
  duqpp::testing::test_values_that_are_not_finite();
  duqpp::testing::test_arithmetic();
  return duqpp::testing::finish("test_cpu_rotate_quantize");
}
