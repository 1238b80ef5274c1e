// mxfp4_gemm over the kernels of an instruction set: which rows and tiles a thread multiplies, and
// the memory that it works in.
#include "cpu/mxfp4_gemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/gemm_kernels.h"
#include "cpu/scratch.h"
#include "format/block_sum.h"
#include "format/mx_block.h"
#include "format/narrow_float.h"

namespace duqpp::cpu {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls move_word(offset in rows, offset in tiles) for every word of codes of a weight [N, K], and
// move_scale for every scale: row-major on one side, in tiles that are transposed on the other.
template <typename MoveWord, typename MoveScale>
void relayout(int64_t N, int64_t K, const ParallelFor& parallel_for, const MoveWord& move_word,
              const MoveScale& move_scale) {
  const int64_t blocks = K / kBlockSize;
  parallel_for(ceil_div(N, kTileRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileRows;
      const int64_t width = std::min<int64_t>(kTileRows, N - first);
      const auto for_each_element = [&](int64_t count, const auto& move) {  // count: in a row
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t lane = 0; lane < width; ++lane) {
            move((first + lane) * count + i, first * count + i * width + lane);
          }
        }
      };
      for_each_element(blocks * kBlockWords, move_word);
      for_each_element(blocks, move_scale);
    }
  });
}

const GemmKernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512_gemm_kernels();
  if (isa == Isa::kAvxVnni) return avxvnni_gemm_kernels();
  if (isa == Isa::kAvx2) return avx2_gemm_kernels();
#endif
  (void)isa;
  return portable_gemm_kernels();
}

std::vector<float> to_float32(const void* values, int64_t count, Dtype dtype) {
  std::vector<float> result(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    result[i] = dtype == Dtype::kFloat32 ? static_cast<const float*>(values)[i]
                : dtype == Dtype::kBFloat16
                    ? decode_bfloat16(static_cast<const uint16_t*>(values)[i])
                    : decode_float16(static_cast<const uint16_t*>(values)[i]);
  }
  return result;
}

// The tiles of a prepared weight. A last tile of fewer than 16 rows is copied to a whole one, so
// that kernels see whole tiles only.
class TiledWeight {
 public:
  TiledWeight(int64_t N, int64_t K, const uint8_t* codes, const uint8_t* scales)
      : blocks_(K / kBlockSize), whole_tiles_(N / kTileRows), codes_(codes), scales_(scales) {
    const int64_t width = N % kTileRows;
    if (width == 0) return;
    last_codes_.resize(blocks_ * kTileBlockBytes);
    last_scales_.resize(blocks_ * kTileRows);
    const uint8_t* const words = codes_ + whole_tiles_ * blocks_ * kTileBlockBytes;
    for (int64_t i = 0; i < blocks_ * kBlockWords; ++i) {
      std::memcpy(last_codes_.data() + i * kTileRows * 4, words + i * width * 4, width * 4);
    }
    const uint8_t* const bytes = scales_ + whole_tiles_ * blocks_ * kTileRows;
    for (int64_t i = 0; i < blocks_; ++i) {
      std::memcpy(last_scales_.data() + i * kTileRows, bytes + i * width, width);
    }
  }

  int64_t blocks() const { return blocks_; }
  const uint8_t* codes(int64_t tile) const {
    return tile < whole_tiles_ ? codes_ + tile * blocks_ * kTileBlockBytes : last_codes_.data();
  }
  const uint8_t* scales(int64_t tile) const {
    return tile < whole_tiles_ ? scales_ + tile * blocks_ * kTileRows : last_scales_.data();
  }

 private:
  int64_t blocks_, whole_tiles_;
  const uint8_t *codes_, *scales_;
  std::vector<uint8_t> last_codes_, last_scales_;
};

// Rows split into row panels of nearly equal size: panel i starts at row begin(i).
struct RowSplit {
  int64_t rows, panels;
  int64_t begin(int64_t panel) const { return panel * rows / panels; }
  int size(int64_t panel) const { return static_cast<int>(begin(panel + 1) - begin(panel)); }
};

class Gemm {
 public:
  Gemm(const MXFP4GemmProblem& problem, const ParallelFor& parallel_for)
      : problem_(problem),
        parallel_for_(parallel_for),
        weight_(problem.N, problem.K, problem.b_codes, problem.b_scales) {
    if (problem.bias) {
      bias_ = to_float32(problem.bias, problem.N, problem.bias_dtype);
      bias_.resize(problem.N + kMaxPanelColumns);
    }
  }

  // Rows [begin, end) of the product, whose scales must suit the kernels.
  void multiply_rows(const GemmKernels& kernels, int64_t begin, int64_t end) {
    // Row panels take a few MiB whatever M: enough rows to hide the expansion of the weights.
    constexpr int64_t kRowPanelsBytes = 8 << 20;
    const int64_t row_bytes = std::max<int64_t>(1, weight_.blocks() * kRowPanelBytes);
    const int64_t chunk = std::max<int64_t>(kMaxRows, kRowPanelsBytes / row_bytes);
    for (int64_t row = begin; row < end; row += chunk) {
      multiply_chunk(kernels, row, std::min(chunk, end - row));
    }
  }

 private:
  // Tasks worth about 10 us, which is what waking a thread costs: 2^18 values read once.
  static int64_t grain(int64_t values_per_task) {
    return ceil_div(int64_t{1} << 18, std::max<int64_t>(1, values_per_task));
  }

  void multiply_chunk(const GemmKernels& kernels, int64_t first_row, int64_t rows) {
    const int64_t blocks = weight_.blocks();
    const bool expand = rows > kernels.max_tile_rows;
    const RowSplit split = {rows, expand ? ceil_div(rows, kernels.max_panel_rows) : 1};
    thread_local Scratch row_scratch;
    uint8_t* const row_panels = row_scratch.reserve(rows * blocks * kRowPanelBytes);

    const int64_t panel_values = ceil_div(rows, split.panels) * blocks * kBlockSize;
    parallel_for_(split.panels, grain(panel_values), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t row = split.begin(panel);
        kernels.expand_rows(problem_.a_codes + (first_row + row) * blocks * kBlockBytes,
                            problem_.a_scales + (first_row + row) * blocks, split.size(panel),
                            blocks, row_panels + row * blocks * kRowPanelBytes);
      }
    });
    const int64_t columns = kernels.panel_tiles * kTileRows;
    parallel_for_(ceil_div(problem_.N, columns), grain(columns * blocks * kBlockSize),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t panel = begin; panel < end; ++panel) {
                      if (expand) {
                        multiply_expanded(kernels, split, row_panels, first_row, panel * columns);
                      } else {
                        multiply_in_place(kernels, static_cast<int>(rows), row_panels, first_row,
                                          panel * columns);
                      }
                    }
                  });
  }

  // The columns of `out` from first_column, as many as a weight panel has, for every row panel.
  void multiply_expanded(const GemmKernels& kernels, const RowSplit& split,
                         const uint8_t* row_panels, int64_t first_row, int64_t first_column) const {
    const int64_t blocks = weight_.blocks();
    const int64_t last_tile = (problem_.N - 1) / kTileRows;
    thread_local Scratch weight_scratch;
    uint8_t* const weight_panel =
        weight_scratch.reserve(blocks * kernels.panel_tiles * kWeightPanelBytes);
    for (int i = 0; i < kernels.panel_tiles; ++i) {
      const int64_t tile = std::min(first_column / kTileRows + i, last_tile);  // the last one twice
      kernels.expand_tile(weight_.codes(tile), weight_.scales(tile), blocks, i, weight_panel);
    }
    for (int64_t panel = 0; panel < split.panels; ++panel) {
      const int64_t row = split.begin(panel);
      const int rows = split.size(panel);
      const uint8_t* const row_panel = row_panels + row * blocks * kRowPanelBytes;
      alignas(64) float sums[kMaxRows * kMaxPanelColumns] = {};
      for_each_segment([&](int64_t block, int64_t count) {
        kernels.multiply_panel(row_panel + block * rows * kRowPanelBytes, rows,
                               weight_panel + block * kernels.panel_tiles * kWeightPanelBytes,
                               count, sums);
      });
      store(kernels, sums, first_row + row, rows, first_column);
    }
  }

  // The same for a single row panel: expanded weights would have no second use.
  void multiply_in_place(const GemmKernels& kernels, int rows, const uint8_t* row_panel,
                         int64_t first_row, int64_t first_column) const {
    const int64_t tile = first_column / kTileRows;
    const int64_t tiles =
        std::min<int64_t>(kernels.panel_tiles, ceil_div(problem_.N - first_column, kTileRows));
    alignas(64) float sums[kMaxRows * kMaxPanelColumns] = {};
    for (int64_t i = 0; i < tiles; ++i) {
      for_each_segment([&](int64_t block, int64_t count) {
        kernels.multiply_tile(row_panel + block * rows * kRowPanelBytes, rows,
                              weight_.codes(tile + i) + block * kTileBlockBytes,
                              weight_.scales(tile + i) + block * kTileRows, count,
                              sums + i * kTileRows);
      });
    }
    store(kernels, sums, first_row, rows, first_column);
  }

  // Calls act(first block, blocks) for the segments of K.
  template <typename Act>
  void for_each_segment(const Act& act) const {
    for (int64_t block = 0; block < weight_.blocks(); block += kSegmentBlocks) {
      act(block, std::min<int64_t>(kSegmentBlocks, weight_.blocks() - block));
    }
  }

  void store(const GemmKernels& kernels, const float* sums, int64_t row, int rows,
             int64_t column) const {
    const int64_t columns = std::min<int64_t>(kernels.panel_tiles * kTileRows, problem_.N - column);
    const int64_t element_bytes = problem_.out_dtype == Dtype::kFloat32 ? 4 : 2;
    uint8_t* const out =
        static_cast<uint8_t*>(problem_.out) + (row * problem_.N + column) * element_bytes;
    kernels.store(sums, rows, static_cast<int>(columns),
                  bias_.empty() ? nullptr : bias_.data() + column, out, problem_.N,
                  problem_.out_dtype);
  }

  // What every table of kernels stays within.
  static constexpr int64_t kMaxRows = 16;
  static constexpr int64_t kMaxPanelColumns = 32;

  const MXFP4GemmProblem& problem_;
  const ParallelFor& parallel_for_;
  TiledWeight weight_;
  std::vector<float> bias_;
};

}  // namespace

void prepare_weight(int64_t N, int64_t K, const uint8_t* codes, const uint8_t* scales,
                    uint8_t* tiled_codes, uint8_t* tiled_scales, const ParallelFor& parallel_for) {
  relayout(
      N, K, parallel_for,
      [&](int64_t in_rows, int64_t in_tiles) {
        std::memcpy(tiled_codes + in_tiles * 4, codes + in_rows * 4, 4);
      },
      [&](int64_t in_rows, int64_t in_tiles) { tiled_scales[in_tiles] = scales[in_rows]; });
}

void restore_weight(int64_t N, int64_t K, const uint8_t* tiled_codes, const uint8_t* tiled_scales,
                    uint8_t* codes, uint8_t* scales, const ParallelFor& parallel_for) {
  relayout(
      N, K, parallel_for,
      [&](int64_t in_rows, int64_t in_tiles) {
        std::memcpy(codes + in_rows * 4, tiled_codes + in_tiles * 4, 4);
      },
      [&](int64_t in_rows, int64_t in_tiles) { scales[in_rows] = tiled_scales[in_tiles]; });
}

bool multiplies_in_place(Isa isa, int64_t M) { return M <= kernels_of(isa).max_tile_rows; }

void mxfp4_gemm(const MXFP4GemmProblem& problem, Isa isa, const ParallelFor& parallel_for) {
  if (problem.M == 0 || problem.N == 0) return;
  Gemm gemm(problem, parallel_for);
  const GemmKernels& kernels = kernels_of(isa);
  const int64_t blocks = problem.K / kBlockSize;

  // Runs of rows that the kernels take, and of rows with a scale beyond them: those are portable's.
  const auto fits = [&](int64_t row) {
    const uint8_t* const scales = problem.a_scales + row * blocks;
    int beyond = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      beyond |= (scales[i] > kernels.max_row_scale) & (scales[i] != kNanScale);
    }
    return beyond == 0;
  };
  int64_t begin = 0;
  bool begin_fits = fits(0);
  for (int64_t row = 1; row <= problem.M; ++row) {
    const bool row_fits = row < problem.M && fits(row);
    if (row < problem.M && row_fits == begin_fits) continue;
    gemm.multiply_rows(begin_fits ? kernels : portable_gemm_kernels(), begin, row);
    begin = row;
    begin_fits = row_fits;
  }
}

}  // namespace duqpp::cpu
