// How CPU kernels use threads: the caller brings the pool, so that torch.set_num_threads holds.
#pragma once

#include <cstdint>
#include <functional>

namespace duqpp::cpu {

// body(begin, end) runs tasks begin .. end - 1, on any thread.
using ParallelBody = std::function<void(int64_t begin, int64_t end)>;

// Runs body over disjoint ranges that cover [0, tasks), none shorter than `grain` but the last, and
// returns when all are done.
using ParallelFor = std::function<void(int64_t tasks, int64_t grain, const ParallelBody& body)>;

inline void run_serially(int64_t tasks, int64_t grain, const ParallelBody& body) {
  (void)grain;
  if (tasks > 0) body(0, tasks);
}

}  // namespace duqpp::cpu
