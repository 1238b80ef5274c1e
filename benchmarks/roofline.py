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
from harness import timer

SOURCE = Path(__file__).parent / "int8_peak.cpp"


def read_bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second that a reduction over more memory than any cache reads, with all threads."""
    data = torch.ones(1 << 28, dtype=torch.int32)  # 1 GiB
    return data.nbytes / _least_seconds(data.amax, seconds)


def copy_bandwidth(seconds: float = 1.0, device: str = "cpu") -> float:
    """Bytes a second, read and written, of a copy of more memory than any cache holds."""
    source = torch.ones(1 << 27, dtype=torch.int32, device=device)  # 512 MiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), seconds, device)


def _least_seconds(call: Callable[[], object], seconds: float, device: str = "cpu") -> float:
    """Of five calls, and of more while `seconds` last."""
    measure = timer(call, device)
    least, turns, end = float("inf"), 0, time.perf_counter() + seconds
    while turns < 5 or time.perf_counter() < end:
        least, turns = min(least, measure()), turns + 1
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
