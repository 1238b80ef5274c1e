#include "cpu/rotate_quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/rotate_quantize_strip.h"

namespace duqpp::cpu {
namespace {

struct PortableLanes {
  using Vector = float;
  static constexpr int kCount = 1;
  static constexpr int kTileRows = 4, kTileVectors = 2;
  static inline Vector zero() { return 0.0f; }
  static inline Vector load(const float* p) { return *p; }
  static inline Vector broadcast(const float* p) { return *p; }
  static inline Vector multiply_add(Vector a, Vector b, Vector c) { return std::fma(a, b, c); }
  static inline void store(float* p, Vector v) { *p = v; }
};

const StripKernels& strip_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return kAvx512Strip;
  if (isa == Isa::kAvx2) return kAvx2Strip;
#endif
  (void)isa;
  return kPortableStrip;
}

// A task has at least this many blocks, some 20 microseconds of work, to be worth a thread's
// waking.
constexpr int64_t kBlocksPerTask = 256;

}  // namespace

const StripKernels kPortableStrip = StripLoop<PortableLanes>::kernels();

Isa rotate_quantize_isa(Isa isa) { return isa == Isa::kAvxVnni ? Isa::kAvx2 : isa; }

void rotate_quantize(const RotateQuantizeProblem& problem, Isa isa,
                     const ParallelFor& parallel_for) {
  const StripKernels& kernels = strip_kernels(rotate_quantize_isa(isa));
  const StripFunction run_strip = kernels.select(problem);
  const int64_t blocks = problem.K / kBlockSize;
  const int64_t strips = (problem.M + kStripRows - 1) / kStripRows;

  if (problem.scale_layout == ScaleLayout::kSwizzled) {
    std::memset(problem.scales, 0, swizzled_size(problem.M, blocks));  // the padding
  }

  alignas(64) float shared_matrix[kMatrixSize];
  const bool shared = problem.rotation != nullptr && problem.rotation_matrices == 1;
  if (shared) {
    for (int i = 0; i < kMatrixSize; ++i) {
      shared_matrix[i] = decode_bfloat16(problem.rotation[i]);
    }
  }

  std::vector<float> inverse_rms;
  if (problem.prologue == Prologue::kRmsNorm) {
    inverse_rms.resize(problem.M);
    parallel_for(problem.M, std::max<int64_t>(1, 4 * kBlocksPerTask / blocks),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = begin; row < end; ++row) {
                     inverse_rms[row] = kernels.inverse_rms(problem, row);
                   }
                 });
  }

  // A single strip, as in decoding, is cut along K instead.
  const int64_t pieces = strips == 1 ? std::max<int64_t>(1, blocks / kBlocksPerTask) : 1;
  const int64_t piece_blocks = (blocks + pieces - 1) / pieces;
  parallel_for(strips * pieces, std::max<int64_t>(1, kBlocksPerTask / (kStripRows * piece_blocks)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t first_row = task / pieces * kStripRows;
                   const int64_t first_block = task % pieces * piece_blocks;
                   run_strip({&problem, shared ? shared_matrix : nullptr, inverse_rms.data(),
                              first_row, std::min<int64_t>(kStripRows, problem.M - first_row),
                              first_block, std::min(blocks, first_block + piece_blocks)});
                 }
               });
}

}  // namespace duqpp::cpu
