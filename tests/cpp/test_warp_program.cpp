// The whole program of rotate_quantize, CTAs, warps, loops and lanes, on a CPU: every byte of codes
// and scales against format/mx_block.h, over ragged shapes, both layouts, all rules and prologues.
//
// Rotations are signed permutations, or small integers on small integers, so that every float32 sum
// is exact, whatever its order, and the comparison is of bytes. Outputs start as 0xFF with guard
// bytes behind them: padding that is not written, and bytes written outside, are seen.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/rotate_quantize.cuh"
#include "format/mx_block.h"
#include "format/scale_layout.h"
#include "host_warp.h"

namespace {

using namespace duqpp;
using namespace duqpp::cuda;

constexpr int kGuard = 256;
constexpr uint8_t kGuardByte = 0xA5;

std::mt19937 random_bits(1);

int random_int(int low, int high) {
  return low + static_cast<int>(random_bits() % static_cast<unsigned>(high - low + 1));
}

enum class Rotation { kNone, kShared, kPerBlock };
enum class Content {
  kIntegers,  // small integers, under dense integer matrices where no prologue makes fractions
  kAnything,  // any 16 bits of x, NaN and infinities now and then, under signed permutations
  kNormal,    // values of one magnitude, the usual activations, under signed permutations
};

struct Case {
  int64_t M, K;
  Dtype dtype;
  Prologue prologue;
  ScaleRule rule;
  ScaleLayout layout;
  Rotation rotation;
  Content content;
  bool norm_weight;
  int sm_count;  // what the plan is made for
};

struct Data {
  std::vector<uint16_t> x, up, norm_weight, rotation;
  std::vector<uint8_t> codes, scales;
  RotateQuantizeProblem problem;
};

uint16_t random_value(const Case& c) {
  if (c.content == Content::kIntegers) return to_bits(c.dtype, random_int(-8, 8));
  if (c.content == Content::kNormal) return to_bits(c.dtype, random_int(-4096, 4096) / 512.0f);
  const auto bits = static_cast<uint16_t>(random_bits());
  // One value in 512 may be an infinity or a NaN: blocks with one carry no codes to compare.
  return std::isfinite(from_bits(c.dtype, bits)) || random_bits() % 8 == 0 ? bits : 0x3C00;
}

std::vector<uint16_t> random_rotation(const Case& c, int matrices) {
  std::vector<uint16_t> rotation(matrices * 1024, 0);
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint16_t* R = &rotation[matrix * 1024];
    if (c.content == Content::kIntegers && c.prologue == Prologue::kNone) {
      for (int i = 0; i < 1024; ++i) R[i] = to_bfloat16(random_int(-2, 2));
    } else {
      int column[32];
      for (int i = 0; i < 32; ++i) column[i] = i;
      for (int i = 31; i > 0; --i) std::swap(column[i], column[random_int(0, i)]);
      for (int i = 0; i < 32; ++i) R[32 * i + column[i]] = to_bfloat16(random_bits() % 2 ? 1 : -1);
    }
  }
  return rotation;
}

Data make_data(const Case& c) {
  Data data;
  const int64_t blocks = c.K / kBlockSize;
  data.x.resize(c.M * c.K);
  for (uint16_t& bits : data.x) bits = random_value(c);
  if (c.prologue == Prologue::kSiluMul) {
    data.up.resize(c.M * c.K);
    for (uint16_t& bits : data.up) bits = random_value(c);
  }
  if (c.norm_weight) {
    data.norm_weight.resize(c.K);
    for (uint16_t& bits : data.norm_weight) bits = to_bits(c.dtype, random_int(-16, 16) / 8.0f);
  }
  if (c.rotation != Rotation::kNone) {
    data.rotation = random_rotation(c, c.rotation == Rotation::kShared ? 1 : int(blocks));
  }
  const int64_t scale_bytes =
      c.layout == ScaleLayout::kSwizzled ? swizzled_size(c.M, blocks) : c.M * blocks;
  data.codes.assign(c.M * c.K / 2 + kGuard, 0xFF);
  data.scales.assign(scale_bytes + kGuard, 0xFF);
  for (int i = 1; i <= kGuard; ++i) {
    data.codes[data.codes.size() - i] = data.scales[data.scales.size() - i] = kGuardByte;
  }
  RotateQuantizeProblem& p = data.problem;
  p.M = c.M;
  p.K = c.K;
  p.dtype = c.dtype;
  p.prologue = c.prologue;
  p.rule = c.rule;
  p.scale_layout = c.layout;
  p.x = data.x.data();
  p.up = data.up.empty() ? nullptr : data.up.data();
  p.norm_weight = data.norm_weight.empty() ? nullptr : data.norm_weight.data();
  p.epsilon = c.norm_weight ? 0 : 1.0f / 1024;  // at 0, the rms of a row that is not there is 0
  p.rotation = data.rotation.empty() ? nullptr : data.rotation.data();
  p.rotation_matrices = static_cast<int64_t>(data.rotation.size() / 1024);
  p.codes = data.codes.data();
  p.scales = data.scales.data();
  return data;
}

// Of each row of the last kernel with kRmsNorm.
std::vector<float> reciprocal_rms_of_row;

// What rotate_quantize.cu launches, with loops for the grid and loops between barriers for a CTA.
template <class Traits>
void run_kernel(const RotateQuantizeProblem& problem, int sm_count) {
  using Constants = HostWarp::Lanes<LaneConstants>;
  RotateQuantizeParams params{};
  params.problem = problem;
  params.plan = plan_rotate_quantize(problem, sm_count);
  params.scale_strides =
      scale_strides(problem.scale_layout, static_cast<uint32_t>(problem.K / kBlockSize));
  const int warps = params.plan.teams * kTeamWarps;
  CHECK(warps * kWarpLanes <= Traits::kMaxThreads, "%d warps", warps);
  for (int cta = 0; cta < params.plan.column_chunks * params.plan.row_strips; ++cta) {
    std::vector<Constants> constants(warps);
    for (int warp = 0; warp < warps; ++warp) {
      const WarpTask task = warp_task(params.plan, cta, warp);
      load_constants<Traits, HostWarp>(params, task.first_block, constants[warp]);
    }
    NormRows rows;
    if constexpr (Traits::kNorm) {
      for (float& value : rows.reciprocal_rms) value = NAN;
      for (int warp = 0; warp < warps; ++warp) {
        sum_norm_rows<Traits, HostWarp>(params, warp_task(params.plan, cta, warp), warp, rows);
      }
      const int first_row = warp_task(params.plan, cta, 0).first_row;
      reciprocal_rms_of_row.resize(params.plan.row_strips * params.plan.rows_per_cta);
      for (int row = 0; row < params.plan.rows_per_cta; ++row) {
        finish_norm_row(problem, row, rows);
        reciprocal_rms_of_row[first_row + row] = rows.reciprocal_rms[row];
      }
    }
    for (int warp = 0; warp < warps; ++warp) {
      rotate_quantize_warp<Traits, HostWarp>(params, warp_task(params.plan, cta, warp),
                                             constants[warp], rows.reciprocal_rms);
    }
  }
}

template <Dtype kDtype, Prologue kPrologue, ScaleRule kRule>
void run_kernel(const RotateQuantizeProblem& problem, int sm_count) {
  if (problem.rotation == nullptr) {
    return run_kernel<RotateQuantizeTraits<kDtype, kPrologue, kRule, false>>(problem, sm_count);
  }
  run_kernel<RotateQuantizeTraits<kDtype, kPrologue, kRule, true>>(problem, sm_count);
}

template <Dtype kDtype, Prologue kPrologue>
void run_kernel(const RotateQuantizeProblem& problem, int sm_count) {
  switch (problem.rule) {
    case ScaleRule::kFloor:
      return run_kernel<kDtype, kPrologue, ScaleRule::kFloor>(problem, sm_count);
    case ScaleRule::kEven:
      return run_kernel<kDtype, kPrologue, ScaleRule::kEven>(problem, sm_count);
    case ScaleRule::kCeil:
      return run_kernel<kDtype, kPrologue, ScaleRule::kCeil>(problem, sm_count);
    case ScaleRule::kMse:
      return run_kernel<kDtype, kPrologue, ScaleRule::kMse>(problem, sm_count);
  }
}

template <Dtype kDtype>
void run_kernel(const RotateQuantizeProblem& problem, int sm_count) {
  switch (problem.prologue) {
    case Prologue::kNone:
      return run_kernel<kDtype, Prologue::kNone>(problem, sm_count);
    case Prologue::kRmsNorm:
      return run_kernel<kDtype, Prologue::kRmsNorm>(problem, sm_count);
    case Prologue::kSiluMul:
      return run_kernel<kDtype, Prologue::kSiluMul>(problem, sm_count);
  }
}

void run_kernel(const RotateQuantizeProblem& problem, int sm_count) {
  if (problem.dtype == Dtype::kFloat16) return run_kernel<Dtype::kFloat16>(problem, sm_count);
  run_kernel<Dtype::kBFloat16>(problem, sm_count);
}

// prologue(x) of one row, rounded to the dtype of x where a prologue computes.
std::vector<float> prologue_row(const Case& c, const Data& data, int64_t row) {
  std::vector<float> values(c.K);
  double squares = 0;
  for (int64_t k = 0; k < c.K; ++k) {
    values[k] = from_bits(c.dtype, data.x[row * c.K + k]);
    squares += double(values[k]) * double(values[k]);
  }
  // The sum is exact in float32 too: the content of these cases is small integers.
  const float mean = static_cast<float>(squares) / static_cast<float>(c.K);
  const float reciprocal_rms = 1.0f / std::sqrt(mean + data.problem.epsilon);
  for (int64_t k = 0; k < c.K; ++k) {
    if (c.prologue == Prologue::kSiluMul) {
      const float up = from_bits(c.dtype, data.up[row * c.K + k]);
      values[k] = values[k] / (1.0f + std::exp(-values[k])) * up;
    } else if (c.prologue == Prologue::kRmsNorm) {
      const float weight = c.norm_weight ? from_bits(c.dtype, data.norm_weight[k]) : 1.0f;
      values[k] = values[k] * reciprocal_rms * weight;
    }
    values[k] = from_bits(c.dtype, to_bits(c.dtype, values[k]));
  }
  return values;
}

void check_case(const Case& c) {
  Data data = make_data(c);
  run_kernel(data.problem, c.sm_count);

  const int64_t blocks = c.K / kBlockSize;
  const bool swizzled = c.layout == ScaleLayout::kSwizzled;
  std::vector<uint8_t> scales(data.scales.size() - kGuard, 0);  // padding is 0
  int64_t nan_blocks = 0, wrong_codes = 0, first_wrong = -1;
  for (int64_t row = 0; row < c.M; ++row) {
    const std::vector<float> values = prologue_row(c, data, row);
    for (int64_t block = 0; block < blocks; ++block) {
      float y[kBlockSize];
      for (int n = 0; n < kBlockSize; ++n) {
        y[n] = c.rotation == Rotation::kNone ? values[block * 32 + n] : 0;
        if (c.rotation == Rotation::kNone) continue;
        const uint16_t* R = &data.rotation[c.rotation == Rotation::kShared ? 0 : block * 1024];
        for (int k = 0; k < 32; ++k) y[n] += values[block * 32 + k] * from_bfloat16(R[32 * k + n]);
      }
      uint8_t codes[kBlockSize / 2];
      const uint8_t scale = quantize_block(y, c.rule, codes);
      scales[swizzled ? swizzled_offset<int64_t>(row, block, scale_tiles_along_k(blocks))
                      : row * blocks + block] = scale;
      nan_blocks += scale == kNanScale;
      if (scale == kNanScale) continue;  // its codes carry no meaning
      const int64_t offset = (row * c.K + block * kBlockSize) / 2;
      for (int i = 0; i < kBlockSize / 2; ++i) {
        if (data.codes[offset + i] != codes[i] && wrong_codes++ == 0) first_wrong = offset + i;
      }
    }
  }
  int64_t wrong_scales = 0, first_wrong_scale = -1;
  for (size_t i = 0; i < scales.size(); ++i) {
    if (scales[i] != data.scales[i] && wrong_scales++ == 0) first_wrong_scale = int64_t(i);
  }
  int overrun = 0;
  for (int i = 1; i <= kGuard; ++i) {
    overrun += data.codes[data.codes.size() - i] != kGuardByte;
    overrun += data.scales[data.scales.size() - i] != kGuardByte;
  }
  char name[200];
  std::snprintf(name, sizeof name,
                "M %d K %d dtype %d prologue %d rule %d layout %d rotation %d content %d sms %d",
                int(c.M), int(c.K), int(c.dtype), int(c.prologue), int(c.rule), int(c.layout),
                int(c.rotation), int(c.content), c.sm_count);
  CHECK(wrong_codes == 0, "%s: %d bytes, first at %d", name, int(wrong_codes), int(first_wrong));
  CHECK(wrong_scales == 0, "%s: %d bytes, first at %d: got %d, want %d", name, int(wrong_scales),
        int(first_wrong_scale), data.scales[first_wrong_scale], scales[first_wrong_scale]);
  CHECK(overrun == 0, "%s: %d guard bytes overwritten", name, overrun);
  CHECK(nan_blocks * 4 < c.M * blocks || c.content == Content::kAnything,
        "%s: %d blocks of NaN leave too little to compare", name, int(nan_blocks));
}

// A row's bytes do not depend on the batch or on the device: the order of every sum is fixed. The
// sums themselves are compared too, because bytes seldom show their last bit.
void check_batch_invariance() {
  constexpr int kRows = 64;
  for (const bool weight : {false, true}) {
    Case c{kRows,
           2080,
           Dtype::kBFloat16,
           Prologue::kRmsNorm,
           ScaleRule::kEven,
           ScaleLayout::kRowMajor,
           Rotation::kPerBlock,
           Content::kNormal,
           weight,
           1};
    Data all = make_data(c);
    run_kernel(all.problem, 1);
    const std::vector<float> together = reciprocal_rms_of_row;
    for (const int sm_count : {2, 148}) {
      for (int row = 0; row < kRows; ++row) {
        std::vector<uint8_t> codes(c.K / 2), scales(c.K / 32);
        RotateQuantizeProblem one = all.problem;
        one.M = 1;
        one.x = &all.x[row * c.K];
        one.codes = codes.data();
        one.scales = scales.data();
        run_kernel(one, sm_count);
        CHECK(reciprocal_rms_of_row[0] == together[row], "row %d on %d SMs: %a, together %a", row,
              sm_count, reciprocal_rms_of_row[0], together[row]);
        CHECK(std::memcmp(codes.data(), &all.codes[row * c.K / 2], codes.size()) == 0 &&
                  std::memcmp(scales.data(), &all.scales[row * c.K / 32], scales.size()) == 0,
              "row %d alone on %d SMs differs", row, sm_count);
      }
    }
  }
}

// The plan, for shapes too large to run: every (row, block) of the padded scales belongs to one
// warp.
void check_plan_covers(int64_t M, int64_t K, Prologue prologue, ScaleLayout layout, int sm_count) {
  RotateQuantizeProblem problem{};
  problem.M = M;
  problem.K = K;
  problem.prologue = prologue;
  problem.scale_layout = layout;
  const RotateQuantizePlan plan = plan_rotate_quantize(problem, sm_count);
  const bool norm = prologue == Prologue::kRmsNorm;
  const int warps = plan.teams * kTeamWarps;
  const int64_t ctas = int64_t{plan.column_chunks} * plan.row_strips;
  CHECK(ctas <= INT32_MAX && plan.teams >= 1 && plan.teams <= kMaxTeams, "grid of %lld",
        (long long)ctas);
  CHECK(plan.rows_per_cta % kTileRows == 0 && (!norm || plan.rows_per_cta <= kMaxNormRows),
        "%d rows a CTA", plan.rows_per_cta);
  CHECK(M > kTileRows || norm || plan.row_strips == 1, "M %d in %d strips", int(M),
        plan.row_strips);
  CHECK(M > kTileRows || norm || ctas >= K / 128, "%d CTAs", int(ctas));
  // Rows: strips join. Blocks: within a chunk each is some warp's, and chunks join.
  int64_t row = 0;
  for (int strip = 0; strip < plan.row_strips; ++strip) {
    const WarpTask task = warp_task(plan, strip * plan.column_chunks, 0);
    CHECK(task.first_row == row && task.end_row > row && task.first_row < M, "strip %d", strip);
    row = task.end_row;
  }
  CHECK(row == plan.scale_rows, "rows end at %d of %d", int(row), plan.scale_rows);
  std::vector<uint8_t> owners(plan.scale_blocks);
  for (int chunk = 0; chunk < plan.column_chunks; ++chunk) {
    for (int warp = 0; warp < warps; ++warp) {
      const WarpTask task = warp_task(plan, chunk, warp);
      CHECK(norm || task.first_block + task.block_step >= task.end_block,
            "more than one block for a warp of prologue %d", int(prologue));
      for (int b = task.first_block; b < task.end_block; b += task.block_step) ++owners[b];
    }
  }
  int wrong = 0;
  for (const uint8_t owner : owners) wrong += owner != 1;
  CHECK(wrong == 0, "M %d K %d: %d blocks without one owner", int(M), int(K), wrong);
}

const Dtype kDtypes[] = {Dtype::kBFloat16, Dtype::kFloat16};
const Prologue kPrologues[] = {Prologue::kNone, Prologue::kRmsNorm, Prologue::kSiluMul};
const ScaleRule kRules[] = {ScaleRule::kFloor, ScaleRule::kEven, ScaleRule::kCeil, ScaleRule::kMse};
const ScaleLayout kLayouts[] = {ScaleLayout::kRowMajor, ScaleLayout::kSwizzled};
const Rotation kRotations[] = {Rotation::kNone, Rotation::kShared, Rotation::kPerBlock};

}  // namespace

int main() {
  // Every shape, layout and rotation, with what is compiled for it drawn in turn.
  int turn = 0;
  for (const int64_t M : {1, 7, 15, 16, 17, 31, 127, 128, 129, 300}) {
    for (const int64_t K : {32, 96, 160, 4096}) {
      if (M > 31 && K == 4096 && M != 129) continue;
      for (const ScaleLayout layout : kLayouts) {
        for (const Rotation rotation : kRotations) {
          Case c{M,
                 K,
                 kDtypes[turn % 2],
                 Prologue::kNone,
                 kRules[turn / 2 % 4],
                 layout,
                 rotation,
                 static_cast<Content>(turn % 3),
                 false,
                 turn % 5 ? 3 : 148};
          check_case(c);
          ++turn;
        }
      }
    }
  }
  // Every kernel that is compiled, on a shape with two strips, a ragged tile and padded blocks.
  for (const Dtype dtype : kDtypes) {
    for (const Prologue prologue : kPrologues) {
      for (const ScaleRule rule : kRules) {
        for (const ScaleLayout layout : kLayouts) {
          for (const Rotation rotation : kRotations) {
            for (const int sm_count : {1, 20}) {
              // A norm's sum of squares is exact for integers; a product of activations is finite.
              Content content = Content::kAnything;
              if (prologue == Prologue::kRmsNorm) content = Content::kIntegers;
              if (prologue == Prologue::kSiluMul) content = Content::kNormal;
              Case c{77,     672,      dtype,   prologue,       rule,
                     layout, rotation, content, sm_count == 20, sm_count};
              check_case(c);
            }
          }
        }
      }
    }
  }
  for (const int64_t K : {2080, 4096}) {  // rows of several pieces of a sum of squares
    for (const int sm_count : {1, 148}) {
      Case c{33,
             K,
             Dtype::kBFloat16,
             Prologue::kRmsNorm,
             ScaleRule::kEven,
             ScaleLayout::kSwizzled,
             Rotation::kPerBlock,
             Content::kIntegers,
             true,
             sm_count};
      check_case(c);
    }
  }
  check_batch_invariance();
  for (const Prologue prologue : kPrologues) {
    for (const ScaleLayout layout : kLayouts) {
      for (const int sm_count : {1, 46, 132, 148, 160}) {
        for (const int64_t M : {1, 16, 17, 500, 4096, 16384, 1 << 20}) {
          for (const int64_t K : {32, 160, 4096, 14336, 28672}) {
            if (M * K <= int64_t{1} << 31) check_plan_covers(M, K, prologue, layout, sm_count);
          }
        }
        check_plan_covers(int64_t{1} << 26, 32, prologue, layout, sm_count);
      }
    }
    check_plan_covers(1, int64_t{1} << 31, prologue, ScaleLayout::kSwizzled, 148);
  }
  CHECK(HostWarp::misaligned_loads == 0, "%d loads", HostWarp::misaligned_loads);
  return duqpp::testing::finish("test_warp_program");
}
