// What mxfp4_gemm_sm80.cuh keeps and where: its compile-time numbers, what a launch, a CTA and a
// lane hold, and the shared memory of a warp.
#pragma once

#include <cstdint>

#include "cuda/mxfp4_gemm_sm80_plan.h"
#include "cuda/warp_program.h"
#include "format/block_sum.h"
#include "format/e2m1.h"
#include "format/fragment.h"
#include "format/mx_block.h"
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

}  // namespace duqpp::cuda
