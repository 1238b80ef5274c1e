// The end of a round of mxfp4_gemm_sm80.cuh: the segments' sums to the CTA's totals, and these to
// the output.
#pragma once

#include <cstdint>

#include "cuda/mxfp4_gemm_sm80_state.cuh"
#include "cuda/warp_program.h"
#include "format/narrow_float.h"
#include "problem.h"

namespace duqpp::cuda {

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
