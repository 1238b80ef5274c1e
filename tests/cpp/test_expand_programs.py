"""The arithmetic of expansion (csrc/format/expand.h), compiled for the host and run: no GPU."""

from tests import toolchain
from tests.cpp.test_rotate_quantize_programs import run_program


def test_every_code_and_scale_and_largest_scale():
    run_program("test_expand")


def test_the_programs_of_the_kernels_equal_the_definition():
    source = toolchain.CSRC / "cpu/expand.cpp"
    run_program("test_expand_warps", source, "-fsanitize=address,undefined")
