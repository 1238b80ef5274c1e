// The pipeline of mxfp4_gemm_sm80.cuh: codes on their way to a warp's ring in shared memory, and
// the scales of its next segment on theirs to registers.
#pragma once

#include <cstdint>

#include "cuda/mxfp4_gemm_sm80_state.cuh"
#include "cuda/warp_program.h"
#include "format/scale_layout.h"
#include "format/weight_fragment.h"
#include "problem.h"

namespace duqpp::cuda {

// Pairs of whole tiles, counted from the first of K, that the usual loop may ask for.
DUQPP_WARP_PROGRAM bool has_pair(const CtaTask& task, int pair) {
  return task.whole && pair < task.blocks / kPairBlocks;
}

// Start to copy a pair's codes of W, and of x, where it is there: it is waited for in any case.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void copy_weights(
    const CtaTask& task, const typename Warp::template Lanes<LaneConstants80<Traits>>& constants,
    int pair, PairCodes<Traits>& codes) {
  Warp::for_each_lane([&](int lane) {
    DUQPP_UNROLL
    for (int t = 0; t < Traits::kRowTiles; ++t) {
      const int64_t tile_bytes = int64_t{task.blocks} * 256;
      Warp::copy(codes.weight[t][lane],
                 constants[lane].weight + t * tile_bytes + int64_t{pair} * 512,
                 has_pair(task, pair) && t < task.tiles);
    }
  });
}

template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void copy_activations(
    const CtaTask& task, const typename Warp::template Lanes<LaneConstants80<Traits>>& constants,
    int pair, PairCodes<Traits>& codes) {
  Warp::for_each_lane([&](int lane) {
    DUQPP_UNROLL
    for (int t = 0; t < Traits::kColumnTiles; ++t) {
      DUQPP_UNROLL
      for (int b = 0; b < kPairBlocks; ++b) {
        Warp::copy(codes.activation[t][lane].word[b],
                   constants[lane].activation[t] + int64_t{pair} * 32 + 16 * b,
                   has_pair(task, pair));
      }
    }
  });
}

// Start to copy the first kStages pairs of a segment, one group of copies for each. Before x is
// known to be there, those of W.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void copy_first_weights(
    const CtaTask& task, int segment,
    const typename Warp::template Lanes<LaneConstants80<Traits>>& constants,
    WarpMemory<Traits>& memory) {
  DUQPP_UNROLL
  for (int j = 0; j < Traits::kStages; ++j) {
    copy_weights<Traits, Warp>(task, constants, segment * Traits::kSegmentPairs + j,
                               memory.ring[j]);
  }
}

template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void copy_first_activations(
    const CtaTask& task, int segment,
    const typename Warp::template Lanes<LaneConstants80<Traits>>& constants,
    WarpMemory<Traits>& memory) {
  DUQPP_UNROLL
  for (int j = 0; j < Traits::kStages; ++j) {
    copy_activations<Traits, Warp>(task, constants, segment * Traits::kSegmentPairs + j,
                                   memory.ring[j]);
    Warp::commit_copies();
  }
}

// Scale bytes of a segment of W: whole words of four, or bytes where the segment is not whole.
template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void load_weight_scales(const GemmSm80Params& params, const CtaTask& task,
                                           int segment, int lane, LaneScales<Traits>& scales) {
  const MXFP4GemmProblem& problem = params.problem;
  const int first = segment * kSegmentBlocks;
  const int left = task.blocks - first;
  const int in_segment = left < kSegmentBlocks ? left : kSegmentBlocks;
  DUQPP_UNROLL
  for (int t = 0; t < Traits::kRowTiles; ++t) {
    const int64_t row = task.first_n + t * kFragmentRows;
    const int rows = problem.N - row >= kFragmentRows ? kFragmentRows : 8;
    const uint8_t* const own = problem.b_scales + row * task.blocks + int64_t{first} * rows +
                               lane_row(lane) * in_segment + 4 * (lane & 3);
    DUQPP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const bool live = row + 8 * h < problem.N && left > 0;
      uint32_t& word = scales.weight[t][h];
      word = 0;
      Warp::load_word(word, own + 8 * h * kSegmentBlocks, live && left >= kSegmentBlocks);
      if (live && left < kSegmentBlocks) {
        DUQPP_NO_UNROLL
        for (int i = 0; i < 4 && 4 * (lane & 3) + i < in_segment; ++i) {
          word |= Warp::load_byte(own + 8 * h * in_segment + i) << (8 * i);
        }
      }
    }
  }
}

template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void load_activation_scales(const GemmSm80Params& params, const CtaTask& task,
                                               int segment, int lane, LaneScales<Traits>& scales) {
  const int block = segment * kSegmentBlocks + 4 * (lane & 3);
  DUQPP_UNROLL
  for (int t = 0; t < Traits::kColumnTiles; ++t) {
    const int64_t row = activation_row(params, task, t, lane);
    scales.activation[t] = 0;
    Warp::load_word(scales.activation[t],
                    params.problem.a_scales +
                        swizzled_offset<int64_t>(row, block, scale_tiles_along_k(task.blocks)),
                    block < task.blocks);
  }
}

}  // namespace duqpp::cuda
