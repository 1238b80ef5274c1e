#include "cpu/expand.h"

#include <cstring>

#include "format/expand.h"
#include "format/mx_block.h"
#include "format/scale_layout.h"
#include "format/weight_fragment.h"

namespace duqpp::cpu {
namespace {

// The values of a row of the matrix, aligned to an exponent. `exponent_of(block)` is a scale byte,
// `codes_of(block, i)` word i of a block's codes, columns in order.
template <class Block, class ExponentOf, class CodesOf>
void expand_row(const ExpandProblem& problem, int64_t row, uint32_t aligned_to,
                const ExponentOf& exponent_of, const CodesOf& codes_of) {
  using Values = typename Block::Values;
  const int64_t blocks = problem.K / kBlockSize;
  if (problem.row_scales != nullptr) problem.row_scales[row] = row_scale(aligned_to);
  const int64_t row_bytes = blocks * kWordsPerBlock * static_cast<int64_t>(sizeof(Values));
  uint8_t* out = static_cast<uint8_t*>(problem.values) + row * row_bytes;
  for (int64_t block = 0; block < blocks; ++block) {
    const Block expand(exponent_of(block), aligned_to);
    for (int i = 0; i < kWordsPerBlock; ++i, out += sizeof(Values)) {
      const Values values = expand(codes_of(block, i));
      std::memcpy(out, &values, sizeof(values));
    }
  }
}

template <class Block>
void expand_activation_rows(const ExpandProblem& problem, int64_t begin, int64_t end) {
  const int64_t tiles = scale_tiles_along_k(problem.K / kBlockSize);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* const codes = problem.codes + row * (problem.K / 2);
    const auto exponent_of = [&](int64_t block) -> uint32_t {
      return problem.scales[swizzled_offset<int64_t>(row, block, tiles)];
    };
    uint32_t largest = 0;
    for (int64_t block = 0; block < problem.K / kBlockSize; ++block) {
      largest = row_maximum(largest, exponent_of(block));
    }
    expand_row<Block>(
        problem, row, row_exponent(largest), exponent_of,
        [&](int64_t block, int i) {
          uint32_t word;
          std::memcpy(&word, codes + 4 * (block * kWordsPerBlock + i), sizeof(word));
          return word;
        });
  }
}

template <class Block>
void expand_weight_rows(const ExpandProblem& problem, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t of_matrix = problem.first_row + row;
    const bool inside = of_matrix < problem.matrix_rows;
    expand_row<Block>(
        problem, row, inside ? problem.row_exponents[of_matrix] : row_exponent(0),
        [&](int64_t block) -> uint32_t {
          if (!inside) return 0;
          return problem.scales[fragment_scale_offset(of_matrix, block, problem.matrix_rows,
                                                      problem.K)];
        },
        [&](int64_t block, int i) {
          const int64_t offset = fragment_word_offset(of_matrix, block * kWordsPerBlock + i,
                                                      problem.matrix_rows, problem.K);
          uint32_t word = 0;
          if (inside) std::memcpy(&word, problem.codes + 4 * offset, sizeof(word));
          return word;
        });
  }
}

}  // namespace

void expand_activation(const ExpandProblem& problem, const ParallelFor& parallel_for) {
  parallel_for(problem.rows, 1, [&](int64_t begin, int64_t end) {
    if (problem.format == WideFormat::kE4M3) {
      expand_activation_rows<E4M3Block>(problem, begin, end);
    } else {
      expand_activation_rows<BFloat16Block>(problem, begin, end);
    }
  });
}

void expand_weight(const ExpandProblem& problem, const ParallelFor& parallel_for) {
  parallel_for(problem.rows, 1, [&](int64_t begin, int64_t end) {
    if (problem.format == WideFormat::kE4M3) {
      expand_weight_rows<E4M3Block>(problem, begin, end);
    } else {
      expand_weight_rows<BFloat16Block>(problem, begin, end);
    }
  });
}

}  // namespace duqpp::cpu
