// What memory safety needs of the tensors that reach a kernel. The contract's checks, with their
// messages, are in duqpp/ops/__init__.py; these stand behind them for callers of the raw ops.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "format/mx_block.h"
#include "problem.h"

namespace duqpp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype float_dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Float:
      return Dtype::kFloat32;
    default:
      STD_TORCH_CHECK(false, name, " must be bfloat16, float16 or float32");
  }
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// A uint8 matrix [rows, columns], contiguous.
inline void check_bytes(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte, name, " must be uint8");
  check_contiguous(name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  " must be [", rows, ", ", columns, "]");
}

// Codes [rows, K/2] and row-major scales [rows, K/32]; returns K.
inline int64_t check_mxfp4(const char* name, const Tensor& codes, const Tensor& scales) {
  STD_TORCH_CHECK(codes.dim() == 2, name, ".codes must be [rows, K/2]");
  const int64_t K = codes.size(1) * 2;
  STD_TORCH_CHECK(K % kBlockSize == 0, name, ".codes must be [rows, K/2], K a multiple of 32");
  check_bytes(name, codes, codes.size(0), K / 2);
  check_bytes(name, scales, codes.size(0), K / kBlockSize);
  return K;
}

// Rows [..., K] of floats, contiguous, K a multiple of 32; returns K.
inline int64_t check_rows(const char* name, const Tensor& x) {
  check_contiguous(name, x);
  const int64_t K = x.dim() == 0 ? 0 : x.size(x.dim() - 1);
  STD_TORCH_CHECK(K > 0 && K % kBlockSize == 0, name, " must be [..., K], K a multiple of 32");
  return K;
}

}  // namespace duqpp
