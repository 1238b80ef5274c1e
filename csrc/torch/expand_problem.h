// The problem of expand_activation and expand_weight from tensors, and where their results go.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "format/scale_layout.h"
#include "format/weight_fragment.h"
#include "torch/allocate.h"
#include "torch/checks.h"

namespace duqpp {

// An expansion that is ready to run: checked, and its results allocated.
struct Expansion {
  ExpandProblem problem;
  Tensor values;      // [rows, K]
  Tensor row_scales;  // float32 [rows, 1] of float8_e4m3fn, empty of bfloat16

  std::tuple<Tensor, Tensor> results() const { return {values, row_scales}; }
};

inline WideFormat wide_format(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::BFloat16,
                  "dtype must be float8_e4m3fn or bfloat16");
  return dtype == ScalarType::BFloat16 ? WideFormat::kBFloat16 : WideFormat::kE4M3;
}

// Rows first_row .. first_row + rows - 1 of a matrix whose scales take `scales_size` bytes.
inline Expansion prepare_expansion(const Tensor& codes, const Tensor& scales, int64_t scales_size,
                                   int64_t first_row, int64_t rows, ScalarType dtype) {
  Expansion expansion{};
  ExpandProblem& problem = expansion.problem;
  problem.format = wide_format(dtype);
  STD_TORCH_CHECK(codes.dim() == 2, "codes must be [rows, K/2]");
  problem.K = codes.size(1) * 2;
  problem.rows = rows;
  problem.first_row = first_row;
  problem.matrix_rows = codes.size(0);
  STD_TORCH_CHECK(problem.K % kBlockSize == 0, "codes must be [rows, K/2], K a multiple of 32");
  check_bytes("codes", codes, problem.matrix_rows, problem.K / 2);
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Byte, "scales must be uint8");
  check_contiguous("scales", scales);
  STD_TORCH_CHECK(scales.numel() == scales_size, "scales must have ", scales_size, " bytes");
  expansion.values = empty_on_device_of(codes, {rows, problem.K}, dtype);
  const int64_t scaled = problem.format == WideFormat::kE4M3 ? rows : 0;
  expansion.row_scales = empty_on_device_of(codes, {scaled, 1}, ScalarType::Float);
  problem.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  problem.scales = static_cast<const uint8_t*>(scales.const_data_ptr());
  problem.values = expansion.values.mutable_data_ptr();
  if (scaled > 0) {
    problem.row_scales = static_cast<float*>(expansion.row_scales.mutable_data_ptr());
  }
  return expansion;
}

// All rows of a matrix as rotate_quantize leaves it on a GPU.
inline Expansion prepare_activation_expansion(const Tensor& codes, const Tensor& scales,
                                              ScalarType dtype) {
  STD_TORCH_CHECK(codes.numel() <= int64_t{1} << 30, "codes must have at most 2^31 values, got ",
                  2 * codes.numel());
  const int64_t blocks = codes.size(-1) * 2 / kBlockSize;
  return prepare_expansion(codes, scales, swizzled_size(codes.size(0), blocks), 0, codes.size(0),
                           dtype);
}

// Rows of a weight in the layout of format/weight_fragment.h, and up to 15 beyond its end.
inline Expansion prepare_weight_expansion(const Tensor& codes, const Tensor& scales,
                                          int64_t first_row, int64_t rows, ScalarType dtype) {
  STD_TORCH_CHECK(first_row >= 0 && first_row % kFragmentRows == 0,
                  "first_row must be a multiple of 16, got ", first_row);
  STD_TORCH_CHECK(rows >= 0 && first_row + rows < codes.size(0) + kFragmentRows,
                  "rows must end at most 15 beyond the weight's, got ", first_row, " + ", rows);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) % 8 == 0,
                  "codes must be [rows, K/2], rows a multiple of 8, got ", codes.size(0));
  const int64_t N = codes.size(0), K = codes.size(1) * 2;
  Expansion expansion =
      prepare_expansion(codes, scales, fragment_scales_size(N, K), first_row, rows, dtype);
  expansion.problem.row_exponents = expansion.problem.scales + fragment_row_exponents_offset(N, K);
  return expansion;
}

}  // namespace duqpp
