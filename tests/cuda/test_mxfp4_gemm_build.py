"""What must not compile: CUDA kernels of mxfp4_gemm without their wait for the kernel before."""

import os
import subprocess

import pytest

from tests import toolchain


def preprocess(arch: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Preprocess an instantiation's device code with nvcc: guards act before anything compiles."""
    cutlass = toolchain.cutlass_include()
    folders = (toolchain.CSRC, cutlass, cutlass.parent / "tools/util/include")
    command = [toolchain.nvcc(), "-E", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += [*options, *(f"-I{folder}" for folder in folders)]
    command += [str(toolchain.CSRC / "cuda/mxfp4_gemm_sm100_256x128.cu"), "-o", os.devnull]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_the_definition_that_makes_the_wait_is_required():
    assert preprocess("100f", "-DCUTLASS_ENABLE_GDC_FOR_SM100=1").returncode == 0
    without = preprocess("100f")
    assert without.returncode != 0
    assert "compile with -DCUTLASS_ENABLE_GDC_FOR_SM100=1" in without.stderr


@pytest.mark.parametrize("arch", ["100", "90a"])
def test_architectures_without_the_wait_are_refused(arch):
    # sm_100 without its family's features: CUTLASS defines its wait for sm_100a and sm_100f only.
    refused = preprocess(arch, "-DCUTLASS_ENABLE_GDC_FOR_SM100=1")
    assert refused.returncode != 0
    assert "CUTLASS emits no griddepcontrol.wait for this architecture" in refused.stderr
