"""Faults to plant in the kernels that expand operands, each with the test that must turn red."""

from tests.mutations.mutation import Mutation

TEST = "tests/cpp/test_expand_programs.py::test_the_programs_of_the_kernels_equal_the_definition"
KERNEL = "csrc/cuda/expand.cuh"
PLAN = "csrc/cuda/expand_plan.h"

MUTATIONS = (
    Mutation(
        "activations: a thread looks at one tile of scales",
        KERNEL,
        "for (uint32_t tile = thread; tile < tiles; tile += kExpandThreads) {",
        "for (uint32_t tile = thread; tile < tiles; tile += tiles) {",
        TEST,
    ),
    Mutation(
        "weights: a row aligned to the exponent of another",
        KERNEL,
        "weight_row_exponent(tile, lane / 4 + 8)}};",
        "weight_row_exponent(tile, lane / 4)}};",
        TEST,
    ),
    Mutation(
        "weights: pairs behind the last part",
        PLAN,
        "static_cast<uint32_t>(uint64_t{pairs} * (part + 1) / parts)};",
        "static_cast<uint32_t>(uint64_t{pairs} / parts * (part + 1))};",
        TEST,
    ),
    Mutation(
        "weights: one CTA for each SM",
        PLAN,
        "ctas = kExpandCtasPerSm * sm_count;",
        "ctas = sm_count;",
        TEST,
    ),
    Mutation(
        "weights: parts too short for the loads of a CTA",
        PLAN,
        "(pairs + at_once - 1) / at_once);",
        "pairs);",
        TEST,
    ),
    Mutation(
        "row exponents: NaN has a say",
        "duqpp/format/weight_fragment.py",
        "return torch.where(scales == NAN_SCALE, 0, scales).amax(-1)",
        "return scales.amax(-1)",
        "tests/format/test_weight_fragment.py",
    ),
    Mutation(
        "neighbours keep their words",
        KERNEL,
        "Warp::exchange_with_neighbour(other);",
        "",
        TEST,
    ),
    Mutation(
        "rows beyond the last stored",
        KERNEL,
        "if (block >= tile.blocks || tile.values_row + row >= problem.rows) return;",
        "if (block >= tile.blocks) return;",
        TEST,
    ),
    Mutation(
        "blocks beyond the last stored",
        KERNEL,
        "if (block >= tile.blocks || tile.values_row + row >= problem.rows) return;",
        "if (tile.values_row + row >= problem.rows) return;",
        TEST,
    ),
    Mutation(
        "a tile of 8 rows read as one of 16",
        KERNEL,
        "codes.word[b][half] = words[b * halves + half];",
        "codes.word[b][half] = words[b * 2 + half];",
        TEST,
    ),
)
