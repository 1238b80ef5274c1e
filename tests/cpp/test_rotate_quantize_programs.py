"""C++ programs about rotate_quantize and its numerics, compiled for the host and run: no GPU."""

from pathlib import Path

from tests import toolchain

PROGRAMS = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]


def run_program(name: str, *flags: str | Path) -> str:
    """Compile tests/cpp/<name>.cpp and run it; its exit code is its verdict."""
    include = ["-I", toolchain.CSRC, "-I", PROGRAMS]
    source = PROGRAMS / f"{name}.cpp"
    program, _ = toolchain.compiled(
        [toolchain.cxx(), *FLAGS, *include, *flags, source], timeout=200
    )
    return toolchain.run([program], timeout=80)


def test_numerics_over_whole_domains():
    run_program("test_numerics")


def test_warp_program_equals_the_format():
    # Reads outside x, up, the weights and the rotation are the sanitizer's to see.
    run_program("test_warp_program", "-fsanitize=address")


def test_layouts_and_conversions_are_those_of_cutlass():
    folders = [toolchain.cutlass_include(), *toolchain.cuda_include()]
    run_program("test_cutlass", *(f"-isystem{folder}" for folder in folders))


def test_what_is_set_once_is_set_once_on_each_device():
    run_program("test_device", *(f"-isystem{folder}" for folder in toolchain.cuda_include()))
