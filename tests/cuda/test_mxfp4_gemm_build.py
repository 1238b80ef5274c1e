"""What must not compile: CUDA kernels of mxfp4_gemm without their wait for the kernel before."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


def cutlass_dir() -> Path:
    """CUTLASS's sources, from CUTLASS_DIR or the package nvidia-cutlass; skips without them."""
    if "CUTLASS_DIR" in os.environ:
        return Path(os.environ["CUTLASS_DIR"])
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None:
        pytest.skip("CUTLASS is not installed; pip install nvidia-cutlass==4.2.0.0")
    return Path(spec.origin).parent / "source"


def preprocess(arch: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Preprocess an instantiation's device code with nvcc: guards act before anything compiles."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    cutlass = cutlass_dir()
    command = [nvcc, "-E", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", *options]
    command += [f"-I{CSRC}", f"-I{cutlass}/include", f"-I{cutlass}/tools/util/include"]
    command += [str(CSRC / "cuda" / "mxfp4_gemm_sm100_256x128.cu")]
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
