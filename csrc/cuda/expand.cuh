// The kernels of expand.h as programs of a CTA's threads and warps. On a GPU a warp is one lane of
// it; tests/cpp runs the same programs on the host, with 32 lanes in a loop.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/expand_plan.h"
#include "cuda/warp_program.h"
#include "format/expand.h"
#include "format/fragment.h"
#include "format/mx_block.h"
#include "format/scale_layout.h"
#include "format/weight_fragment.h"
#include "problem.h"

namespace duqpp::cuda {

inline constexpr int kScaleWord = 4;  // scales that are loaded together

template <class Block>
inline constexpr bool kRowScaled = std::is_same_v<Block, E4M3Block>;

// Words of eight codes whose values fill 16 bytes, which a lane stores at once.
template <class Block>
inline constexpr int kStoreWords = 16 / sizeof(typename Block::Values);

template <int kWords>
struct alignas(4 * kWords) CodeWords {
  uint32_t word[kWords];
};
struct alignas(16) Store {
  uint32_t word[4];
};

template <class Block, int kWords = kStoreWords<Block>>
DUQPP_WARP_PROGRAM Store expand_words(const Block& block, const CodeWords<kWords>& codes) {
  Store store;
  for (int i = 0; i < kWords; ++i) {
    const typename Block::Values values = block(codes.word[i]);
    for (int j = 0; j < 4 / kWords; ++j) store.word[4 / kWords * i + j] = values.word[j];
  }
  return store;
}

// Activations: a CTA expands a row. Its threads take the row's 16-byte stores in turn, so that a
// warp stores 512 bytes that follow each other, and loads what follows each other, too.
struct ActivationRow {
  const uint8_t* codes;
  const uint8_t* scales;  // of block b at (b / 4) 512 + b % 4
  uint8_t* values;
  uint32_t blocks;
};

template <class Block>
DUQPP_WARP_PROGRAM ActivationRow activation_row(const ExpandProblem& problem, uint32_t row) {
  const uint32_t blocks = static_cast<uint32_t>(problem.K / kBlockSize);
  const auto tiles = static_cast<uint32_t>(scale_tiles_along_k(blocks));
  constexpr int64_t kValueBytes = sizeof(typename Block::Values) / 8;
  return {problem.codes + int64_t{row} * (problem.K / 2),
          problem.scales + swizzled_offset<uint32_t>(row, 0, tiles),
          static_cast<uint8_t*>(problem.values) + int64_t{row} * problem.K * kValueBytes, blocks};
}

// The largest exponent of the scales that a thread looks at; padding is 0.
DUQPP_WARP_PROGRAM uint32_t activation_maximum(const ActivationRow& row, uint32_t thread) {
  uint32_t largest = 0;
  const uint32_t tiles = (row.blocks + kScaleWord - 1) / kScaleWord;
  DUQPP_NO_UNROLL
  for (uint32_t tile = thread; tile < tiles; tile += kExpandThreads) {
    const auto* const word = reinterpret_cast<const uint32_t*>(row.scales + tile * kScaleTileBytes);
    largest = row_maximum_of_4(largest, *word);
  }
  return largest;
}

template <class Block>
DUQPP_WARP_PROGRAM void expand_activation_thread(const ActivationRow& row, uint32_t row_exponent,
                                                 uint32_t thread) {
  constexpr uint32_t kWords = kStoreWords<Block>;
  constexpr uint32_t kStoresPerBlock = kWordsPerBlock / kWords;
  const auto* const codes = reinterpret_cast<const CodeWords<kWords>*>(row.codes);
  auto* const values = reinterpret_cast<Store*>(row.values);
  const uint32_t stores = row.blocks * kStoresPerBlock;
  for (uint32_t first = thread; first < stores; first += kExpandUnroll * kExpandThreads) {
    CodeWords<kWords> loaded[kExpandUnroll];
    uint32_t exponents[kExpandUnroll];
    DUQPP_UNROLL
    for (int i = 0; i < kExpandUnroll; ++i) {
      const uint32_t store = first + i * kExpandThreads, block = store / kStoresPerBlock;
      if (store >= stores) break;
      loaded[i] = codes[store];
      exponents[i] = row.scales[block / kScaleWord * kScaleTileBytes + block % kScaleWord];
    }
    DUQPP_UNROLL
    for (int i = 0; i < kExpandUnroll; ++i) {
      const uint32_t store = first + i * kExpandThreads;
      if (store >= stores) break;
      values[store] = expand_words(Block(exponents[i], row_exponent), loaded[i]);
    }
  }
}

// Weights: a CTA expands a part of a tile of 16 rows (format/weight_fragment.h), its warps the
// pairs of blocks in turn.
struct WeightTile {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* row_exponents;  // of its rows
  int64_t values_row;  // its first row in `values`
  uint32_t blocks;
  uint32_t rows;  // that there are in the matrix: 16, or fewer in the last tile
};

DUQPP_WARP_PROGRAM WeightTile weight_tile(const ExpandProblem& problem, uint32_t index) {
  const int64_t values_row = int64_t{index} * kFragmentRows;
  const int64_t first_row = problem.first_row + values_row;
  const int64_t left = problem.matrix_rows - first_row;
  return {problem.codes + first_row * (problem.K / 2),
          problem.scales + first_row * (problem.K / kBlockSize),
          problem.row_exponents + first_row, values_row,
          static_cast<uint32_t>(problem.K / kBlockSize),
          static_cast<uint32_t>(left < kFragmentRows ? (left < 0 ? 0 : left) : kFragmentRows)};
}

// Offset in the tile's scales of a row's first scale in a segment, and how many it has there.
struct SegmentScales {
  uint32_t offset, blocks;
};
DUQPP_WARP_PROGRAM SegmentScales segment_scales(const WeightTile& tile, uint32_t row,
                                                uint32_t segment) {
  const uint32_t first = segment * kSegmentBlocks, left = tile.blocks - first;
  const uint32_t blocks = left < kSegmentBlocks ? left : kSegmentBlocks;
  return {first * tile.rows + row * blocks, blocks};
}

DUQPP_WARP_PROGRAM uint32_t weight_exponent(const WeightTile& tile, uint32_t row, uint32_t block) {
  if (row >= tile.rows || block >= tile.blocks) return 0;
  const uint32_t offset = segment_scales(tile, row, block / kSegmentBlocks).offset;
  return tile.scales[offset + block % kSegmentBlocks];
}

// What a row of the tile is aligned to.
DUQPP_WARP_PROGRAM uint32_t weight_row_exponent(const WeightTile& tile, uint32_t row) {
  return row < tile.rows ? tile.row_exponents[row] : row_exponent(0);
}

// A row's scale, by one of the CTA's threads, which the CTA of the tile's first part stores.
DUQPP_WARP_PROGRAM void store_row_scale(const ExpandProblem& problem, const WeightTile& tile,
                                        uint32_t thread) {
  if (thread >= kFragmentRows || tile.values_row + thread >= problem.rows) return;
  problem.row_scales[tile.values_row + thread] = row_scale(weight_row_exponent(tile, thread));
}

// Of rows r and r + 8.
struct LaneRowExponents {
  uint32_t of[2];
};

// What a lane holds of a pair of blocks: columns 8 q .. 8 q + 7 of rows r and r + 8 of both blocks.
struct PairCodes {
  uint32_t word[kPairBlocks][2];
};

DUQPP_WARP_PROGRAM PairCodes load_pair(const WeightTile& tile, uint32_t pair, int lane) {
  const uint32_t first = kPairBlocks * pair, left = tile.blocks - first, halves = tile.rows / 8;
  const uint32_t blocks = left < kPairBlocks ? left : kPairBlocks;
  const auto* const words = reinterpret_cast<const uint32_t*>(tile.codes) +
                            first * tile.rows * kWordsPerBlock + lane * blocks * halves;
  PairCodes codes{};
  if (blocks == kPairBlocks && halves == 2) {
    const Store loaded = *reinterpret_cast<const Store*>(words);
    codes = {{{loaded.word[0], loaded.word[1]}, {loaded.word[2], loaded.word[3]}}};
  } else {
    for (uint32_t b = 0; b < kPairBlocks; ++b) {
      for (uint32_t half = 0; half < 2; ++half) {
        if (b < blocks && half < halves) codes.word[b][half] = words[b * halves + half];
      }
    }
  }
  return codes;
}

template <class Block>
DUQPP_WARP_PROGRAM void store_values(const ExpandProblem& problem, const WeightTile& tile,
                                     uint32_t row, uint32_t block, uint32_t store,
                                     const Store& values) {
  constexpr int64_t kStoresPerBlock = kWordsPerBlock / kStoreWords<Block>;
  if (block >= tile.blocks || tile.values_row + row >= problem.rows) return;
  const int64_t blocks = (tile.values_row + row) * tile.blocks + block;
  reinterpret_cast<Store*>(problem.values)[blocks * kStoresPerBlock + store] = values;
}

// Bfloat16: a lane's eight columns are 16 bytes already.
template <class Warp>
DUQPP_WARP_PROGRAM void expand_pair(BFloat16Block*, const ExpandProblem& problem,
                                    const WeightTile& tile, uint32_t pair,
                                    const typename Warp::template Lanes<PairCodes>& codes,
                                    const typename Warp::template Lanes<PairCodes>& exponents,
                                    const typename Warp::template Lanes<LaneRowExponents>&) {
  Warp::for_each_lane([&](int lane) {
    for (uint32_t b = 0; b < kPairBlocks; ++b) {
      for (uint32_t half = 0; half < 2; ++half) {
        const BFloat16Block block(exponents[lane].word[b][half]);
        const CodeWords<1> word{{codes[lane].word[b][half]}};
        store_values<BFloat16Block>(problem, tile, lane / 4 + 8 * half, kPairBlocks * pair + b,
                                    lane % 4, expand_words(block, word));
      }
    }
  });
}

// E4M3: two lanes, q = 2 i and 2 i + 1, exchange words, so that the first has 16 columns of the
// first block and the other of the second: 16 bytes each, and one scale.
template <class Warp>
DUQPP_WARP_PROGRAM void expand_pair(E4M3Block*, const ExpandProblem& problem,
                                    const WeightTile& tile, uint32_t pair,
                                    const typename Warp::template Lanes<PairCodes>& codes,
                                    const typename Warp::template Lanes<PairCodes>& exponents,
                                    const typename Warp::template Lanes<LaneRowExponents>& rows) {
  for (uint32_t half = 0; half < 2; ++half) {
    typename Warp::template Lanes<uint32_t> other;
    Warp::for_each_lane([&](int lane) {
      other[lane] = lane % 2 ? codes[lane].word[0][half] : codes[lane].word[1][half];
    });
    Warp::exchange_with_neighbour(other);
    Warp::for_each_lane([&](int lane) {
      const uint32_t second = lane % 2, row = lane / 4 + 8 * half;
      const PairCodes& own = codes[lane];
      const CodeWords<2> words = second ? CodeWords<2>{{other[lane], own.word[1][half]}}
                                        : CodeWords<2>{{own.word[0][half], other[lane]}};
      const PairCodes& both = exponents[lane];
      const E4M3Block block(second ? both.word[1][half] : both.word[0][half],
                            rows[lane].of[half]);
      store_values<E4M3Block>(problem, tile, row, kPairBlocks * pair + second, lane % 4 / 2,
                              expand_words(block, words));
    });
  }
}

// A warp's share of a part's pairs.
template <class Block, class Warp>
DUQPP_WARP_PROGRAM void expand_weight_warp(const ExpandProblem& problem, const WeightTile& tile,
                                           const PairRange& part, uint32_t warp) {
  typename Warp::template Lanes<LaneRowExponents> rows;
  Warp::for_each_lane([&](int lane) {
    if constexpr (kRowScaled<Block>) {
      rows[lane] = {{weight_row_exponent(tile, lane / 4), weight_row_exponent(tile, lane / 4 + 8)}};
    }
  });
  const uint32_t pairs = part.end;
  for (uint32_t first = part.first + warp; first < pairs; first += kExpandUnroll * kExpandWarps) {
    typename Warp::template Lanes<PairCodes> codes[kExpandUnroll];
    typename Warp::template Lanes<PairCodes> exponents[kExpandUnroll];
    DUQPP_UNROLL
    for (int i = 0; i < kExpandUnroll; ++i) {
      const uint32_t pair = first + i * kExpandWarps;
      if (pair >= pairs) break;
      Warp::for_each_lane([&](int lane) {
        codes[i][lane] = load_pair(tile, pair, lane);
        for (uint32_t b = 0; b < kPairBlocks; ++b) {
          if (kRowScaled<Block> && b != uint32_t(lane) % 2) continue;  // see expand_pair
          for (uint32_t half = 0; half < 2; ++half) {
            exponents[i][lane].word[b][half] =
                weight_exponent(tile, lane / 4 + 8 * half, kPairBlocks * pair + b);
          }
        }
      });
    }
    DUQPP_UNROLL
    for (int i = 0; i < kExpandUnroll; ++i) {
      const uint32_t pair = first + i * kExpandWarps;
      if (pair >= pairs) break;
      expand_pair<Warp>(static_cast<Block*>(nullptr), problem, tile, pair, codes[i], exponents[i],
                        rows);
    }
  }
}

// A warp of CTA `index` of a plan.
template <class Block, class Warp>
DUQPP_WARP_PROGRAM void expand_weight_cta(const ExpandProblem& problem, uint32_t parts,
                                          uint32_t index, uint32_t warp) {
  const WeightTile tile = weight_tile(problem, index / parts);
  const uint32_t pairs = (tile.blocks + kPairBlocks - 1) / kPairBlocks, part = index % parts;
  if (kRowScaled<Block> && part == 0) {
    Warp::for_each_lane(
        [&](int lane) { store_row_scale(problem, tile, kWarpLanes * warp + lane); });
  }
  expand_weight_warp<Block, Warp>(problem, tile, part_of_pairs(pairs, part, parts), warp);
}

}  // namespace duqpp::cuda
