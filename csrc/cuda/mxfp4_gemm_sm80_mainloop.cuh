// The main loop of mxfp4_gemm_sm80.cuh: from a segment's codes and scales to its sums, in a warp's
// memory.
#pragma once

#include <cstdint>

#include "cuda/mxfp4_gemm_sm80_pipeline.cuh"
#include "cuda/mxfp4_gemm_sm80_state.cuh"
#include "cuda/warp_program.h"
#include "format/block_sum.h"
#include "format/e8m0.h"
#include "format/weight_fragment.h"
#include "problem.h"

namespace duqpp::cuda {

DUQPP_HOST_DEVICE constexpr bool is_huge_scale(uint32_t exponent) {
  return exponent >= kFirstHugeScale && exponent != kNanScale;
}

// The scales of a segment as floats, of blocks beyond the last whatever they are. Returns whether
// one of x, in any lane, is too large for the usual arithmetic.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM bool decode_scales(
    const typename Warp::template Lanes<LaneScales<Traits>>& scales, WarpMemory<Traits>& memory) {
  typename Warp::template Lanes<bool> huge;
  Warp::for_each_lane([&](int lane) {
    huge[lane] = false;
    DUQPP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int block = 4 * (lane & 3) + i;
      float (&weight)[2 * Traits::kRowTiles] = memory.scales.weight[block][lane_row(lane)];
      DUQPP_UNROLL
      for (int t = 0; t < Traits::kRowTiles; ++t) {
        DUQPP_UNROLL
        for (int h = 0; h < 2; ++h) {
          weight[2 * t + h] = decode_e8m0((scales[lane].weight[t][h] >> (8 * i)) & 0xFFu);
        }
      }
      DUQPP_UNROLL
      for (int t = 0; t < Traits::kColumnTiles; ++t) {
        const uint32_t exponent = (scales[lane].activation[t] >> (8 * i)) & 0xFFu;
        const float a = decode_e8m0(exponent);
        float (&activation)[2] = memory.scales.activation[t][block][lane_row(lane)];
        activation[0] = a;
        activation[1] = -kMagic * a;
        huge[lane] |= is_huge_scale(exponent);
      }
    }
  });
  Warp::sync();
  return Warp::any(huge);
}

// Eight codes to eight bytes of the two terms of W, [term][low or high half of the word].
template <class Warp, class Constants>
DUQPP_WARP_PROGRAM void expand_weight(const Constants& constants, uint32_t word,
                                      uint32_t (&terms)[2][2]) {
  const uint32_t magnitudes = word & 0x77777777u;
  terms[0][0] = Warp::permute(constants.twice, kTwice.high, word);
  terms[0][1] = Warp::permute(constants.twice, kTwice.high, word >> 16);
  terms[1][0] = Warp::permute(constants.negated, kNegated.high, magnitudes);
  terms[1][1] = Warp::permute(constants.negated, kNegated.high, magnitudes >> 16);
}

template <class Warp, class Constants>
DUQPP_WARP_PROGRAM MmaB8 expand_activation(const Constants& constants, uint32_t word) {
  const uint32_t magnitudes = word & 0x77777777u;
  MmaB8 b;
  DUQPP_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t twice = Warp::permute(constants.twice, kTwice.high, word >> (16 * half));
    const uint32_t excess =
        Warp::permute(constants.excess_128, kExcess128.high, magnitudes >> (16 * half));
    b.word[half] = (twice + excess) ^ 0x80808080u;
  }
  return b;
}

// What a lane multiplies for one block: rows r and r + 8 of tiles of W, row r of tiles of x.
template <class Traits>
struct LaneBlock {
  uint32_t weight[Traits::kRowTiles][2];
  uint32_t activation[Traits::kColumnTiles];
};

// Adds the products of block `block` of the segment. With kHuge for any scales of x, else for those
// below 2^107.
template <class Traits, bool kHuge, class Warp>
DUQPP_WARP_PROGRAM void multiply_block(
    const WarpMemory<Traits>& memory, int block,
    const typename Warp::template Lanes<LaneConstants80<Traits>>& constants,
    const typename Warp::template Lanes<LaneBlock<Traits>>& codes,
    typename Warp::template Lanes<LaneSums<Traits>>& sums) {
  typename Warp::template Lanes<MmaC32> magic;
  typename Warp::template Lanes<MmaB8> x[Traits::kColumnTiles];
  Warp::for_each_lane([&](int lane) {
    for (int32_t& value : magic[lane].value) value = static_cast<int32_t>(float_bits(kMagic));
    DUQPP_UNROLL
    for (int column = 0; column < Traits::kColumnTiles; ++column) {
      x[column][lane] = expand_activation<Warp>(constants[lane], codes[lane].activation[column]);
    }
  });
  DUQPP_UNROLL
  for (int t = 0; t < Traits::kRowTiles; ++t) {
    typename Warp::template Lanes<MmaA8> weights[2];  // the two terms
    Warp::for_each_lane([&](int lane) {
      DUQPP_UNROLL
      for (int h = 0; h < 2; ++h) {
        uint32_t terms[2][2];
        expand_weight<Warp>(constants[lane], codes[lane].weight[t][h], terms);
        DUQPP_UNROLL
        for (int i = 0; i < 2; ++i) {
          weights[i][lane].word[h] = terms[i][0];
          weights[i][lane].word[h + 2] = terms[i][1];
        }
      }
    });
    DUQPP_UNROLL
    for (int column = 0; column < Traits::kColumnTiles; ++column) {
      typename Warp::template Lanes<MmaC32> dots;
      Warp::mma(weights[0], x[column], magic, dots);
      Warp::mma(weights[1], x[column], dots, dots);
      Warp::for_each_lane([&](int lane) {
        const float (&w)[2 * Traits::kRowTiles] = memory.scales.weight[block][lane_row(lane)];
        DUQPP_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float (&a)[2] = memory.scales.activation[column][block][2 * (lane & 3) + i % 2];
          const float magic_dot = float_from_bits(static_cast<uint32_t>(dots[lane].value[i]));
          float& sum = sums[lane].value[t][column][i];
          if constexpr (kHuge) {
            const auto quadruple_dot = static_cast<int32_t>(4.0f * (magic_dot - kMagic));
            sum = add_block_product(sum, quadruple_dot, 0.25f * a[0], w[2 * t + i / 2]);
          } else {
            sum = fmaf(fmaf(magic_dot, a[0], a[1]), w[2 * t + i / 2], sum);
          }
        }
      });
    }
  }
}

// The blocks of a plain segment. The place of a pair in the ring, once it is in registers, goes to
// the pair kStages after it, in the warp's next segment where this one has no more: kStages groups
// of copies are under way at any time, the oldest that of the pair that comes next.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void multiply_plain(
    const CtaTask& task, int segment, WarpMemory<Traits>& memory,
    const typename Warp::template Lanes<LaneConstants80<Traits>>& constants,
    typename Warp::template Lanes<LaneSums<Traits>>& sums) {
  constexpr int kPairs = Traits::kSegmentPairs;
  const int first = segment * kPairs;
  const int left = task.blocks / kPairBlocks - first;
  const int pairs = left < kPairs ? left : kPairs;
  DUQPP_NO_UNROLL
  for (int pair = 0; pair < pairs; ++pair) {
    typename Warp::template Lanes<LaneBlock<Traits>> codes[kPairBlocks];
    PairCodes<Traits>& place = memory.ring[static_cast<unsigned>(pair) % Traits::kStages];
    Warp::template wait_for_copies<Traits::kStages - 1>();
    Warp::for_each_lane([&](int lane) {
      DUQPP_UNROLL
      for (int t = 0; t < Traits::kRowTiles; ++t) {
        const Words weight = place.weight[t][lane];
        DUQPP_UNROLL
        for (int i = 0; i < 4; ++i) codes[i / 2][lane].weight[t][i % 2] = weight.word[i];
      }
      DUQPP_UNROLL
      for (int t = 0; t < Traits::kColumnTiles; ++t) {
        const PairWords activation = place.activation[t][lane];
        DUQPP_UNROLL
        for (int b = 0; b < kPairBlocks; ++b) codes[b][lane].activation[t] = activation.word[b];
      }
    });
    const int ahead = pair + Traits::kStages;
    const int next = first + ahead + (ahead < pairs ? 0 : (task.warps - 1) * kPairs);
    copy_weights<Traits, Warp>(task, constants, next, place);
    copy_activations<Traits, Warp>(task, constants, next, place);
    Warp::commit_copies();
    DUQPP_UNROLL
    for (int b = 0; b < kPairBlocks; ++b) {
      multiply_block<Traits, false, Warp>(memory, kPairBlocks * pair + b, constants, codes[b],
                                          sums);
    }
  }
}

// The blocks of any segment, one at a time.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void multiply_any(
    const GemmSm80Params& params, const CtaTask& task, int segment,
    const WarpMemory<Traits>& memory,
    const typename Warp::template Lanes<LaneConstants80<Traits>>& constants,
    typename Warp::template Lanes<LaneSums<Traits>>& sums) {
  const int begin = segment * kSegmentBlocks;
  const int end = begin + kSegmentBlocks < task.blocks ? begin + kSegmentBlocks : task.blocks;
  DUQPP_NO_UNROLL
  for (int block = begin; block < end; ++block) {
    typename Warp::template Lanes<LaneBlock<Traits>> codes;
    Warp::for_each_lane([&](int lane) {
      const MXFP4GemmProblem& problem = params.problem;
      codes[lane] = LaneBlock<Traits>{};
      DUQPP_UNROLL
      for (int t = 0; t < Traits::kRowTiles; ++t) {
        const int64_t first = task.first_n + t * kFragmentRows;
        const bool whole = problem.N - first >= kFragmentRows;
        const uint8_t* const tile = problem.b_codes + first * task.blocks * 16;
        DUQPP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const uint32_t word =
              fragment_lane_word(lane, h, block, whole ? kFragmentRows : 8, task.blocks);
          Warp::load_word(codes[lane].weight[t][h], tile + 4 * int64_t{word},
                          first + 8 * h < problem.N);
        }
      }
      DUQPP_UNROLL
      for (int t = 0; t < Traits::kColumnTiles; ++t) {
        Warp::load_word(codes[lane].activation[t],
                        constants[lane].activation[t] + int64_t{block} * 16, true);
      }
    });
    multiply_block<Traits, true, Warp>(memory, block - begin, constants, codes, sums);
  }
}

// A warp's part of a round: the sums of a segment, in its memory. The start of the segment that it
// has in the next round is on its way then, as that of this one is at first.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void multiply_segment(
    const GemmSm80Params& params, const CtaTask& task, int segment, WarpMemory<Traits>& memory,
    const typename Warp::template Lanes<LaneConstants80<Traits>>& constants,
    typename Warp::template Lanes<LaneScales<Traits>>& scales) {
  typename Warp::template Lanes<LaneSums<Traits>> sums;
  const bool huge = decode_scales<Traits, Warp>(scales, memory);
  const int next = segment + task.warps;
  // Addresses that are needed once a segment are computed then, and take no registers until.
  CtaTask here = task;
  here.first_n += Warp::in_register(0);
  here.first_m += Warp::in_register(0);
  Warp::for_each_lane([&](int lane) {
    load_weight_scales<Traits, Warp>(params, here, next, lane, scales[lane]);
    load_activation_scales<Traits, Warp>(params, here, next, lane, scales[lane]);
    sums[lane] = LaneSums<Traits>{};
  });
  Warp::sync();  // lanes took their own number of turns for bytes of scales
  if (is_plain(task, segment) && !huge) {
    multiply_plain<Traits, Warp>(task, segment, memory, constants, sums);
  } else {
    multiply_any<Traits, Warp>(params, here, segment, memory, constants, sums);
    Warp::template wait_for_copies<0>();  // none may land on those that take its place
    copy_first_weights<Traits, Warp>(task, next, constants, memory);
    copy_first_activations<Traits, Warp>(task, next, constants, memory);
  }
  Warp::sync();  // the sums take the place of the scales
  Warp::for_each_lane([&](int lane) {
    DUQPP_UNROLL
    for (int t = 0; t < Traits::kRowTiles; ++t) {
      DUQPP_UNROLL
      for (int column = 0; column < Traits::kColumnTiles; ++column) {
        DUQPP_UNROLL
        for (int i = 0; i < 4; ++i) {
          memory.sums[((t * Traits::kColumnTiles + column) * 4 + i) * kWarpLanes + lane] =
              sums[lane].value[t][column][i];
        }
      }
    }
  });
}

}  // namespace duqpp::cuda
