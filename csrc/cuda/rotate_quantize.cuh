// rotate_quantize on a GPU: from 16-bit x [M, K] to E2M1 codes and E8M0 scales, in one pass.
//
// Work. A warp takes one block of 32 columns at a time, holds its matrix in 16 registers a lane,
// and streams tiles of 16 rows: load, prologue, rotate (8 MMAs), amax, scale, round, store. Four
// warps, a team, take the four blocks of a column of scale tiles. No value passes through shared
// memory; the next tile's loads are in flight during a tile's arithmetic. Scales go where the GEMM
// reads them, padding included, so that no memset and no reordering kernel runs.
//
// Traffic, per row: 2 K bytes read (4 K with kSiluMul), K/2 + K/32 written; a matrix is read once
// per warp. kRmsNorm reads its rows twice: a CTA first sums their squares over all of K, then
// quantizes its columns of them, which by then are in L2.
//
// Meaning. kNone rotates x itself. The other prologues are computed in float32 and rounded once to
// the dtype of x, the tensor that the model would have passed. A bfloat16 value is one term of the
// MMA. A float16 value is the sum of two bfloat16 terms, exactly (11 significand bits = 8 + 3), so
// that both dtypes multiply bfloat16 matrices with exact products and float32 sums.
//
// This file has no GPU instruction: a policy `Warp` brings them, and the state that each lane has
// (Lanes<T>). GpuWarp (gpu_warp.cuh) is one lane of a warp; the host test's policy is an array of
// 32, so that everything below, loops included, also runs on a CPU.
#pragma once

#include <math.h>

#include <cstdint>

#include "cuda/rotate_quantize_plan.h"
#include "cuda/warp_program.h"
#include "format/e8m0.h"
#include "format/error_change.h"
#include "format/fragment.h"
#include "format/mx_block.h"
#include "problem.h"

namespace duqpp::cuda {

// The compile-time half of a problem.
template <Dtype kDtype_, Prologue kPrologue_, ScaleRule kRule_, bool kRotate_>
struct RotateQuantizeTraits {
  static constexpr Dtype kDtype = kDtype_;
  static constexpr Prologue kPrologue = kPrologue_;
  static constexpr ScaleRule kRule = kRule_;
  static constexpr bool kRotate = kRotate_;  // false: R is the identity
  static_assert(kDtype == Dtype::kBFloat16 || kDtype == Dtype::kFloat16);

  static constexpr int kInputs = kPrologue == Prologue::kSiluMul ? 2 : 1;
  static constexpr int kTerms = kDtype == Dtype::kFloat16 ? 2 : 1;
  static constexpr bool kNorm = kPrologue == Prologue::kRmsNorm;
  static constexpr int kMaxThreads = kWarpLanes * kTeamWarps * (kNorm ? kMaxTeams : 1);
  // CTAs that fit an SM at once, which bounds registers: 128, 80 and 72 of the SM's 65536.
  static constexpr int kMinCtas = kNorm ? 2 : kPrologue == Prologue::kSiluMul ? 6 : 7;
};

// What a kernel is launched with.
struct RotateQuantizeParams {
  RotateQuantizeProblem problem;
  RotateQuantizePlan plan;
  ScaleStrides scale_strides;
};

// ---- What a lane does by itself ----

// The inputs of one lane for one tile: x and, with kSiluMul, up.
template <class Traits>
struct LaneInput {
  Words words[Traits::kInputs][kLaneRows];
};

// One lane's rotated values, or x itself without a rotation; also the MMA's accumulators.
struct LaneValues {
  float value[kLaneRows][kLaneValues];
};

// What a lane holds for one block whatever the row.
struct LaneConstants {
  MatrixFragment matrix;
  float norm_weight[kLaneValues];
};

// Where a lane reads and writes; x and up run ahead of codes by the tile in flight.
struct LanePointers {
  const uint16_t* x;  // row r of the next tile
  const uint16_t* up;
  uint32_t* codes;  // row r of this tile: eight codes
  uint8_t* scales;  // row r of the tile at row 0
};

// Eight values of a row, ready to rotate: words of the dtype of x.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM Words apply_prologue(const LaneInput<Traits>& input, int h,
                                        const LaneConstants& constants, float reciprocal_rms) {
  if constexpr (Traits::kPrologue == Prologue::kNone) return input.words[0][h];
  float values[kLaneValues];
  Warp::template unpack<Traits::kDtype>(input.words[0][h], values);
  if constexpr (Traits::kPrologue == Prologue::kSiluMul) {
    float up[kLaneValues];
    Warp::template unpack<Traits::kDtype>(input.words[1][h], up);
    for (int i = 0; i < kLaneValues; ++i) values[i] = Warp::silu(values[i]) * up[i];
  }
  if constexpr (Traits::kNorm) {
    for (int i = 0; i < kLaneValues; ++i) {
      values[i] = values[i] * reciprocal_rms * constants.norm_weight[i];
    }
  }
  return Warp::template pack<Traits::kDtype>(values);
}

// Splits eight values into bfloat16 terms whose sum they are; see the head of this file.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void split_terms(const Words& words, Words (&terms)[Traits::kTerms]) {
  if constexpr (Traits::kTerms == 1) {
    terms[0] = words;
  } else {
    float values[kLaneValues], high[kLaneValues];
    Warp::template unpack<Dtype::kFloat16>(words, values);
    terms[0] = Warp::template pack<Dtype::kBFloat16>(values);
    Warp::template unpack<Dtype::kBFloat16>(terms[0], high);
    for (int i = 0; i < kLaneValues; ++i) values[i] -= high[i];
    terms[1] = Warp::template pack<Dtype::kBFloat16>(values);
  }
}

// ---- What a warp does for one tile ----

// Round and store: the tile's values become codes and scales. Without kWhole, rows from M on have
// no codes, and scale 0 where the layout pads.
template <class Traits, bool kWhole, class Warp>
DUQPP_WARP_PROGRAM void quantize_tile(const RotateQuantizeParams& params, int row,
                                      typename Warp::template Lanes<LaneValues>& tile,
                                      const typename Warp::template Lanes<LanePointers>& pointers) {
  // Only floor's exponent, with which mse starts, leaves magnitudes of 7 and more.
  constexpr bool kSaturate = Traits::kRule == ScaleRule::kFloor || Traits::kRule == ScaleRule::kMse;
  using Exponents = typename Warp::template Lanes<uint32_t>;
  const int64_t words_per_row = params.problem.K / kLaneValues;
  const uint32_t tile_offset = scale_tile_offset(params.scale_strides, row);
  DUQPP_UNROLL
  for (int h = 0; h < kLaneRows; ++h) {
    Exponents exponent;
    Warp::for_each_lane([&](int lane) { exponent[lane] = Warp::amax_bits(tile[lane].value[h]); });
    Warp::quad_max(exponent);
    Warp::for_each_lane([&](int lane) {
      exponent[lane] = scale_exponent(exponent[lane], scale_addend(Traits::kRule));
    });
    if constexpr (Traits::kRule == ScaleRule::kMse) {
      Exponents gain, saving;
      Warp::for_each_lane([&](int lane) {
        const ErrorChange sums =
            error_change_sums(tile[lane].value[h], inverse_scale(exponent[lane]));
        gain[lane] = sums.gain;
        saving[lane] = sums.saving;
      });
      Warp::quad_sum(gain);
      Warp::quad_sum(saving);
      Warp::for_each_lane([&](int lane) {
        const bool step =
            exponent[lane] != kNanScale && next_exponent_is_better(gain[lane], saving[lane]);
        exponent[lane] += step;
      });
    }
    Warp::for_each_lane([&](int lane) {
      const int lanes_row = row + lane_row(lane) + 8 * h;
      const LanePointers& at = pointers[lane];
      const bool live = kWhole || lanes_row < params.problem.M;
      const uint32_t codes =
          Warp::template encode<kSaturate>(tile[lane].value[h], inverse_scale(exponent[lane]));
      if (live) at.codes[h * 8 * words_per_row] = codes;
      if (lane_column(lane) == 0 && (kWhole || lanes_row < params.plan.scale_rows)) {
        at.scales[tile_offset + h * params.scale_strides.h] =
            static_cast<uint8_t>(live ? exponent[lane] : 0);
      }
    });
  }
}

// y += x R for the tile, x one of its terms: two k16 steps of four n8 tiles. fragment.h says why
// row r and row r + 8 of a step are just words 2 step and 2 step + 1 of the two loads.
template <class Warp, class Terms>
DUQPP_WARP_PROGRAM void multiply_add(const typename Warp::template Lanes<Terms>& terms, int term,
                                     const typename Warp::template Lanes<LaneConstants>& constants,
                                     typename Warp::template Lanes<LaneValues>& tile) {
  typename Warp::template Lanes<MmaA> a;
  typename Warp::template Lanes<MmaB> b;
  typename Warp::template Lanes<MmaC> c;
  DUQPP_UNROLL
  for (int step = 0; step < kMmaSteps; ++step) {
    Warp::for_each_lane([&](int lane) {
      const Words(&x)[kLaneRows] = terms[lane][term];
      a[lane] = {{x[0].word[2 * step], x[1].word[2 * step],  //
                  x[0].word[2 * step + 1], x[1].word[2 * step + 1]}};
    });
    DUQPP_UNROLL
    for (int t = 0; t < kMmaTiles; ++t) {
      Warp::for_each_lane([&](int lane) {
        const uint32_t (&matrix)[2] = constants[lane].matrix.word[step][t];
        const float (&y)[kLaneRows][kLaneValues] = tile[lane].value;
        b[lane] = {{matrix[0], matrix[1]}};
        c[lane] = {{y[0][2 * t], y[0][2 * t + 1], y[1][2 * t], y[1][2 * t + 1]}};
      });
      Warp::mma(a, b, c);
      Warp::for_each_lane([&](int lane) {
        for (int h = 0; h < kLaneRows; ++h) {
          for (int i = 0; i < 2; ++i) tile[lane].value[h][2 * t + i] = c[lane].value[2 * h + i];
        }
      });
    }
  }
}

// Prologue and rotation of one tile.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void rotate_tile(
    const typename Warp::template Lanes<LaneInput<Traits>>& input,
    const typename Warp::template Lanes<LaneConstants>& constants,
    const float* reciprocal_rms,  // of the tile's rows, with kRmsNorm
    typename Warp::template Lanes<LaneValues>& tile) {
  using Terms = Words[Traits::kTerms][kLaneRows];
  typename Warp::template Lanes<Terms> terms;
  Warp::for_each_lane([&](int lane) {
    for (int h = 0; h < kLaneRows; ++h) {
      float rms = 0;
      if constexpr (Traits::kNorm) rms = reciprocal_rms[lane_row(lane) + 8 * h];
      const Words words = apply_prologue<Traits, Warp>(input[lane], h, constants[lane], rms);
      if constexpr (Traits::kRotate) {
        Words split[Traits::kTerms];
        split_terms<Traits, Warp>(words, split);
        for (int term = 0; term < Traits::kTerms; ++term) terms[lane][term][h] = split[term];
        for (int i = 0; i < kLaneValues; ++i) tile[lane].value[h][i] = 0;
      } else {
        Warp::template unpack<Traits::kDtype>(words, tile[lane].value[h]);
      }
    }
  });
  if constexpr (Traits::kRotate) {
    for (int term = Traits::kTerms - 1; term >= 0; --term) {  // the small term first
      multiply_add<Warp, Terms>(terms, term, constants, tile);
    }
  }
}

// ---- The warp's loops ----

// Matrix and norm weight of a block. Neither depends on the kernel that writes x, so that a warp
// reads its first block's before it waits for that kernel.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void load_constants(const RotateQuantizeParams& params, int block,
                                       typename Warp::template Lanes<LaneConstants>& constants) {
  const RotateQuantizeProblem& problem = params.problem;
  if (block >= static_cast<int>(problem.K / kBlockSize)) return;
  if constexpr (Traits::kRotate) {
    const int64_t index = problem.rotation_matrices > 1 ? block : 0;
    const uint16_t* matrix = problem.rotation + index * (kBlockSize * kBlockSize);
    Warp::for_each_lane([&](int lane) {
      Words rows[kLaneValues];
      for (int j = 0; j < kLaneValues; ++j) {
        rows[j] = Words{};
        Warp::load(rows[j], matrix + fragment_row(lane, j) * kBlockSize + fragment_column(lane),
                   true);
      }
      constants[lane].matrix = matrix_fragment(rows, lane);
    });
  }
  if constexpr (Traits::kNorm) {
    Warp::for_each_lane([&](int lane) {
      for (int i = 0; i < kLaneValues; ++i) constants[lane].norm_weight[i] = 1;
      if (problem.norm_weight == nullptr) return;
      Words words{};
      Warp::load(words,
                 static_cast<const uint16_t*>(problem.norm_weight) + int64_t{block} * kBlockSize +
                     lane_column(lane),
                 true);
      Warp::template unpack<Traits::kDtype>(words, constants[lane].norm_weight);
    });
  }
}

// Loads row r and row r + 8 of the next tile where `first` and `second` say so.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void load_input(const LanePointers& at, int64_t K, bool first, bool second,
                                   LaneInput<Traits>& input) {
  Warp::load(input.words[0][0], at.x, first);
  Warp::load(input.words[0][1], at.x + 8 * K, second);
  if constexpr (Traits::kPrologue == Prologue::kSiluMul) {
    Warp::load(input.words[1][0], at.up, first);
    Warp::load(input.words[1][1], at.up + 8 * K, second);
  }
}

// One block for the task's rows: whole tiles, then the ragged one, then the scales' padding.
// reciprocal_rms[i] belongs to row first_row + i.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void rotate_quantize_block(
    const RotateQuantizeParams& params, const WarpTask& task, int block,
    const typename Warp::template Lanes<LaneConstants>& constants, const float* reciprocal_rms) {
  const RotateQuantizeProblem& problem = params.problem;
  const int64_t K = problem.K;
  const int live_rows = block < static_cast<int>(K / kBlockSize) ? static_cast<int>(problem.M) : 0;
  const int whole_rows = live_rows & ~(kTileRows - 1);
  const int whole_end = task.end_row < whole_rows ? task.end_row : whole_rows;
  int row = task.first_row;

  typename Warp::template Lanes<LanePointers> pointers;
  typename Warp::template Lanes<LaneInput<Traits>> next;
  typename Warp::template Lanes<LaneValues> tile;
  Warp::for_each_lane([&](int lane) {
    const int64_t first =
        int64_t{row + lane_row(lane)} * K + int64_t{block} * kBlockSize + lane_column(lane);
    LanePointers& at = pointers[lane];
    at.x = static_cast<const uint16_t*>(problem.x) + first;
    at.up = Traits::kInputs == 2 ? static_cast<const uint16_t*>(problem.up) + first : nullptr;
    at.codes = reinterpret_cast<uint32_t*>(problem.codes) + first / kLaneValues;
    at.scales = problem.scales + scale_block_offset(problem.scale_layout, block) +
                lane_row(lane) * params.scale_strides.r;
    next[lane] = LaneInput<Traits>{};
    load_input<Traits, Warp>(at, K, row < whole_end, row < whole_end, next[lane]);
  });

  for (; row < whole_end; row += kTileRows) {
    const auto input = next;
    const bool more = row + kTileRows < whole_end;
    Warp::for_each_lane([&](int lane) {
      pointers[lane].x += kTileRows * K;
      if constexpr (Traits::kInputs == 2) pointers[lane].up += kTileRows * K;
      if (more) load_input<Traits, Warp>(pointers[lane], K, true, true, next[lane]);
    });
    rotate_tile<Traits, Warp>(input, constants, reciprocal_rms + (row - task.first_row), tile);
    quantize_tile<Traits, true, Warp>(params, row, tile, pointers);
    Warp::for_each_lane([&](int lane) { pointers[lane].codes += kTileRows * K / kLaneValues; });
  }

  if (row < live_rows && row < task.end_row) {
    Warp::for_each_lane([&](int lane) {
      const int lanes_row = row + lane_row(lane);
      next[lane] = LaneInput<Traits>{};
      load_input<Traits, Warp>(pointers[lane], K, lanes_row < live_rows, lanes_row + 8 < live_rows,
                               next[lane]);
    });
    rotate_tile<Traits, Warp>(next, constants, reciprocal_rms + (row - task.first_row), tile);
    quantize_tile<Traits, false, Warp>(params, row, tile, pointers);
    row += kTileRows;
  }

  for (; row < task.end_row; row += kTileRows) {  // only where the layout pads: whole tiles
    Warp::for_each_lane([&](int lane) {
      if (lane_column(lane) != 0) return;
      uint8_t* scale = pointers[lane].scales + scale_tile_offset(params.scale_strides, row);
      scale[0] = 0;
      scale[params.scale_strides.h] = 0;
    });
  }
}

// All of a warp's work after load_constants of its first block.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void rotate_quantize_warp(
    const RotateQuantizeParams& params, const WarpTask& task,
    typename Warp::template Lanes<LaneConstants>& constants, const float* reciprocal_rms) {
  for (int block = task.first_block; block < task.end_block; block += task.block_step) {
    if (block != task.first_block) load_constants<Traits, Warp>(params, block, constants);
    rotate_quantize_block<Traits, Warp>(params, task, block, constants, reciprocal_rms);
    // A loop around the tiles' loop costs 30 moves a tile, and only kRmsNorm plans need one.
    if constexpr (!Traits::kNorm) break;
  }
}

// ---- Reciprocal rms, kRmsNorm ----

// Part p of a row's sum of squares: the values of the 256-wide pieces p, p + 4, p + 8, ... Each
// lane sums its eight columns of them in order, then the lanes are summed as a tree: the order
// depends on nothing but K, so that a row's result does not depend on the batch that it is in.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM float sum_of_squares(const RotateQuantizeProblem& problem, int row, int part) {
  constexpr int kPiece = kWarpLanes * kLaneValues;
  const uint16_t* x = static_cast<const uint16_t*>(problem.x) + row * problem.K;
  typename Warp::template Lanes<float> sum;
  Warp::for_each_lane([&](int lane) {
    sum[lane] = 0;
    for (int64_t column = part * kPiece + lane * kLaneValues; column < problem.K;
         column += kRowParts * kPiece) {
      Words words{};
      Warp::load(words, x + column, true);
      float values[kLaneValues];
      Warp::template unpack<Traits::kDtype>(words, values);
      for (int i = 0; i < kLaneValues; ++i) sum[lane] = fmaf(values[i], values[i], sum[lane]);
    }
  });
  return Warp::tree_sum(sum);
}

// The sums of squares of a CTA's rows and what becomes of them.
struct NormRows {
  float parts[kMaxNormRows][kRowParts];
  float reciprocal_rms[kMaxNormRows];
};

// A warp's share of the parts; the CTA waits for all of them before finish_norm_row.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void sum_norm_rows(const RotateQuantizeParams& params, const WarpTask& task,
                                      int warp, NormRows& rows) {
  const int units = params.plan.rows_per_cta * kRowParts;
  for (int unit = warp; unit < units; unit += params.plan.teams * kTeamWarps) {
    const int row = task.first_row + unit / kRowParts, part = unit % kRowParts;
    const bool live = row < params.problem.M;
    rows.parts[unit / kRowParts][part] =
        live ? sum_of_squares<Traits, Warp>(params.problem, row, part) : 0;
  }
}

DUQPP_HOST_DEVICE void finish_norm_row(const RotateQuantizeProblem& problem, int row,
                                       NormRows& rows) {
  const float (&parts)[kRowParts] = rows.parts[row];
  const float sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  const float mean = sum / static_cast<float>(problem.K);
  rows.reciprocal_rms[row] = 1.0f / sqrtf(mean + problem.epsilon);
}

}  // namespace duqpp::cuda
