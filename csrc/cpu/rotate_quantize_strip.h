// The loop of rotate_quantize over a strip of rows, compiled once per instruction set.
//
// A strip is taken block by block: 32 inputs of each row become float32 (the prologue), are
// multiplied by the block's matrix, and each row's 32 outputs are rounded to codes and a scale.
// `Lanes` brings the vectors: kCount floats each, with zero, load, broadcast, multiply_add (fused)
// and store.
//
// No standard library containers here: their out-of-line copies would be built for one instruction
// set and might be linked into code that runs on another.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/silu.h"
#include "format/mx_block.h"
#include "format/narrow_float.h"
#include "format/scale_layout.h"
#include "problem.h"

namespace duqpp::cpu {

inline constexpr int kStripRows = 16;  // rows that share one load of a matrix
inline constexpr int kMatrixSize = kBlockSize * kBlockSize;

// Rows [first_row, first_row + rows), rows <= kStripRows; blocks [first_block, last_block).
struct Strip {
  const RotateQuantizeProblem* problem;
  const float* shared_matrix;  // the one matrix of the problem in float32, or null if not shared
  const float* inverse_rms;    // [M] with Prologue::kRmsNorm
  int64_t first_row, rows;
  int64_t first_block, last_block;
};

using StripFunction = void (*)(const Strip&);

// Where the code for one instruction set is found.
struct StripKernels {
  // The loop for a problem's dtype, prologue and rule.
  StripFunction (*select)(const RotateQuantizeProblem&);
  // 1 / sqrt(mean(x^2) + epsilon) of one row.
  float (*inverse_rms)(const RotateQuantizeProblem&, int64_t row);
};
extern const StripKernels kPortableStrip, kAvx2Strip, kAvx512Strip;

// Element i of a tensor of a dtype.
template <Dtype dtype>
DUQPP_HOST_DEVICE float load_float(const void* data, int64_t i) {
  if constexpr (dtype == Dtype::kFloat32) {
    return static_cast<const float*>(data)[i];
  } else if constexpr (dtype == Dtype::kBFloat16) {
    return decode_bfloat16(static_cast<const uint16_t*>(data)[i]);
  } else {
    return decode_float16(static_cast<const uint16_t*>(data)[i]);
  }
}

// A float32 value as that dtype holds it.
template <Dtype dtype>
DUQPP_HOST_DEVICE float round_to(float value) {
  if constexpr (dtype == Dtype::kBFloat16) return decode_bfloat16(encode_bfloat16(value));
  if constexpr (dtype == Dtype::kFloat16) return decode_float16(encode_float16(value));
  return value;
}

// Each instruction set's copy is a type of its own, so that the linker keeps them apart.
template <typename Lanes>
struct StripLoop {
  template <Dtype dtype, Prologue prologue>
  static inline void load_block(const Strip& s, int64_t row, int64_t block, float* values) {
    const RotateQuantizeProblem& p = *s.problem;
    const int64_t offset = row * p.K + block * kBlockSize;
    for (int i = 0; i < kBlockSize; ++i) values[i] = load_float<dtype>(p.x, offset + i);
    if constexpr (prologue == Prologue::kRmsNorm) {
      const float inverse_rms = s.inverse_rms[row];
      for (int i = 0; i < kBlockSize; ++i) values[i] *= inverse_rms;
      if (p.norm_weight != nullptr) {
        for (int i = 0; i < kBlockSize; ++i) {
          values[i] *= load_float<dtype>(p.norm_weight, block * kBlockSize + i);
        }
      }
    }
    if constexpr (prologue == Prologue::kSiluMul) {
      for (int i = 0; i < kBlockSize; ++i) {
        values[i] = silu(values[i]) * load_float<dtype>(p.up, offset + i);
      }
    }
    if constexpr (prologue != Prologue::kNone) {
      for (int i = 0; i < kBlockSize; ++i) values[i] = round_to<dtype>(values[i]);
    }
  }

  // out[r] = in[r] matrix for kRows rows; sums run over k in order.
  template <int kRows>
  static inline void rotate(const float (*in)[kBlockSize], const float* matrix,
                            float (*out)[kBlockSize]) {
    using Vector = typename Lanes::Vector;
    constexpr int kVectors = Lanes::kTileVectors;
    constexpr int kColumns = kVectors * Lanes::kCount;
    for (int column = 0; column < kBlockSize; column += kColumns) {
      Vector sum[kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Lanes::zero();
      }
      for (int k = 0; k < kBlockSize; ++k) {
        Vector row[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          row[v] = Lanes::load(matrix + k * kBlockSize + column + v * Lanes::kCount);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vector x = Lanes::broadcast(in[r] + k);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[r][v] = Lanes::multiply_add(x, row[v], sum[r][v]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          Lanes::store(out[r] + column + v * Lanes::kCount, sum[r][v]);
        }
      }
    }
  }

  // quantize_block of format/mx_block.h, with loops that a compiler turns into vector code.
  template <ScaleRule rule>
  static inline uint8_t quantize(const float* values, uint8_t* codes) {
    uint32_t amax = 0;
    for (int i = 0; i < kBlockSize; ++i) {
      const uint32_t magnitude = float_bits(values[i]) & 0x7FFFFFFFu;
      amax = amax > magnitude ? amax : magnitude;
    }
    uint32_t scale = scale_exponent(amax, scale_addend(rule));
    if (rule == ScaleRule::kMse && scale != kNanScale) {
      const float factor = inverse_scale(scale);
      double change[8] = {};  // exact, so that the order of the sum is free
      for (int i = 0; i < kBlockSize; i += 8) {
        for (int j = 0; j < 8; ++j) change[j] += error_change(values[i + j] * factor);
      }
      for (int j = 1; j < 8; ++j) change[0] += change[j];
      if (change[0] < 0) ++scale;
    }
    const float factor = inverse_scale(scale);
    uint32_t unpacked[kBlockSize];
    for (int i = 0; i < kBlockSize; ++i) unpacked[i] = encode_e2m1(values[i] * factor);
    for (int i = 0; i < kBlockSize / 2; ++i) {
      codes[i] = pack_e2m1(unpacked[2 * i], unpacked[2 * i + 1]);
    }
    return static_cast<uint8_t>(scale);
  }

  template <Dtype dtype, Prologue prologue, ScaleRule rule>
  static void run(const Strip& s) {
    const RotateQuantizeProblem& p = *s.problem;
    const int64_t blocks = p.K / kBlockSize;
    const int64_t tiles = scale_tiles_along_k(blocks);
    alignas(64) float in[kStripRows][kBlockSize] = {};
    alignas(64) float out[kStripRows][kBlockSize];
    alignas(64) float widened[kMatrixSize];
    for (int64_t block = s.first_block; block < s.last_block; ++block) {
      for (int64_t r = 0; r < s.rows; ++r) {
        load_block<dtype, prologue>(s, s.first_row + r, block, in[r]);
      }
      const float (*rotated)[kBlockSize] = in;
      if (p.rotation != nullptr) {
        const float* matrix = s.shared_matrix;
        if (matrix == nullptr) {
          const uint16_t* own = p.rotation + block * kMatrixSize;
          for (int i = 0; i < kMatrixSize; ++i) widened[i] = decode_bfloat16(own[i]);
          matrix = widened;
        }
        for (int64_t r = 0; r < s.rows; r += Lanes::kTileRows) {
          rotate<Lanes::kTileRows>(in + r, matrix, out + r);
        }
        rotated = out;
      }
      for (int64_t r = 0; r < s.rows; ++r) {
        const int64_t row = s.first_row + r;
        const uint8_t scale =
            quantize<rule>(rotated[r], p.codes + (row * blocks + block) * (kBlockSize / 2));
        const int64_t at = p.scale_layout == ScaleLayout::kSwizzled
                               ? swizzled_offset<int64_t>(row, block, tiles)
                               : row * blocks + block;
        p.scales[at] = scale;
      }
    }
  }

  template <Dtype dtype>
  static float inverse_rms_of(const RotateQuantizeProblem& p, int64_t row) {
    // Thirty-two partial sums, one a column of the block, then theirs in order: one order
    // everywhere.
    float partial[kBlockSize] = {};
    for (int64_t k = 0; k < p.K; k += kBlockSize) {
      for (int i = 0; i < kBlockSize; ++i) {
        const float x = load_float<dtype>(p.x, row * p.K + k + i);
        partial[i] += x * x;
      }
    }
    float sum = 0;
    for (int i = 0; i < kBlockSize; ++i) sum += partial[i];
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(p.K) + p.epsilon);
  }

  static float inverse_rms(const RotateQuantizeProblem& p, int64_t row) {
    switch (p.dtype) {
      case Dtype::kBFloat16:
        return inverse_rms_of<Dtype::kBFloat16>(p, row);
      case Dtype::kFloat16:
        return inverse_rms_of<Dtype::kFloat16>(p, row);
      default:
        return inverse_rms_of<Dtype::kFloat32>(p, row);
    }
  }

  template <Dtype dtype, Prologue prologue>
  static StripFunction with_rule(ScaleRule rule) {
    switch (rule) {
      case ScaleRule::kFloor:
        return run<dtype, prologue, ScaleRule::kFloor>;
      case ScaleRule::kEven:
        return run<dtype, prologue, ScaleRule::kEven>;
      case ScaleRule::kCeil:
        return run<dtype, prologue, ScaleRule::kCeil>;
      default:
        return run<dtype, prologue, ScaleRule::kMse>;
    }
  }

  template <Dtype dtype>
  static StripFunction with_prologue(const RotateQuantizeProblem& p) {
    switch (p.prologue) {
      case Prologue::kRmsNorm:
        return with_rule<dtype, Prologue::kRmsNorm>(p.rule);
      case Prologue::kSiluMul:
        return with_rule<dtype, Prologue::kSiluMul>(p.rule);
      default:
        return with_rule<dtype, Prologue::kNone>(p.rule);
    }
  }

  static StripFunction select(const RotateQuantizeProblem& p) {
    switch (p.dtype) {
      case Dtype::kBFloat16:
        return with_prologue<Dtype::kBFloat16>(p);
      case Dtype::kFloat16:
        return with_prologue<Dtype::kFloat16>(p);
      default:
        return with_prologue<Dtype::kFloat32>(p);
    }
  }

  static constexpr StripKernels kernels() { return {select, inverse_rms}; }
};

}  // namespace duqpp::cpu
