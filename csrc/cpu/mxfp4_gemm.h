// MXFP4 matrix product on the CPU, and the weight layout that it reads.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "problem.h"

namespace duqpp::cpu {

// A weight [N, K] as checkpoints hold it (codes [N, K/2], scales [N, K/32], row-major) to the tiled
// layout that mxfp4_gemm reads, and back. Same sizes, byte for byte a permutation of the nibbles.
void prepare_weight(int64_t N, int64_t K, const uint8_t* codes, const uint8_t* scales,
                    uint8_t* tiled_codes, uint8_t* tiled_scales, const ParallelFor& parallel_for);
void restore_weight(int64_t N, int64_t K, const uint8_t* tiled_codes, const uint8_t* tiled_scales,
                    uint8_t* codes, uint8_t* scales, const ParallelFor& parallel_for);

// a row-major with row-major scales, b as prepare_weight left it.
void mxfp4_gemm(const MXFP4GemmProblem& problem, Isa isa, const ParallelFor& parallel_for);

}  // namespace duqpp::cpu
