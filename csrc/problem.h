// What an op is asked to do, as pointers and sizes: the only thing that the tensor-facing code hands to
// the kernels. Everything is checked before a problem is filled; kernels trust it.
#pragma once

#include <cstdint>

#include "format/e8m0.h"

namespace duqpp {

enum class Dtype : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

enum class ScaleLayout : int32_t { kRowMajor = 0, kSwizzled = 1 };  // see format/scale_layout.h

// What happens to the input before it is rotated, computed in float32 and rounded once to the dtype
// of x, so that it is what tensor cores multiply:
//   kNone: x;  kRmsNorm: x / sqrt(mean(x^2) + epsilon) * weight;  kSiluMul: silu(x) * up.
enum class Prologue : int32_t { kNone = 0, kRmsNorm = 1, kSiluMul = 2 };

// (codes, scales) = quantize(prologue(x) R), block by block of 32 along K.
struct RotateQuantizeProblem {
  int64_t M, K;
  Dtype dtype;           // of x, up and norm_weight
  Prologue prologue;
  ScaleRule rule;
  ScaleLayout scale_layout;
  const void* x;           // [M, K] contiguous; with kSiluMul the gate
  const void* up;          // [M, K] contiguous with kSiluMul, else null
  const void* norm_weight; // [K] with kRmsNorm, or null for ones
  float epsilon;           // of kRmsNorm
  const uint16_t* rotation;   // bfloat16 [matrices, 32, 32], or null for the identity
  int64_t rotation_matrices;  // 1: shared by all blocks; K/32: one per block
  uint8_t* codes;          // [M, K/2]
  uint8_t* scales;         // [M, K/32] or the swizzled buffer, padding included
};

// out = dequantize(a) dequantize(b)^T + bias: [M, K] times [N, K] transposed.
struct MXFP4GemmProblem {
  int64_t M, N, K;
  const uint8_t* a_codes;   // [M, K/2]
  const uint8_t* a_scales;  // in the layout that the backend's rotate_quantize writes
  const uint8_t* b_codes;   // [N, K/2], and b_scales, as the backend's prepare_weight leaves them
  const uint8_t* b_scales;
  const void* bias;         // [N] of bias_dtype, or null
  Dtype bias_dtype;
  void* out;                // [M, N] of out_dtype, contiguous
  Dtype out_dtype;
};

// Wider formats that MXFP4 is expanded to, for tensor cores without block scales; format/expand.h
// defines both.
enum class WideFormat : int32_t { kE4M3 = 0, kBFloat16 = 1 };

// values = an MXFP4 matrix, or rows of it, in a wider format; with kE4M3 row r of `values` times
// row_scales[r].
struct ExpandProblem {
  int64_t rows, K;      // of values
  int64_t first_row;    // of the matrix, that is row 0 of values
  int64_t matrix_rows;  // rows of values that are beyond the matrix become zeros
  WideFormat format;
  const uint8_t* codes;   // of the whole matrix
  const uint8_t* scales;
  const uint8_t* row_exponents;  // [matrix_rows] of a weight: row_exponent() of each row, else null
  void* values;       // [rows, K]
  float* row_scales;  // [rows] with kE4M3, else null
};

// GPTQ's inner loop over a block of 32 columns; duqpp/ops/gptq_block.py defines it.
struct GptqBlockProblem {
  int64_t rows;
  ScaleRule rule;
  const float* values;  // [rows, 32] contiguous, as are all of these
  const float* factor;  // [32, 32], or null for zeros: errors stay in their columns
  uint8_t* codes;       // [rows, 16]
  uint8_t* scales;      // [rows]
  float* compensated;   // [rows, 32]
  float* rounded;       // [rows, 32]
};

}  // namespace duqpp
