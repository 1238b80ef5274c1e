"""C++ programs that need the CPU kernels, under address and undefined-behaviour sanitizers.

What they check is in the programs; here a warning is an error, and so is a read beyond a buffer.
"""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each with the least number of checks that it makes.
PROGRAMS = {
    "test_cpu_gemm": 10_000,
    "test_cpu_rotate_quantize": 10_000,
    "test_gemm_warp_program": 500,
}


def find_tool(name: str) -> str:
    tool = Path(sys.executable).parent / name
    found = str(tool) if tool.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install {name}")
    return found


def run(command: list[str], timeout: int) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        pytest.fail(f"{command[0]}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder that they are built in. It stays, so that only what changed is built again."""
    folder, cmake = ROOT / "build" / "sanitized", find_tool("cmake")
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-DDUQPP_SANITIZE=ON", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may build in it
        configure = [cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        run([*configure, *options], timeout=120)
        run([cmake, "--build", str(folder), "--target", "duqpp_cpp_tests"], timeout=900)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first one compiles every CPU kernel
@pytest.mark.parametrize("program", PROGRAMS)
def test_program_passes_under_the_sanitizers(program, programs):
    output = run([str(programs / program)], timeout=600)
    checks = int(output.splitlines()[-1].split()[1])
    assert checks > PROGRAMS[program], output
