// mxfp4_gemm for few rows of x, on tensor cores that multiply 8-bit integers (sm_80 to sm_90):
// equal to the CPU's, bit for bit (format/block_sum.h).
//
// Work. W is the row operand of mma.m16n8k32, x the column operand. A warp takes a segment of K and
// kRowTiles tiles of 16 rows of W, for all kColumnTiles tiles of 8 rows of x; the warps of a CTA
// take the segments of their rows of W in turn. After each turn, a round, the CTA adds the warps'
// sums to its totals in the order of segments. A CTA has all of K: the order of every sum is fixed,
// and an output does not depend on the batch.
//
// Traffic. W streams from memory, 4.25 bits a value, x is read once per CTA, from L2. Each warp has
// the codes of kStages pairs of blocks on the way to a ring in shared memory (cp.async): a lane
// copies what it multiplies itself (format/weight_fragment.h), so that it waits for its own copies
// and for no other lane, and for the oldest pair alone. Registers could hold as much, but a load to
// registers is waited for by scoreboard, of which there are six, and compilers give one to all.
//
// Arithmetic. Twice an E2M1 value is an integer of at most 12, so that one MMA is a block's exact
// dot product, times four. A code becomes an integer by PRMT, whose selectors are nibbles: three
// bits choose one of eight bytes, and the fourth, here the sign, replaces it by its sign bit, 0 for
// our bytes. So a byte of W is a sum of two, 2 m where the sign is + and else 0, and -m, with m the
// magnitude; the sum is left to the MMA, which runs for either. For x, needed less often, the two
// are added, with 128 more so that no byte borrows from the next.
//
// The MMAs start from the bits of the float 1.5 2^21, whose last bit counts 1/4: their result, read
// as a float, is F = 1.5 2^21 + d, and d 2^(ea - 127) = fma(F, a, -1.5 2^21 a), exactly.
//
// Segments that are not plain (a last tile of 8 rows, an odd number of blocks, a scale of x from
// 2^107 on) take another loop, a block at a time: rare, and slower.
//
// This file has no GPU instruction: a policy `Warp` brings them, as in rotate_quantize.cuh.
#pragma once

#include <cstdint>

#include "cuda/mxfp4_gemm_sm80_plan.h"
#include "cuda/warp_program.h"
#include "format/block_sum.h"
#include "format/e8m0.h"
#include "format/fragment.h"
#include "format/narrow_float.h"
#include "format/scale_layout.h"
#include "format/weight_fragment.h"
#include "problem.h"

namespace duqpp::cuda {

template <int kRowTiles_, int kColumnTiles_>
struct GemmSm80Traits {
  static constexpr int kRowTiles = kRowTiles_;        // tiles of 16 rows of W
  static constexpr int kColumnTiles = kColumnTiles_;  // tiles of 8 rows of x
  static constexpr int kStages = gemm_sm80_stages(kRowTiles);
  static constexpr int kSegmentPairs = kSegmentBlocks / kPairBlocks;
  static_assert(kStages >= 2, "one is multiplied while another is on its way");
  static_assert(kSegmentPairs % kStages == 0, "pair p of K has place p % kStages of the ring");
  static constexpr int kMaxThreads = kWarpLanes * gemm_sm80_max_warps(kRowTiles, kColumnTiles);
  static constexpr int kSums = gemm_sm80_sums(kRowTiles, kColumnTiles);
};

struct GemmSm80Params {
  MXFP4GemmProblem problem;
  GemmSm80Plan plan;
  bool early_weights;  // W may be read before the kernel before has ended
};

// ---- Constants ----

inline constexpr float kMagic = 0x1.8p21f;
inline constexpr int kFirstHugeScale = 234;  // from here kMagic 2^(ea - 127) is no float32

// Bytes that PRMT chooses from, by the magnitude of a code: of index 0 .. 3, and 4 .. 7.
struct ByteTable {
  uint32_t low, high;
};

DUQPP_HOST_DEVICE constexpr ByteTable byte_table(int base, int factor) {
  ByteTable table{};
  for (uint32_t i = 0; i < 4; ++i) {
    const auto byte = [&](uint32_t code) {
      return static_cast<uint32_t>(base + factor * doubled_e2m1(code)) & 0xFFu;
    };
    table.low |= byte(i) << (8 * i);
    table.high |= byte(i + 4) << (8 * i);
  }
  return table;
}
inline constexpr ByteTable kTwice = byte_table(0, 2);     // unless the sign is set
inline constexpr ByteTable kNegated = byte_table(0, -1);  // whatever the sign
inline constexpr ByteTable kExcess128 = byte_table(128, -1);
static_assert(kTwice.high == 0x18100C08u && kNegated.low == 0xFDFEFF00u &&
              kExcess128.low == 0x7D7E7F80u);

// ---- State of a lane ----

// Four 8-bit values a word: MMA k = 4 q .. 4 q + 3 and then the same + 16, of lane 4 r + q, are
// columns 8 q .. 8 q + 3 of the block and the next four. Source: PTX ISA, "Matrix Fragments for
// mma.m16n8k32".
struct MmaA8 {  // row r, row r + 8; then both with k + 16
  uint32_t word[4];
};
struct MmaB8 {  // column r; k + 16
  uint32_t word[2];
};
struct MmaC32 {  // row r: columns 2 q, 2 q + 1; row r + 8
  int32_t value[4];
};

template <class Traits>
struct LaneScales {  // of the next segment, for blocks 4 q .. 4 q + 3: rows r and r + 8 of W, row r
                     // of x
  uint32_t weight[Traits::kRowTiles][2];
  uint32_t activation[Traits::kColumnTiles];
};

template <class Traits>
struct LaneSums {
  float value[Traits::kRowTiles][Traits::kColumnTiles][4];
};

// The codes of a pair of blocks, each lane's where it alone writes and reads them.
struct alignas(8) PairWords {
  uint32_t word[kPairBlocks];
};
template <class Traits>
struct PairCodes {
  Words weight[Traits::kRowTiles][kWarpLanes];  // as format/weight_fragment.h has them
  PairWords activation[Traits::kColumnTiles][kWarpLanes];
};

// What a warp keeps in shared memory: the ring, and of a segment the scales, by block. When the
// segment is done, its sums take their place.
template <class Traits>
struct WarpMemory {
  PairCodes<Traits> ring[Traits::kStages];
  union {
    struct {
      float weight[kSegmentBlocks][8][2 * Traits::kRowTiles];        // [r][tile, r or r + 8]
      float activation[Traits::kColumnTiles][kSegmentBlocks][8][2];  // [row of x][a, -kMagic a]
    } scales;
    float sums[Traits::kSums];  // [tile of W][tile of x][value of MmaC32][lane]
  };
};

// What does not change from segment to segment: the first row of W and of x.
struct CtaTask {
  int64_t first_n, first_m;
  int blocks, segments, warps;
  int tiles;   // of W, that are there
  bool whole;  // none of them of 8 rows
};

// `part` counts parts of the rows of x, `tile` those of W.
template <class Traits>
DUQPP_WARP_PROGRAM CtaTask cta_task(const GemmSm80Params& params, int part, int tile) {
  const int64_t first_n = int64_t{tile} * Traits::kRowTiles * kFragmentRows;
  const int64_t rows = params.problem.N - first_n;
  return {first_n,
          int64_t{part} * Traits::kColumnTiles * 8,
          static_cast<int>(params.problem.K / kBlockSize),
          params.plan.segments,
          params.plan.warps,
          rows >= Traits::kRowTiles * kFragmentRows
              ? Traits::kRowTiles
              : static_cast<int>((rows + kFragmentRows - 1) / kFragmentRows),
          rows >= Traits::kRowTiles * kFragmentRows || rows % kFragmentRows == 0};
}

// What a lane keeps at hand: the first four bytes of each table of PRMT, and where it reads: pair 0
// of its first tile of W, and block 0 of its rows of x. Rows beyond the last repeat it, and are not
// stored.
template <class Traits>
struct LaneConstants80 {
  uint32_t twice, negated, excess_128;
  const uint8_t* weight;
  const uint8_t* activation[Traits::kColumnTiles];
};

DUQPP_WARP_PROGRAM int64_t activation_row(const GemmSm80Params& params, const CtaTask& task,
                                          int tile, int lane) {
  const int64_t row = task.first_m + 8 * tile + lane_row(lane);
  return row < params.problem.M ? row : params.problem.M - 1;
}

template <class Traits, class Warp>
DUQPP_WARP_PROGRAM void make_constants(
    const GemmSm80Params& params, const CtaTask& task,
    typename Warp::template Lanes<LaneConstants80<Traits>>& constants) {
  Warp::for_each_lane([&](int lane) {
    constants[lane].twice = Warp::in_register(kTwice.low);
    constants[lane].negated = Warp::in_register(kNegated.low);
    constants[lane].excess_128 = Warp::in_register(kExcess128.low);
    const int64_t row_bytes = int64_t{task.blocks} * 16;
    constants[lane].weight = params.problem.b_codes + task.first_n * row_bytes + 16 * lane;
    DUQPP_UNROLL
    for (int t = 0; t < Traits::kColumnTiles; ++t) {
      constants[lane].activation[t] = params.problem.a_codes +
                                      activation_row(params, task, t, lane) * row_bytes +
                                      4 * (lane & 3);
    }
  });
}

// Whether the usual loop takes a segment, as far as shapes go.
DUQPP_WARP_PROGRAM bool is_plain(const CtaTask& task, int segment) {
  return task.whole && (segment + 1 < task.segments || task.blocks % kPairBlocks == 0);
}

// ---- Loads ----

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

// ---- Arithmetic ----

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

// ---- Totals ----

// round(total + bias), rounded to the dtype of out. `sum` is an index of WarpMemory::sums.
template <class Traits>
DUQPP_WARP_PROGRAM void store_total(const GemmSm80Params& params, const CtaTask& task, int sum,
                                    float total) {
  const MXFP4GemmProblem& problem = params.problem;
  const int lane = sum % kWarpLanes, i = sum / kWarpLanes % 4, tiles = sum / (4 * kWarpLanes);
  const int64_t n =
      task.first_n + tiles / Traits::kColumnTiles * kFragmentRows + lane_row(lane) + 8 * (i / 2);
  const int64_t m = task.first_m + tiles % Traits::kColumnTiles * 8 + 2 * (lane & 3) + i % 2;
  if (n >= problem.N || m >= problem.M) return;
  if (problem.bias != nullptr) {
    float bias;
    if (problem.bias_dtype == Dtype::kFloat32) {
      bias = static_cast<const float*>(problem.bias)[n];
    } else {
      const uint16_t bits = static_cast<const uint16_t*>(problem.bias)[n];
      bias = problem.bias_dtype == Dtype::kBFloat16 ? decode_bfloat16(bits) : decode_float16(bits);
    }
    total += bias;
  }
  static_cast<uint16_t*>(problem.out)[m * problem.N + n] =
      problem.out_dtype == Dtype::kBFloat16 ? encode_bfloat16(total) : encode_float16(total);
}

// A thread's part of the end of a round: adds the segments' sums to the totals, in order. After the
// last round the totals become the output. The CTA waits before it and after it.
template <class Traits>
DUQPP_WARP_PROGRAM void add_round(const GemmSm80Params& params, const CtaTask& task, int round,
                                  const WarpMemory<Traits>* memory, float* totals, int thread,
                                  int threads) {
  const int left = task.segments - round * task.warps;
  const int segments = left < task.warps ? left : task.warps;
  for (int sum = thread; sum < Traits::kSums; sum += threads) {
    float total = round == 0 ? 0.0f : totals[sum];
    for (int i = 0; i < segments; ++i) total += memory[i].sums[sum];
    if (left <= task.warps) {
      store_total<Traits>(params, task, sum, total);
    } else {
      totals[sum] = total;
    }
  }
}

}  // namespace duqpp::cuda
