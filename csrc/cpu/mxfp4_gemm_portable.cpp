// mxfp4_gemm without intrinsics: for machines without vector kernels, and for rows whose scales
// those exclude.
#include <cstring>

#include "cpu/gemm_kernels.h"
#include "format/block_sum.h"
#include "format/e2m1.h"
#include "format/e8m0.h"
#include "format/mx_block.h"
#include "format/narrow_float.h"

namespace duqpp::cpu {
namespace {

constexpr int kMaxRows = 4;

struct DoubledTable {
  int8_t values[16];
  constexpr DoubledTable() : values() {
    for (uint32_t code = 0; code < 16; ++code) {
      values[code] = static_cast<int8_t>(doubled_e2m1(code));
    }
  }
};
constexpr DoubledTable kDoubled;

// The two codes of a byte, each to twice its value.
inline void split_columns(uint8_t byte, uint8_t* even, uint8_t* odd) {
  *even = static_cast<uint8_t>(kDoubled.values[byte & 15u]);
  *odd = static_cast<uint8_t>(kDoubled.values[byte >> 4]);
}

void expand_rows(const uint8_t* codes, const uint8_t* scales, int rows, int64_t blocks,
                 uint8_t* row_panel) {
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t* const record = row_panel + block * rows * kRowPanelBytes;
    for (int row = 0; row < rows; ++row) {
      const uint8_t* const bytes = codes + (row * blocks + block) * kBlockBytes;
      for (int i = 0; i < kBlockBytes; ++i) {
        split_columns(bytes[i], record + row * 32 + i, record + row * 32 + 16 + i);
      }
      const float scale = 0.25f * decode_e8m0(scales[row * blocks + block]);
      std::memcpy(record + rows * 32 + row * 4, &scale, sizeof scale);
    }
  }
}

// A portable panel is one tile, and it holds a row's 32 values together: int8 [16, 32].
void expand_tile(const uint8_t* codes, const uint8_t* scales, int64_t blocks, int,
                 uint8_t* weight_panel) {
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t* const record = weight_panel + block * kWeightPanelBytes;
    for (int lane = 0; lane < kTileRows; ++lane) {
      for (int i = 0; i < kBlockBytes; ++i) {
        const uint8_t byte =
            codes[block * kTileBlockBytes + (i / 4 * kTileRows + lane) * 4 + i % 4];
        split_columns(byte, record + lane * 32 + i, record + lane * 32 + 16 + i);
      }
      const float scale = decode_e8m0(scales[block * kTileRows + lane]);
      std::memcpy(record + kTileRows * 32 + lane * 4, &scale, sizeof scale);
    }
  }
}

int32_t integer_dot(const int8_t* a, const int8_t* b) {
  int32_t dot = 0;
  for (int i = 0; i < kBlockSize; ++i) dot += static_cast<int32_t>(a[i]) * b[i];
  return dot;
}

void multiply_panel(const uint8_t* row_panel, int rows, const uint8_t* weight_panel, int64_t blocks,
                    float* sums) {
  float segment[kMaxRows * kTileRows] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* const activations = row_panel + block * rows * kRowPanelBytes;
    const uint8_t* const weights = weight_panel + block * kWeightPanelBytes;
    float b_scales[kTileRows];
    std::memcpy(b_scales, weights + kTileRows * 32, sizeof b_scales);
    for (int row = 0; row < rows; ++row) {
      float a_scale;
      std::memcpy(&a_scale, activations + rows * 32 + row * 4, sizeof a_scale);
      for (int lane = 0; lane < kTileRows; ++lane) {
        const int32_t dot = integer_dot(reinterpret_cast<const int8_t*>(activations) + row * 32,
                                        reinterpret_cast<const int8_t*>(weights) + lane * 32);
        float& sum = segment[row * kTileRows + lane];
        sum = add_block_product(sum, dot, a_scale, b_scales[lane]);
      }
    }
  }
  for (int i = 0; i < rows * kTileRows; ++i) sums[i] += segment[i];
}

void store(const float* sums, int rows, int columns, const float* bias, void* out, int64_t stride,
           Dtype dtype) {
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < columns; ++i) {
      float value = sums[row * kTileRows + i];
      if (bias) value += bias[i];
      const int64_t index = row * stride + i;
      if (dtype == Dtype::kFloat32) {
        const uint32_t bits = is_nan_bits(float_bits(value)) ? kQuietNanBits : float_bits(value);
        static_cast<float*>(out)[index] = float_from_bits(bits);
      } else {
        static_cast<uint16_t*>(out)[index] =
            dtype == Dtype::kBFloat16 ? encode_bfloat16(value) : encode_float16(value);
      }
    }
  }
}

}  // namespace

const GemmKernels& portable_gemm_kernels() {
  static constexpr GemmKernels kernels = {
      /*max_row_scale=*/254,
      /*max_panel_rows=*/kMaxRows,
      /*max_tile_rows=*/0,         expand_rows,
      /*panel_tiles=*/1,           expand_tile, multiply_panel,
      /*multiply_tile=*/nullptr,   store};
  return kernels;
}

}  // namespace duqpp::cpu
