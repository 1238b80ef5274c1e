"""Faults to plant in the kernels that expand operands, each with the test that must turn red."""

from tests.mutations.mutation import Mutation

TEST = "tests/cpp/test_expand_programs.py::test_the_programs_of_the_kernels_equal_the_definition"
KERNEL = "csrc/cuda/expand.cuh"

MUTATIONS = (
    Mutation(
        "activations: a thread looks at one tile of scales",
        KERNEL,
        "for (uint32_t tile = thread; tile < tiles; tile += kExpandThreads) {",
        "for (uint32_t tile = thread; tile < tiles; tile += tiles) {",
        TEST,
    ),
    Mutation(
        "weights: a thread looks at one segment of scales",
        KERNEL,
        "i < segments; i += kThreadsPerRow) {",
        "i < segments; i += segments) {",
        TEST,
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
