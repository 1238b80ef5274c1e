// csrc/format against CUTLASS's layouts and the CUDA toolkit's conversions, evaluated on the host.

#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>

#include "check.h"
#include "cuda/rotate_quantize_plan.h"
#include "cute/atom/mma_traits_sm80.hpp"
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/detail/sm103_blockscaled_layout.hpp"
#include "format/e2m1.h"
#include "format/e8m0.h"
#include "format/scale_layout.h"
#include "host_warp.h"

namespace {

using namespace duqpp;

// The swizzled layout is that of both operands, on sm_100 and in sm_103's spelling.
void test_scale_layout() {
  using Sm100 = cutlass::detail::Sm1xxBlockScaledConfig<32>;
  using Sm103 = cutlass::detail::Sm103BlockScaledConfig<32>;
  long offsets = 0;
  for (const int rows : {1, 7, 31, 32, 33, 127, 128, 129, 256, 300, 1000}) {
    for (const int K : {32, 64, 96, 128, 160, 224, 288, 4096, 4128, 14336}) {
      const auto shape = cute::make_shape(rows, rows, K, 1);
      const auto a = Sm100::tile_atom_to_shape_SFA(shape);
      const auto b = Sm100::tile_atom_to_shape_SFB(shape);
      const auto a103 = Sm103::tile_atom_to_shape_SFA(shape);
      const auto b103 = Sm103::tile_atom_to_shape_SFB(shape);
      const int64_t blocks = K / kBlockSize, tiles = scale_tiles_along_k(blocks);
      const auto strides = duqpp::cuda::scale_strides(ScaleLayout::kSwizzled, uint32_t(blocks));
      const auto row_major = duqpp::cuda::scale_strides(ScaleLayout::kRowMajor, uint32_t(blocks));
      const int64_t size = swizzled_size(rows, blocks);
      CHECK(cute::cosize(cute::filter_zeros(a)) == size, "%d x %d", rows, K);
      CHECK(cute::cosize(cute::filter_zeros(b)) == size, "%d x %d", rows, K);
      for (int row = 0; row < rows; ++row) {
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t offset = swizzled_offset<int64_t>(row, block, tiles);
          const int k = static_cast<int>(block) * kBlockSize;
          CHECK(a(row, k, 0) == offset && a(row, k + 31, 0) == offset, "a (%d, %d)", row, k);
          CHECK(b(row, k, 0) == offset && b(row, k + 31, 0) == offset, "b (%d, %d)", row, k);
          CHECK(a103(row, k, 0) == offset && b103(row, k, 0) == offset, "103 (%d, %d)", row, k);
          // The kernel's sums of strides: tile, lane row, second row, block.
          const auto by_strides = [&](const duqpp::cuda::ScaleStrides& s, ScaleLayout layout) {
            return int64_t{duqpp::cuda::scale_tile_offset(s, row & ~15)} + (row & 7) * s.r +
                   ((row >> 3) & 1) * s.h +
                   duqpp::cuda::scale_block_offset(layout, uint32_t(block));
          };
          CHECK(by_strides(strides, ScaleLayout::kSwizzled) == offset, "(%d, %d)", row, k);
          CHECK(by_strides(row_major, ScaleLayout::kRowMajor) == row * blocks + block, "(%d, %d)",
                row, k);
          offsets += 4;
        }
      }
    }
  }
  std::printf("%ld offsets\n", offsets);
  CHECK(offsets > 1000000, "%ld offsets", offsets);
}

// The fragment layout that the host test's MMA is written from is CuTe's.
void test_fragments() {
  using Traits = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {  // CuTe's A is (m, k), column-major in the layout's codomain
      CHECK(Traits::ALayout{}(lane, i) == ptx::a_row(lane, i) + 16 * ptx::a_column(lane, i),
            "a (%d, %d)", lane, i);
    }
    for (int i = 0; i < 4; ++i) {  // B is (n, k), C is (m, n)
      CHECK(Traits::BLayout{}(lane, i) == ptx::b_column(lane, i) + 8 * ptx::b_row(lane, i),
            "b (%d, %d)", lane, i);
      CHECK(Traits::CLayout{}(lane, i) == ptx::c_row(lane, i) + 16 * ptx::c_column(lane, i),
            "c (%d, %d)", lane, i);
    }
  }
}

void check_against_toolkit(uint32_t bits) {
  const float value = float_from_bits(bits);
  if (std::isnan(value)) return;
  const uint32_t code = __nv_cvt_float_to_fp4(value, __NV_E2M1, cudaRoundNearest);
  CHECK(encode_e2m1(value) == code, "%a: %u, toolkit %u", value, encode_e2m1(value), code);
  // amax / 6 rounds within its binade, so that rounding it up to a power of two is the ceil rule.
  const float sixth = std::fabs(value) / 6;
  if (!std::isnormal(sixth)) return;
  const uint32_t scale = __nv_cvt_float_to_e8m0(sixth, __NV_SATFINITE, cudaRoundPosInf);
  const uint32_t ceil = scale_exponent(bits & 0x7FFFFFFFu, scale_addend(ScaleRule::kCeil));
  CHECK(ceil == scale, "%a: scale %u, toolkit %u", value, ceil, scale);
}

void test_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) check_against_toolkit(bits << 16);
  for (const float knot : {0.25f, 0.5f, 0.75f, 1.0f, 1.25f, 1.5f, 1.75f, 2.0f, 2.5f, 3.0f, 3.5f,
                           4.0f, 5.0f, 6.0f, 7.0f, 12.0f, 0x1.8p-120f, 0x1.8p120f}) {
    for (uint32_t step = 0; step <= 4000; ++step) {
      check_against_toolkit(float_bits(knot) - 2000 + step);
      check_against_toolkit((float_bits(knot) - 2000 + step) | 0x80000000u);
    }
  }
}

}  // namespace

int main() {
  test_scale_layout();
  test_fragments();
  test_conversions();
  return duqpp::testing::finish("test_cutlass");
}
