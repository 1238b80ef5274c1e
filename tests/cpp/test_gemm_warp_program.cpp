// The whole program of mxfp4_gemm_sm80, CTAs, rounds, warps and lanes, on a CPU: every byte of out
// against the CPU's portable GEMM, over ragged shapes, scales of every size, NaN among them, and
// memory around and between the operands that no result may show, codes on their way to shared
// memory among it. And the weight layout: a permutation, undone by its inverse.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/mxfp4_gemm.h"
#include "cuda/kernel_table.h"
#include "cuda/mxfp4_gemm_sm80.cuh"
#include "format/scale_layout.h"
#include "format/weight_fragment.h"
#include "host_gemm_warp.h"

namespace {

using namespace duqpp;
using namespace duqpp::cuda;

std::mt19937 random_bits(7);

void in_order(int64_t tasks, int64_t, const cpu::ParallelBody& body) { body(0, tasks); }

enum class Scales {
  kNear,     // 2^-8 .. 2^7
  kAny,      // every byte but NaN
  kExtreme,  // the ends of the range, where single factors overflow or are subnormal
  kNan,      // kNear, and a NaN here and there
  kHuge,     // kNear, and one here and there that is too large for the usual arithmetic
};

struct Case {
  int64_t M, N, K;
  Scales scales;
  Dtype out_dtype, bias_dtype;
  bool bias;
};

uint8_t random_scale(Scales scales) {
  const auto bits = static_cast<uint32_t>(random_bits());
  if (scales == Scales::kAny) return static_cast<uint8_t>(bits % 255);
  if (scales == Scales::kExtreme) {
    constexpr uint8_t kEnds[] = {0, 1, 2, 127, 128, 232, 233, 234, 235, 253, 254, 20};
    return kEnds[bits % 12];
  }
  if (scales == Scales::kNan && bits % 97 == 0) return kNanScale;
  if (scales == Scales::kHuge && bits % 199 == 0) return kFirstHugeScale;
  return static_cast<uint8_t>(119 + (bits >> 8) % 16);
}

struct Operand {
  std::vector<uint8_t> codes, scales;  // row-major
};

Operand random_operand(int64_t rows, int64_t K, Scales scales) {
  Operand operand;
  operand.codes.resize(rows * K / 2);
  operand.scales.resize(rows * K / kBlockSize);
  for (uint8_t& byte : operand.codes) byte = static_cast<uint8_t>(random_bits());
  for (uint8_t& byte : operand.scales) byte = random_scale(scales);
  return operand;
}

// In fragment order, each on a heap block of its own size: the sanitizer sees reads beyond it.
Operand prepared(const Operand& weight, int64_t N, int64_t K) {
  Operand result = {std::vector<uint8_t>(fragment_codes_size(N, K)),
                    std::vector<uint8_t>(fragment_row_exponents_offset(N, K))};
  for (int64_t row = 0; row < N; ++row) {
    for (int64_t word = 0; word < K / 8; ++word) {
      std::memcpy(&result.codes[4 * fragment_word_offset(row, word, N, K)],
                  &weight.codes[row * K / 2 + 4 * word], 4);
    }
    for (int64_t block = 0; block < K / kBlockSize; ++block) {
      result.scales[fragment_scale_offset(row, block, N, K)] =
          weight.scales[row * (K / kBlockSize) + block];
    }
  }
  return result;
}

// Padding has the given byte; the kernel need not care which.
std::vector<uint8_t> swizzled(const std::vector<uint8_t>& scales, int64_t rows, int64_t blocks,
                              uint8_t padding) {
  std::vector<uint8_t> result(swizzled_size(rows, blocks), padding);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      result[swizzled_offset<int64_t>(row, block, scale_tiles_along_k(blocks))] =
          scales[row * blocks + block];
    }
  }
  return result;
}

// What mxfp4_gemm_sm80.cu launches, with loops for the grid and loops between barriers for a CTA,
// in the shared memory of so many warps at most.
template <int kRowTiles, int kColumnTiles>
void run_kernel(const MXFP4GemmProblem& problem, int most_warps) {
  using Traits = GemmSm80Traits<kRowTiles, kColumnTiles>;
  struct Warp {
    HostGemmWarp::Lanes<LaneConstants80<Traits>> constants;
    HostGemmWarp::Lanes<LaneScales<Traits>> scales;
  };
  const int shared_memory = gemm_sm80_shared_memory(most_warps, kRowTiles, kColumnTiles);
  const GemmSm80Params params{
      problem, plan_gemm_sm80(problem.K, kRowTiles, kColumnTiles, shared_memory), true};
  const int warps = params.plan.warps, threads = warps * kWarpLanes;
  CHECK(threads <= Traits::kMaxThreads && warps <= most_warps, "%d threads", threads);
  CHECK(params.plan.rounds * warps >= params.plan.segments, "%d rounds", params.plan.rounds);
  const int64_t parts = ceil_div(problem.M, 8 * kColumnTiles);
  const int64_t ctas = ceil_div(problem.N, kFragmentRows * kRowTiles) * parts;
  for (int cta = 0; cta < ctas; ++cta) {
    const CtaTask task =
        cta_task<Traits>(params, static_cast<int>(cta % parts), static_cast<int>(cta / parts));
    std::vector<WarpMemory<Traits>> memory(warps);
    std::memset(static_cast<void*>(memory.data()), 0xFF, warps * sizeof memory[0]);  // NaN
    std::vector<float> totals(Traits::kSums, NAN);
    std::vector<Warp> state(warps);
    std::vector<HostGemmWarp::Copies> copies(warps);
    for (int warp = 0; warp < warps; ++warp) {
      Warp& s = state[warp];
      std::memset(static_cast<void*>(&s), 0xFF, sizeof s);
      HostGemmWarp::copies = &copies[warp];
      make_constants<Traits, HostGemmWarp>(params, task, s.constants);
      copy_first_weights<Traits, HostGemmWarp>(task, warp, s.constants, memory[warp]);
      HostGemmWarp::for_each_lane([&](int lane) {
        load_weight_scales<Traits, HostGemmWarp>(params, task, warp, lane, s.scales[lane]);
        load_activation_scales<Traits, HostGemmWarp>(params, task, warp, lane, s.scales[lane]);
      });
      copy_first_activations<Traits, HostGemmWarp>(task, warp, s.constants, memory[warp]);
    }
    for (int round = 0; round < params.plan.rounds; ++round) {
      for (int warp = warps - 1; warp >= 0; --warp) {
        const int segment = round * warps + warp;
        Warp& s = state[warp];
        if (segment >= task.segments) continue;
        HostGemmWarp::copies = &copies[warp];
        multiply_segment<Traits, HostGemmWarp>(params, task, segment, memory[warp], s.constants,
                                               s.scales);
      }
      for (int thread = threads - 1; thread >= 0; --thread) {
        add_round<Traits>(params, task, round, memory.data(), totals.data(), thread, threads);
      }
    }
    for (const HostGemmWarp::Copies& left : copies) {
      const bool none = std::all_of(left.committed.begin(), left.committed.end(),
                                    [](const auto& group) { return group.empty(); });
      CHECK(none && left.open.empty(), "copies under way when a CTA ends");
    }
  }
}

struct Kernel {
  const char* name;
  void (*run)(const MXFP4GemmProblem&, int most_warps);
};
constexpr Kernel kKernels[] = {
    {"sm80_16x8", run_kernel<1, 1>},  {"sm80_32x8", run_kernel<2, 1>},
    {"sm80_64x8", run_kernel<4, 1>},  {"sm80_16x16", run_kernel<1, 2>},
    {"sm80_32x16", run_kernel<2, 2>}, {"sm80_64x16", run_kernel<4, 2>},
    {"sm80_32x32", run_kernel<2, 4>},
};

void check_case(const Case& c, const Kernel& kernel, int most_warps = 16) {
  const int64_t blocks = c.K / kBlockSize;
  const Operand a = random_operand(c.M, c.K, c.scales), b = random_operand(c.N, c.K, c.scales);
  std::vector<uint8_t> bias(c.N * (c.bias_dtype == Dtype::kFloat32 ? 4 : 2));
  for (int64_t i = 0; i < c.N; ++i) {
    const float value = static_cast<float>(static_cast<int>(random_bits() % 4096) - 2048) / 64;
    const uint16_t half =
        c.bias_dtype == Dtype::kBFloat16 ? encode_bfloat16(value) : encode_float16(value);
    if (c.bias_dtype == Dtype::kFloat32) {
      std::memcpy(&bias[4 * i], &value, 4);
    } else {
      std::memcpy(&bias[2 * i], &half, 2);
    }
  }
  MXFP4GemmProblem problem{};
  problem.M = c.M;
  problem.N = c.N;
  problem.K = c.K;
  problem.a_codes = a.codes.data();
  problem.bias = c.bias ? bias.data() : nullptr;
  problem.bias_dtype = c.bias_dtype;
  problem.out_dtype = c.out_dtype;

  Operand tiled = b;
  cpu::prepare_weight(c.N, c.K, b.codes.data(), b.scales.data(), tiled.codes.data(),
                      tiled.scales.data(), in_order);
  std::vector<uint16_t> expected(c.M * c.N), out(c.M * c.N);
  problem.a_scales = a.scales.data();
  problem.b_codes = tiled.codes.data();
  problem.b_scales = tiled.scales.data();
  problem.out = expected.data();
  cpu::mxfp4_gemm(problem, cpu::Isa::kPortable, in_order);

  const Operand fragments = prepared(b, c.N, c.K);
  problem.b_codes = fragments.codes.data();
  problem.b_scales = fragments.scales.data();
  problem.out = out.data();
  const std::vector<uint8_t> scales =
      swizzled(a.scales, c.M, blocks, random_bits() % 2 ? 0xFF : 0xEE);
  problem.a_scales = scales.data();
  std::fill(out.begin(), out.end(), uint16_t{0xFFFF});
  kernel.run(problem, most_warps);
  int64_t wrong = 0, first = -1, shown = 0;
  for (int64_t i = 0; i < c.M * c.N; ++i) {
    if (out[i] != expected[i] && wrong++ == 0) first = i;
    shown += (expected[i] & 0x7FFF) != 0;
  }
  CHECK(wrong == 0, "%s M %d N %d K %d scales %d: %d outputs, first [%d, %d]: %04x, want %04x",
        kernel.name, int(c.M), int(c.N), int(c.K), int(c.scales), int(wrong), int(first / c.N),
        int(first % c.N), out[std::max<int64_t>(first, 0)], expected[std::max<int64_t>(first, 0)]);
  CHECK(2 * shown >= c.M * c.N || c.scales == Scales::kExtreme, "%d outputs are not 0", int(shown));
}

// Nibbles and scales land where the layout says, each once; the words are whole.
void check_layout(int64_t N, int64_t K) {
  std::vector<int> words(N * K / 8), scales(N * (K / kBlockSize));
  int64_t outside = 0, apart = 0;
  for (int64_t row = 0; row < N; ++row) {
    for (int64_t column = 0; column < K; ++column) {
      const int64_t nibble = fragment_nibble_offset(row, column, N, K);
      if (nibble < 0 || nibble >= N * K) {
        ++outside;
        continue;
      }
      apart += nibble % 8 != column % 8;
      words[nibble / 8]++;
    }
    for (int64_t block = 0; block < K / kBlockSize; ++block) {
      const int64_t offset = fragment_scale_offset(row, block, N, K);
      if (offset < 0 || offset >= int64_t(scales.size())) {
        ++outside;
      } else {
        scales[offset]++;
      }
    }
  }
  const auto all = [](const std::vector<int>& counts, int count) {
    return std::all_of(counts.begin(), counts.end(), [&](int n) { return n == count; });
  };
  CHECK(outside == 0 && apart == 0 && all(words, 8) && all(scales, 1), "N %d K %d", int(N), int(K));
}

// An output is the same whatever batch its row is in, and whatever kernel computes it.
void check_batch_invariance() {
  constexpr int64_t kN = 40, kK = 2080;
  const Operand b = prepared(random_operand(kN, kK, Scales::kNear), kN, kK);
  const Operand a = random_operand(19, kK, Scales::kNear);
  const auto run = [&](int64_t first, int64_t rows, const Kernel& kernel) {
    std::vector<uint8_t> scales(a.scales.begin() + first * kK / 32,
                                a.scales.begin() + (first + rows) * kK / 32);
    scales = swizzled(scales, rows, kK / 32, 0);
    std::vector<uint16_t> out(rows * kN);
    MXFP4GemmProblem problem{rows,
                             kN,
                             kK,
                             a.codes.data() + first * kK / 2,
                             scales.data(),
                             b.codes.data(),
                             b.scales.data(),
                             nullptr,
                             Dtype::kFloat32,
                             out.data(),
                             Dtype::kBFloat16};
    kernel.run(problem, 16);
    return out;
  };
  const std::vector<uint16_t> together = run(0, 19, kKernels[6]);
  for (int64_t row = 0; row < 19; ++row) {
    const std::vector<uint16_t> alone = run(row, 1, kKernels[row % 6]);
    CHECK(std::equal(alone.begin(), alone.end(), together.begin() + row * kN), "row %d", int(row));
  }
}

}  // namespace

int main() {
  for (const int64_t N : {8, 16, 24, 40, 64, 136}) {
    for (const int64_t K : {32, 64, 96, 480, 512, 544, 1024, 1056, 4128}) check_layout(N, K);
  }
  constexpr Dtype kDtypes[] = {Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat32};
  int count = 0;  // each kernel in turn: those after one another differ in what follows, too
  const auto next = [&](int64_t M, int64_t N, int64_t K, Scales scales) {
    const int i = count++;
    check_case({M, N, K, scales, kDtypes[i / 3 % 2], kDtypes[i % 3], i % 4 != 0}, kKernels[i % 7]);
  };
  for (const Scales scales : {Scales::kNear, Scales::kAny, Scales::kExtreme, Scales::kNan}) {
    for (const int64_t M : {1, 3, 9, 17, 33, 65}) {
      for (const int64_t K : {32, 96, 544, 576}) next(M, 8 * (1 + count % 7), K, scales);
    }
  }
  for (const Kernel& kernel : kKernels) {  // every kernel: whole tiles, and each kind of rest
    for (const int64_t N : {8, 64, 72}) {
      check_case({7, N, 576, Scales::kAny, kDtypes[N % 2], Dtype::kFloat32, true}, kernel);
    }
    // Several rounds: 18 segments, and 17 and a block.
    const int64_t K = kernel.name[5] == '1' ? 8736 : 9216;
    check_case({5, 40, K, Scales::kNear, Dtype::kFloat16, Dtype::kFloat32, false}, kernel);
    // A warp's segments in turn, plain ones and others: eight, and then one of 1, 3 or 8 pairs.
    for (const int64_t K : {4160, 4288, 4608}) {
      for (const Scales scales : {Scales::kNear, Scales::kHuge}) {
        for (const int most_warps : {1, 3}) {
          check_case({5, 64, K, scales, kDtypes[K % 3 % 2], Dtype::kFloat32, false}, kernel,
                     most_warps);
        }
      }
    }
  }
  check_batch_invariance();
  CHECK(HostGemmWarp::misaligned_loads == 0, "%d loads", HostGemmWarp::misaligned_loads);
  return duqpp::testing::finish("test_gemm_warp_program");
}
