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
// In four files: what is kept (_state), loads (_pipeline), a segment (_mainloop), a round's end
// (_epilogue). None has a GPU instruction: a policy `Warp` brings them, as in rotate_quantize.cuh.
#pragma once

#include "cuda/mxfp4_gemm_sm80_epilogue.cuh"
#include "cuda/mxfp4_gemm_sm80_mainloop.cuh"
#include "cuda/mxfp4_gemm_sm80_pipeline.cuh"
#include "cuda/mxfp4_gemm_sm80_state.cuh"
