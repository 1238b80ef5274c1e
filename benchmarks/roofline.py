"""The two roofs of a machine, measured in the same run as what is held against them."""

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "int8_peak.cpp"


def read_bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second that a reduction over more memory than any cache reads, with all threads."""
    data = torch.ones(1 << 28, dtype=torch.int32)  # 1 GiB
    data.amax()
    return data.nbytes / _least_seconds(data.amax, seconds)


def copy_bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second, read and written, of a copy of more memory than any cache, all threads."""
    source = torch.ones(1 << 27, dtype=torch.int32)  # 512 MiB
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), seconds)


def _least_seconds(call: Callable[[], object], seconds: float) -> float:
    """Of five calls, and of more while `seconds` last."""
    least, turns, end = float("inf"), 0, time.perf_counter() + seconds
    while turns < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        least, turns = min(least, time.perf_counter() - start), turns + 1
    return least


def int8_rate(threads: int, seconds: float = 0.5) -> float:
    """Int8 operations a second of `threads` threads; 0 where the CPU has no AVX-512 VNNI."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "int8_peak.so"
        compiler = os.environ.get("CXX", "c++")
        flags = ["-std=c++17", "-O2", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).int8_operations_per_second
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
        with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter lock
            return sum(pool.map(function, [seconds] * threads))
