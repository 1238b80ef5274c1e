// How rotate_quantize lays a 16-row tile of one block over the lanes of a warp, for mma.m16n8k16.
//
// y = x R for 16 rows: two MMA steps along k (inputs 0 .. 31) and four MMA tiles along n (outputs
// 0 .. 31). The instruction fixes which k and n of a step or tile a lane holds; which input or
// output of the block those are is ours to choose, as long as x, R and y agree. With the choice
// below, lane 4 r + q holds inputs and outputs 8 q .. 8 q + 7 of rows r and r + 8. So a row of an A
// fragment is one 128-bit load of x, the eight outputs of a row pack into one 32-bit store, and
// nothing passes through shared memory. R absorbs the permutation when its fragment is loaded.
//
// Source of the instruction's layout: PTX ISA, "Matrix Fragments for mma.m16n8k16" with 16-bit
// types.
#pragma once

#include <cstdint>

#include "format/host_device.h"
#include "format/mx_block.h"

namespace duqpp {

inline constexpr int kWarpLanes = 32;
inline constexpr int kTileRows = 16;
inline constexpr int kLaneRows = 2;    // rows r and r + 8 of the tile
inline constexpr int kLaneValues = 8;  // values of a row that one lane holds
inline constexpr int kMmaSteps = 2;    // k16 steps in a block
inline constexpr int kMmaTiles = 4;    // n8 tiles in a block

DUQPP_HOST_DEVICE constexpr int lane_row(int lane) { return lane >> 2; }  // and that + 8
DUQPP_HOST_DEVICE constexpr int lane_column(int lane) { return kLaneValues * (lane & 3); }

// The input of the block that is k = 0 .. 15 of MMA step `step`.
DUQPP_HOST_DEVICE constexpr int k_of(int step, int k) {
  return 8 * ((k & 7) >> 1) + 4 * step + 2 * (k >> 3) + (k & 1);
}

// The output of the block that is column n = 0 .. 7 of MMA tile `tile`.
DUQPP_HOST_DEVICE constexpr int n_of(int tile, int n) { return 8 * (n >> 1) + 2 * tile + (n & 1); }

// 16 bytes, the unit of every load: eight 16-bit values, the lower index in the lower half.
struct alignas(16) Words {
  uint32_t word[4];
};

// The operands of one MMA in a lane, in the instruction's order. Source: PTX ISA, as above.
struct MmaA {  // row r: k = 2 q + {0, 1}; row r + 8; then both with k + 8
  uint32_t word[4];
};
struct MmaB {  // column r: k = 2 q + {0, 1}; k + 8
  uint32_t word[2];
};
struct MmaC {  // row r: columns 2 q, 2 q + 1; row r + 8
  float value[4];
};

// What a lane holds of R, as the B operand: word [step][tile][half] is the pair of MMA rows
// k = 2 q + 8 half + {0, 1} in MMA column n = r.
struct MatrixFragment {
  uint32_t word[kMmaSteps][kMmaTiles][2];
};

// The rows of R that a lane's fragment is made of, j = 0 .. 7, and the first of the eight columns
// in which its four outputs lie: 128 bits of each row, every bit of which some lane of the pair
// needs.
DUQPP_HOST_DEVICE constexpr int fragment_row(int lane, int j) { return 8 * (lane & 3) + j; }
DUQPP_HOST_DEVICE constexpr int fragment_column(int lane) { return 8 * (lane >> 3); }

// The fragment from those rows: input k_of(step, k) is row 4 step + 2 half + {0, 1} of the eight,
// output n_of(tile, n) is in word `tile`, in the upper half where n is odd.
DUQPP_HOST_DEVICE constexpr MatrixFragment matrix_fragment(const Words (&rows)[kLaneValues],
                                                           int lane) {
  const int shift = (lane_row(lane) & 1) * 16;
  MatrixFragment fragment{};
  for (int step = 0; step < kMmaSteps; ++step) {
    for (int tile = 0; tile < kMmaTiles; ++tile) {
      for (int half = 0; half < 2; ++half) {
        const int j = 4 * step + 2 * half;
        const uint32_t low = rows[j].word[tile] >> shift;
        const uint32_t high = rows[j + 1].word[tile] >> shift;
        fragment.word[step][tile][half] = (low & 0xFFFFu) | (high << 16);
      }
    }
  }
  return fragment;
}

// matrix_fragment follows k_of and n_of, and a lane's inputs and outputs are its eight values:
// in A, word [2 step + half] of a row holds k = 2 q + 8 half + {0, 1}; in the accumulators, MMA
// column 2 q + {0, 1} of tile t is value 2 t + {0, 1}.
DUQPP_HOST_DEVICE constexpr bool fragment_maps_agree() {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int q = lane & 3, n = lane_row(lane);
    for (int i = 0; i < 2; ++i) {
      for (int step = 0; step < kMmaSteps; ++step) {
        for (int half = 0; half < 2; ++half) {
          const int input = k_of(step, 2 * q + 8 * half + i);
          if (input != lane_column(lane) + 2 * (2 * step + half) + i) return false;
          if (input != fragment_row(lane, 4 * step + 2 * half + i)) return false;
        }
      }
      for (int tile = 0; tile < kMmaTiles; ++tile) {
        if (n_of(tile, 2 * q + i) != lane_column(lane) + 2 * tile + i) return false;
        if (n_of(tile, n) != fragment_column(lane) + 2 * tile + (n & 1)) return false;
      }
    }
  }
  return true;
}
static_assert(fragment_maps_agree());

}  // namespace duqpp
