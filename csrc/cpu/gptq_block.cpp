#include "cpu/gptq_block.h"

#include "format/gptq_step.h"
#include "format/mx_block.h"

namespace duqpp::cpu {
namespace {

// Rows side by side, so that a compiler makes vector code of loops over them. More than 16, because
// of a shorter loop it makes a list of statements first.
constexpr int kLanes = 32;

// A value of each row.
using Floats = float[kLanes];
using Words = uint32_t[kLanes];

// Column j of a strip of rows is values[j]; lanes without a row stay zero.
struct Strip {
  Floats values[kBlockSize];
  Floats rounded[kBlockSize];
  Words codes[kBlockSize];
  Words exponents;
  Floats scales, inverses;
};

void load(const GptqBlockProblem& p, int64_t first, int rows, Strip& strip) {
  for (int r = 0; r < rows; ++r) {
    const float* const row = p.values + (first + r) * kBlockSize;
    for (int j = 0; j < kBlockSize; ++j) strip.values[j][r] = row[j];
  }
}

// block_scale of format/mx_block.h, of every row.
void choose_scales(ScaleRule rule, Strip& strip) {
  Words amax = {};
  for (const Floats& column : strip.values) {
    for (int r = 0; r < kLanes; ++r) {
      const uint32_t magnitude = float_bits(column[r]) & 0x7FFFFFFFu;
      amax[r] = amax[r] > magnitude ? amax[r] : magnitude;
    }
  }
  const uint32_t addend = scale_addend(rule);
  for (int r = 0; r < kLanes; ++r) {
    strip.exponents[r] = scale_exponent(amax[r], addend);
    strip.inverses[r] = inverse_scale(strip.exponents[r]);
  }
  if (rule == ScaleRule::kMse) {
    double change[kLanes] = {};
    for (const Floats& column : strip.values) {
      for (int r = 0; r < kLanes; ++r) change[r] += error_change(column[r] * strip.inverses[r]);
    }
    for (int r = 0; r < kLanes; ++r) {
      if (change[r] < 0 && strip.exponents[r] != kNanScale) ++strip.exponents[r];
    }
  }
  for (int r = 0; r < kLanes; ++r) {
    strip.scales[r] = decode_e8m0(strip.exponents[r]);
    strip.inverses[r] = inverse_scale(strip.exponents[r]);
  }
}

void round_column(const Floats& values, const Floats& scales, const Floats& inverses, Words& codes,
                  Floats& rounded, Floats& errors) {
  for (int r = 0; r < kLanes; ++r) {
    const GptqStep step = gptq_step(values[r], scales[r], inverses[r]);
    codes[r] = step.code;
    rounded[r] = step.rounded;
    errors[r] = step.error;
  }
}

void round_columns(const float* factor, Strip& strip) {
  for (int j = 0; j < kBlockSize; ++j) {
    Floats errors;
    round_column(strip.values[j], strip.scales, strip.inverses, strip.codes[j], strip.rounded[j],
                 errors);
    for (int i = j + 1; factor != nullptr && i < kBlockSize; ++i) {
      const float share = factor[j * kBlockSize + i];
      Floats& later = strip.values[i];
      for (int r = 0; r < kLanes; ++r) later[r] = gptq_feed(later[r], errors[r], share);
    }
  }
}

void store(const GptqBlockProblem& p, int64_t first, int rows, const Strip& strip) {
  for (int r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    for (int j = 0; j < kBlockSize; ++j) {
      p.compensated[row * kBlockSize + j] = strip.values[j][r];
      p.rounded[row * kBlockSize + j] = strip.rounded[j][r];
    }
    for (int i = 0; i < kBlockSize / 2; ++i) {
      p.codes[row * (kBlockSize / 2) + i] =
          pack_e2m1(strip.codes[2 * i][r], strip.codes[2 * i + 1][r]);
    }
    p.scales[row] = static_cast<uint8_t>(strip.exponents[r]);
  }
}

constexpr int64_t kRowsPerTask = 256;  // some 20 microseconds of work, worth a thread's waking

}  // namespace

void gptq_block(const GptqBlockProblem& problem, const ParallelFor& parallel_for) {
  parallel_for(problem.rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    Strip strip{};
    for (int64_t first = begin; first < end; first += kLanes) {
      const int rows = static_cast<int>(end - first < kLanes ? end - first : kLanes);
      load(problem, first, rows, strip);
      choose_scales(problem.rule, strip);
      round_columns(problem.factor, strip);
      store(problem, first, rows, strip);
    }
  });
}

}  // namespace duqpp::cpu
