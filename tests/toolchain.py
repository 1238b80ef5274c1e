"""What compiles and inspects C++ and CUDA in the tests: where it is, or why a test is skipped."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
COMPILED = ROOT / "build" / "tests"  # what earlier runs compiled: see `compiled`


def run(command: list[str | Path], timeout: float, **options: object) -> str:
    """Standard output and error of a command; a failure fails the test with them."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\nexit {done.returncode}\n{done.stdout}")
    return done.stdout


def compiled(command: list[str | Path], timeout: float) -> tuple[Path, str]:
    """What a command of gcc, clang or nvcc compiles, and what it printed.

    It is that of an earlier run where the command, the compiler and every file that it read are the
    same: a minute and a half of processor time for all that the tests compile.

    Args: command: without -o; it makes one file.
    """
    words = [str(word) for word in command]
    version = run([words[0], "--version"], timeout=60)
    folder = COMPILED / hashlib.sha256("\0".join([*words, version]).encode()).hexdigest()[:16]
    product, record, read = folder / "product", folder / "record.json", folder / "read.d"
    if record.exists():
        kept = json.loads(record.read_text())
        if all(_digest(path) == digest for path, digest in kept["read"].items()):
            return product, kept["log"]
        record.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    log = run([*words, "-MD", "-MF", read, "-o", product], timeout=timeout)
    files = read.read_text().replace("\\\n", " ").partition(": ")[2].split()
    files += [word for word in words if word.endswith((".cpp", ".cu"))]  # of two, read.d has one
    values = {"read": {path: _digest(path) for path in files}, "log": log}
    partial = record.with_suffix(f".{os.getpid()}")  # another process may compile the same
    partial.write_text(json.dumps(values))
    os.replace(partial, record)
    return product, log


def _digest(path: str) -> str | None:
    file = ROOT / path
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


def cxx() -> str:
    """The C++ compiler: $CXX, or the first of the usual names."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    pytest.skip("no C++ compiler: set CXX")


def nvcc() -> str:
    for name in (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and shutil.which(name):
            return shutil.which(name)
    pytest.skip("no CUDA compiler: set CUDACXX, or put nvcc on PATH")


def cuda_include() -> list[Path]:
    """The toolkit's header folders, as nvcc itself reports them."""
    dry = run([nvcc(), "--dryrun", "-E", "-x", "cu", os.devnull], timeout=60)
    top = next(line.split("TOP=")[1] for line in dry.splitlines() if "TOP=" in line)
    include = Path(top) / "include"
    if not (include / "cuda_fp4.h").exists():
        pytest.skip(f"{include} has no cuda_fp4.h: the toolkit is older than 12.8")
    return [include, include / "cccl"]


def cutlass_include() -> Path:
    """CUTLASS's headers: $CUTLASS_DIR/include, or those of the package nvidia-cutlass."""
    candidates = []
    if os.environ.get("CUTLASS_DIR"):
        candidates.append(Path(os.environ["CUTLASS_DIR"]) / "include")
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.submodule_search_locations:
        candidates += [Path(p) / "source/include" for p in spec.submodule_search_locations]
    for include in candidates:
        if (include / "cutlass/cutlass.h").exists():
            return include
    pytest.skip("no CUTLASS: set CUTLASS_DIR, or pip install nvidia-cutlass==4.2.0.0")


def compute_sanitizer() -> str:
    """compute-sanitizer: the toolkit's."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        pytest.skip("no compute-sanitizer: put the CUDA toolkit's on PATH")
    return tool


def cuobjdump() -> tuple[str, dict[str, str]]:
    """cuobjdump and the environment in which it finds nvdisasm: the toolkit's, or PyPI's."""
    folders = [*os.environ["PATH"].split(os.pathsep), "/usr/local/cuda/bin"]
    spec = importlib.util.find_spec("nvidia")
    if spec is not None and spec.submodule_search_locations:
        for package in spec.submodule_search_locations:
            folders += [str(folder) for folder in sorted(Path(package).glob("*/bin"))]
    path = os.pathsep.join(folders)
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return tool, os.environ | {"PATH": path}
