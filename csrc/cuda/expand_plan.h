// How expand_weight is divided among CTAs. Host code without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "format/host_device.h"
#include "format/mx_block.h"
#include "format/weight_fragment.h"

namespace duqpp::cuda {

inline constexpr int kExpandThreads = 128;
inline constexpr int kExpandWarps = kExpandThreads / 32;
inline constexpr int kExpandUnroll = 4;     // loads that a thread has under way
inline constexpr int kExpandCtasPerSm = 8;  // what 64 registers a thread allow to run at once

// A CTA expands a part of the pairs of blocks of a tile of 16 rows. CTAs of a tile follow each
// other.
struct ExpandWeightPlan {
  int64_t tiles;
  int32_t parts;  // of each tile, which differ by one pair at most
};

// As many parts as give every SM its CTAs, each but the smallest with all loads of its threads
// under way.
constexpr ExpandWeightPlan plan_expand_weight(int64_t rows, int64_t K, int sm_count) {
  const int64_t tiles = (rows + kFragmentRows - 1) / kFragmentRows;
  const int64_t pairs = (K / kBlockSize + kPairBlocks - 1) / kPairBlocks;
  const int64_t at_once = kExpandWarps * kExpandUnroll, ctas = kExpandCtasPerSm * sm_count;
  const int64_t wanted = tiles == 0 ? 1 : (ctas + tiles - 1) / tiles;
  const int64_t most = std::max<int64_t>(1, (pairs + at_once - 1) / at_once);
  return {tiles, static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, most))};
}

// Pairs first .. end - 1 of a tile.
struct PairRange {
  uint32_t first, end;
};
DUQPP_HOST_DEVICE constexpr PairRange part_of_pairs(uint32_t pairs, uint32_t part, uint32_t parts) {
  return {static_cast<uint32_t>(uint64_t{pairs} * part / parts),
          static_cast<uint32_t>(uint64_t{pairs} * (part + 1) / parts)};
}

static_assert(plan_expand_weight(2048, 28672, 132).parts == 9);   // 128 tiles, of LLaMA-3 70B's down
static_assert(plan_expand_weight(28672, 4096, 132).parts == 1);   // 1792 tiles are enough
static_assert(plan_expand_weight(1024, 4096, 132).parts == 4);    // 64 pairs, 16 of them at once

}  // namespace duqpp::cuda
