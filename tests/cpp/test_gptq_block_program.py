"""GPTQ's inner loop for the CPU, and for a GPU on the host, against its definition in C++."""

from tests import toolchain
from tests.cpp.test_rotate_quantize_programs import run_program


def test_the_loops_equal_the_definition():
    source = toolchain.CSRC / "cpu/gptq_block.cpp"
    run_program("test_gptq_block", source, "-ffp-contract=off", "-fsanitize=address,undefined")
