// GPTQ's inner loop as the program of a thread, which takes a row; tests/cpp runs it on the host.
//
// A row's 32 values stay in registers, and every step is unrolled: 496 products, and as many
// differences, that wait for nothing but the 32 roundings in turn. What takes time is that chain,
// some thousands of clocks whatever the number of rows, so that loads and stores are simple: each
// thread moves its own 128 bytes by 16, which the cache puts together.
#pragma once

#include <cstdint>

#include "cuda/warp_program.h"
#include "format/error_change.h"
#include "format/gptq_step.h"
#include "format/mx_block.h"
#include "problem.h"

namespace duqpp::cuda {

inline constexpr int kGptqThreads = 32;  // of a CTA: rows are few, and are spread over all SMs
inline constexpr int kFactorSize = kBlockSize * kBlockSize;

template <typename Element>
struct alignas(16) Quad {
  Element element[4];
};

// block_scale of format/mx_block.h without float64.
DUQPP_HOST_DEVICE uint32_t gptq_scale(const float (&values)[kBlockSize], ScaleRule rule) {
  const uint32_t exponent = scale_exponent(block_amax_bits(values), scale_addend(rule));
  if (rule != ScaleRule::kMse || exponent == kNanScale) return exponent;
  const ErrorChange change = error_change_sums(values, inverse_scale(exponent));
  return exponent + (next_exponent_is_better(change.gain, change.saving) ? 1u : 0u);
}

// The eight quads of a row of 32 values.
DUQPP_HOST_DEVICE const Quad<float>* quads(const float* matrix, int64_t row) {
  return reinterpret_cast<const Quad<float>*>(matrix + row * kBlockSize);
}
DUQPP_HOST_DEVICE Quad<float>* quads(float* matrix, int64_t row) {
  return reinterpret_cast<Quad<float>*>(matrix + row * kBlockSize);
}

// One row. factor: [32, 32] at a multiple of 16 bytes, with kFed.
template <bool kFed>
DUQPP_WARP_PROGRAM void gptq_block_row(const GptqBlockProblem& p, int64_t row,
                                       const float* factor) {
  float values[kBlockSize];
  DUQPP_UNROLL
  for (int i = 0; i < kBlockSize; i += 4) {
    const Quad<float> loaded = quads(p.values, row)[i / 4];
    for (int j = 0; j < 4; ++j) values[i + j] = loaded.element[j];
  }
  const uint32_t exponent = gptq_scale(values, p.rule);
  const float scale = decode_e8m0(exponent), inverse = inverse_scale(exponent);
  Quad<uint32_t> codes{};
  Quad<float> rounded;
  DUQPP_UNROLL
  for (int j = 0; j < kBlockSize; ++j) {
    const GptqStep step = gptq_step(values[j], scale, inverse);
    codes.element[j / 8] |= step.code << (4 * (j % 8));
    rounded.element[j % 4] = step.rounded;
    if (j % 4 == 3) quads(p.rounded, row)[j / 4] = rounded;
    if constexpr (kFed) {
      DUQPP_UNROLL
      for (int i = j + 1; i < kBlockSize; ++i) {
        values[i] = gptq_feed(values[i], step.error, factor[j * kBlockSize + i]);
      }
    }
  }
  DUQPP_UNROLL
  for (int i = 0; i < kBlockSize; i += 4) {
    quads(p.compensated, row)[i / 4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
  }
  reinterpret_cast<Quad<uint32_t>*>(p.codes)[row] = codes;
  p.scales[row] = static_cast<uint8_t>(exponent);
}

}  // namespace duqpp::cuda
