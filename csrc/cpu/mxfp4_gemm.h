// MXFP4 matrix product on the CPU, and the weight layout that it reads.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "problem.h"

namespace duqpp::cpu {

// A weight [N, K] as checkpoints hold it (codes [N, K/2], scales [N, K/32], row-major) to the tiled
// layout that mxfp4_gemm reads (gemm_kernels.h), and back. Same sizes, a permutation of the bytes.
void prepare_weight(int64_t N, int64_t K, const uint8_t* codes, const uint8_t* scales,
                    uint8_t* tiled_codes, uint8_t* tiled_scales, const ParallelFor& parallel_for);
void restore_weight(int64_t N, int64_t K, const uint8_t* tiled_codes, const uint8_t* tiled_scales,
                    uint8_t* codes, uint8_t* scales, const ParallelFor& parallel_for);

// a row-major with row-major scales, b as prepare_weight left it.
//
// An output is, in float32 and rounding to nearest even,
//   out = round_to_out_dtype(round(total + bias))      without a bias, no addition
// where `total` is as format/block_sum.h defines it: one rounding a block, whatever the scales, and
// one a segment. A scale byte of 255 makes its row or column NaN, the quiet NaN with a clear sign.
// The bytes are the same on every instruction set, for every division into tasks and whatever other
// rows there are. The processor must not flush subnormals to zero.
void mxfp4_gemm(const MXFP4GemmProblem& problem, Isa isa, const ParallelFor& parallel_for);

// Whether a product of M rows reads its weights as they lie in memory; more rows make it worth
// while to expand them first, a panel of columns at a time.
bool multiplies_in_place(Isa isa, int64_t M);

}  // namespace duqpp::cpu
