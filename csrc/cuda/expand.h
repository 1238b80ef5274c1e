// MXFP4 matrices in a wider format, on a GPU: for products of many rows where tensor cores know no
// block scales.
#pragma once

#include "problem.h"

namespace duqpp::cuda {

// Each enqueues one kernel on `stream` (a cudaStream_t) of the current device: no allocation, no
// synchronization. codes and values start at multiples of 16 bytes, scales at a multiple of 4. All
// of values and row_scales is written. Throws std::runtime_error when CUDA refuses.

// A matrix as rotate_quantize leaves it: row-major codes, swizzled scales; first_row is 0 and
// matrix_rows is rows. At most 2^31 values.
void expand_activation(const ExpandProblem& problem, void* stream);

// Rows of a weight in the layout of format/weight_fragment.h, from a multiple of 16 on. Rows beyond
// the matrix, of which there may be 15, become zeros. row_exponents are read with kE4M3 alone.
void expand_weight(const ExpandProblem& problem, void* stream);

}  // namespace duqpp::cuda
