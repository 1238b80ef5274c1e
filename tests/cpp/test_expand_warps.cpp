// The programs of cuda/expand.cuh, run on the host as a GPU runs them, against cpu/expand.cpp; and
// weights against their row-major form. Reads outside a matrix are the address sanitizer's to see.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/expand.h"
#include "cuda/expand.cuh"
#include "format/scale_layout.h"
#include "host_lanes.h"

namespace {

using namespace duqpp;
using namespace duqpp::cuda;

std::mt19937 random_bits(1);

struct HostExpandWarp : HostLanes {
  static void exchange_with_neighbour(Lanes<uint32_t>& word) {
    const Lanes<uint32_t> before = word;
    for (int lane = 0; lane < 32; ++lane) word[lane] = before[lane ^ 1];
  }
};

// Bytes at a multiple of 16, as a GPU's loads want them, of exactly the size.
struct Bytes {
  explicit Bytes(int64_t size) {
    void* pointer = nullptr;
    if (posix_memalign(&pointer, 16, size) != 0) std::abort();
    memory = static_cast<uint8_t*>(pointer);
  }
  ~Bytes() { free(memory); }
  Bytes(const Bytes&) = delete;
  uint8_t* memory;
};

template <class Block>
void run_activation(const ExpandProblem& problem) {
  for (uint32_t r = 0; r < problem.rows; ++r) {
    const ActivationRow row = activation_row<Block>(problem, r);
    uint32_t exponent = 0;
    for (uint32_t thread = 0; kRowScaled<Block> && thread < kExpandThreads; ++thread) {
      exponent = std::max(exponent, activation_maximum(row, thread));
    }
    exponent = row_exponent(exponent);
    if (kRowScaled<Block>) problem.row_scales[r] = row_scale(exponent);
    for (uint32_t thread = 0; thread < kExpandThreads; ++thread) {
      expand_activation_thread<Block>(row, exponent, thread);
    }
  }
}

int sm_count;  // of the GPU that run_weight is

template <class Block>
void run_weight(const ExpandProblem& problem) {
  const ExpandWeightPlan plan = plan_expand_weight(problem.rows, problem.K, sm_count);
  for (uint32_t index = 0; index < plan.tiles * plan.parts; ++index) {
    for (uint32_t warp = 0; warp < kExpandWarps; ++warp) {
      expand_weight_cta<Block, HostExpandWarp>(problem, plan.parts, index, warp);
    }
  }
}

// Every pair of a tile is in one part, and parts differ by one pair at most; every SM has its CTAs
// where K has enough of them.
void test_plans() {
  for (const int64_t rows : {16, 24, 256, 2048, 8192}) {
    for (const int64_t K : {32, 96, 1024, 4096, 14336, 28672, 53248}) {
      for (const int sms : {1, 46, 108, 132}) {
        const ExpandWeightPlan plan = plan_expand_weight(rows, K, sms);
        CHECK(plan.tiles == (rows + 15) / 16, "%d tiles of %d rows", int(plan.tiles), int(rows));
        const uint32_t pairs = uint32_t((K / 32 + 1) / 2), parts = uint32_t(plan.parts);
        const bool enough = plan.tiles * parts >= 8 * sms, one_less = parts > 1;
        CHECK(enough || parts == (pairs + 15) / 16, "%d of %d pairs for %d SMs", int(parts),
              int(pairs), sms);
        CHECK(!one_less || plan.tiles * (parts - 1) < 8 * sms, "%d parts are too many for %d SMs",
              int(parts), sms);
        uint32_t end = 0;
        for (uint32_t part = 0; part < parts; ++part) {
          const PairRange range = part_of_pairs(pairs, part, parts);
          const uint32_t length = range.end - range.first;
          CHECK(range.first == end && (length == pairs / parts || length == pairs / parts + 1),
                "part %u of %u: %u .. %u", part, parts, range.first, range.end);
          end = range.end;
        }
        CHECK(end == pairs, "%u of %u pairs", end, pairs);
      }
    }
  }
}

// A program and its oracle on the same problem, whose results start as different bytes.
template <class Program, class Oracle>
void compare(ExpandProblem problem, const Program& program, const Oracle& oracle,
             const char* what) {
  const bool e4m3 = problem.format == WideFormat::kE4M3;
  const int64_t size = problem.rows * problem.K * (e4m3 ? 1 : 2);
  Bytes values(size), want(size);
  std::fill(values.memory, values.memory + size, uint8_t{0x55});
  std::fill(want.memory, want.memory + size, uint8_t{0xAA});
  std::vector<float> scales(problem.rows, 1), want_scales(problem.rows, 2);
  problem.values = values.memory;
  problem.row_scales = e4m3 ? scales.data() : nullptr;
  program(problem);
  problem.values = want.memory;
  problem.row_scales = e4m3 ? want_scales.data() : nullptr;
  oracle(problem);
  for (int64_t i = 0; i < size; ++i) {
    CHECK(values.memory[i] == want.memory[i], "%s, %d rows from %d of [%d, %d]: byte %d", what,
          int(problem.rows), int(problem.first_row), int(problem.matrix_rows),
          int(problem.K), int(i));
  }
  for (int64_t row = 0; e4m3 && row < problem.rows; ++row) {
    CHECK(scales[row] == want_scales[row], "%s: scale of row %d", what, int(row));
  }
}

// Of a row's blocks. In every third row the largest is just above the others and in another place
// each time, the last block first: it must be found there. Other rows have a few of any size.
std::vector<uint8_t> random_exponents(int64_t row, int64_t blocks) {
  std::vector<uint8_t> exponents(blocks);
  for (uint8_t& exponent : exponents) {
    exponent = row % 3 != 0 && random_bits() % 40 == 0 ? uint8_t(random_bits())
                                                       : uint8_t(110 + random_bits() % 20);
  }
  if (row % 3 == 0) exponents[blocks - 1 - 37 * row % blocks] = 130;
  return exponents;
}

void test_activations() {
  for (const int64_t rows : {1, 5, 33, 130}) {
    for (const int64_t K : {32, 64, 96, 512, 544, 8192 + 96, 16384 + 32}) {
      if (K > 16384 && rows > 5) continue;  // of so many blocks a thread looks at more than four
      Bytes codes(rows * K / 2), scales(swizzled_size(rows, K / 32));
      for (int64_t i = 0; i < rows * K / 2; ++i) codes.memory[i] = uint8_t(random_bits());
      std::fill(scales.memory, scales.memory + swizzled_size(rows, K / 32), uint8_t{0});
      for (int64_t row = 0; row < rows; ++row) {
        const std::vector<uint8_t> exponents = random_exponents(row, K / 32);
        for (int64_t block = 0; block < K / 32; ++block) {
          const int64_t tiles = scale_tiles_along_k(K / 32);
          scales.memory[swizzled_offset<int64_t>(row, block, tiles)] = exponents[block];
        }
      }
      ExpandProblem problem{};
      problem.rows = problem.matrix_rows = rows;
      problem.K = K;
      problem.codes = codes.memory;
      problem.scales = scales.memory;
      const auto oracle = [](const ExpandProblem& p) {
        cpu::expand_activation(p, cpu::run_serially);
      };
      compare(problem, run_activation<E4M3Block>, oracle, "activation, E4M3");
      problem.format = WideFormat::kBFloat16;
      compare(problem, run_activation<BFloat16Block>, oracle, "activation, bfloat16");
    }
  }
}

void test_weights() {
  for (const int64_t N : {8, 16, 24, 64, 72}) {
    for (const int64_t K : {32, 64, 96, 512, 544, 1024 + 32, 4096 + 544}) {
      // Row-major; then in the fragment order, word by word and scale by scale.
      std::vector<uint32_t> words(N * K / 8);
      std::vector<uint8_t> exponents;
      for (uint32_t& word : words) word = uint32_t(random_bits());
      for (int64_t row = 0; row < N; ++row) {
        const std::vector<uint8_t> of_row = random_exponents(row, K / 32);
        exponents.insert(exponents.end(), of_row.begin(), of_row.end());
      }
      Bytes codes(N * K / 2), scales(fragment_scales_size(N, K));
      for (int64_t row = 0; row < N; ++row) {
        for (int64_t i = 0; i < K / 8; ++i) {
          reinterpret_cast<uint32_t*>(codes.memory)[fragment_word_offset(row, i, N, K)] =
              words[row * (K / 8) + i];
        }
        for (int64_t block = 0; block < K / 32; ++block) {
          const int64_t offset = fragment_scale_offset(row, block, N, K);
          scales.memory[offset] = exponents[row * (K / 32) + block];
        }
        uint32_t largest = 0;
        for (int64_t block = 0; block < K / 32; ++block) {
          largest = row_maximum(largest, exponents[row * (K / 32) + block]);
        }
        scales.memory[fragment_row_exponents_offset(N, K) + row] = uint8_t(row_exponent(largest));
      }
      for (const int64_t first_row : {0, 16, 64}) {
        for (const int64_t rows : {int64_t{16}, int64_t{32}, N - first_row, N + 8 - first_row}) {
          if (first_row >= N || rows <= 0 || first_row + rows >= N + 16) continue;
          ExpandProblem problem{};
          problem.rows = rows;
          problem.K = K;
          problem.first_row = first_row;
          problem.matrix_rows = N;
          problem.codes = codes.memory;
          problem.scales = scales.memory;
          problem.row_exponents = scales.memory + fragment_row_exponents_offset(N, K);
          const auto oracle = [](const ExpandProblem& p) {
            cpu::expand_weight(p, cpu::run_serially);
          };
          for (const int sms : {1, 2, 132}) {  // K in one part, in some, in as many as it has
            sm_count = sms;
            problem.format = WideFormat::kE4M3;
            compare(problem, run_weight<E4M3Block>, oracle, "weight, E4M3");
            problem.format = WideFormat::kBFloat16;
            compare(problem, run_weight<BFloat16Block>, oracle, "weight, bfloat16");
          }
          // And the oracle itself, against the row-major words.
          const auto row_major = [&](const ExpandProblem& p) {
            for (int64_t row = 0; row < p.rows; ++row) {
              for (int64_t i = 0; i < K / 8; ++i) {
                const int64_t of_matrix = first_row + row;
                const bool inside = of_matrix < N;
                const uint32_t exponent = inside ? exponents[of_matrix * (K / 32) + i / 4] : 0;
                const BFloat16Values values =
                    BFloat16Block(exponent)(inside ? words[of_matrix * (K / 8) + i] : 0);
                reinterpret_cast<BFloat16Values*>(p.values)[row * (K / 8) + i] = values;
              }
            }
          };
          compare(problem, oracle, row_major, "weight, row-major");
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_plans();
  test_activations();
  test_weights();
  return duqpp::testing::finish("test_expand_warps");
}
