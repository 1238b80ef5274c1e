"""Faults to plant in GPTQ's inner loop, each with the test that must turn red."""

from tests.mutations.mutation import Mutation

TEST = "tests/cpp/test_gptq_block_program.py::test_the_loops_equal_the_definition"
RESOURCES = "tests/cuda/test_gptq_block_resources.py"
FUSED = f"{RESOURCES}::test_no_multiply_add_is_fused_where_errors_are_fed[90a]"
MOVES = f"{RESOURCES}::test_rows_are_moved_by_16_bytes[90a]"

STEP = "csrc/format/gptq_step.h"
E2M1 = "csrc/format/e2m1.h"
CPU = "csrc/cpu/gptq_block.cpp"
KERNEL = "csrc/cuda/gptq_block.cuh"

MUTATIONS = (
    Mutation(
        "step: the error is of the scaled value",
        STEP,
        "rounded_difference(value, rounded)};",
        "rounded_difference(scaled, rounded)};",
        TEST,
    ),
    Mutation(
        "step: errors are added",
        STEP,
        "rounded_difference(value, rounded_product(error, factor))",
        "rounded_difference(value, -rounded_product(error, factor))",
        TEST,
    ),
    Mutation(
        "step: a GPU fuses products",
        STEP,
        "return rounded_difference(value, rounded_product(error, factor));",
        "return value - error * factor;",
        FUSED,
    ),
    Mutation(
        "rounding: magnitudes below 1 by their own power of two",
        E2M1,
        "power > kOne ? power : kOne",
        "power",
        TEST,
    ),
    Mutation(
        "rounding: no saturation",
        E2M1,
        "magnitude < kSix ? magnitude : kSix",
        "magnitude",
        TEST,
    ),
    Mutation("cpu: mse keeps the floor", CPU, "change[r] < 0 &&", "change[r] > 0 &&", TEST),
    Mutation(
        "cpu: a column's error reaches itself",
        CPU,
        "for (int i = j + 1; factor",
        "for (int i = j; factor",
        TEST,
    ),
    Mutation(
        "cpu: the factor's transpose",
        CPU,
        "factor[j * kBlockSize + i]",
        "factor[i * kBlockSize + j]",
        TEST,
    ),
    Mutation(
        "cpu: nibbles swapped",
        CPU,
        "strip.codes[2 * i][r], strip.codes[2 * i + 1][r]",
        "strip.codes[2 * i + 1][r], strip.codes[2 * i][r]",
        TEST,
    ),
    Mutation(
        "gpu: mse keeps the floor",
        KERNEL,
        "next_exponent_is_better(change.gain, change.saving) ? 1u : 0u",
        "next_exponent_is_better(change.gain, change.saving) ? 0u : 0u",
        TEST,
    ),
    Mutation(
        "gpu: the factor's transpose",
        KERNEL,
        "factor[j * kBlockSize + i]",
        "factor[i * kBlockSize + j]",
        TEST,
    ),
    Mutation("gpu: codes of a word backwards", KERNEL, "4 * (j % 8)", "28 - 4 * (j % 8)", TEST),
    Mutation(
        "gpu: values are loaded one by one",
        KERNEL,
        "const Quad<float> loaded = quads(p.values, row)[i / 4];",
        "struct { const float* element; } loaded{p.values + row * kBlockSize + i};",
        MOVES,
    ),
)
