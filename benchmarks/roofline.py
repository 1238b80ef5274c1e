"""The roofs of a machine, measured in the same run as what is held against them."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timing import Call, clock_for, least_seconds
from torch import Tensor

SOURCE = Path(__file__).parent / "int8_peak.cpp"
BYTES = 1 << 29  # that are copied, and half of those that are read: more than any cache holds
SIZE = 8192  # of the square products whose rate is a GPU's peak


@dataclass(frozen=True)
class Peaks:
    """What a machine reached on plain work.

    bandwidth: by name, "read" or "copy", bytes a second. rates: by format, operations a second, a
    multiplication and an addition counted as two. absent: by format, why it has no rate.
    """

    bandwidth: dict[str, float]
    rates: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def roof(self, moved: float, operations: float) -> tuple[str, float]:
        """The roof that binds, and the fewest seconds that it allows.

        Args: moved: bytes. operations: of a product, counted as `rates` are.
        """
        least = {name: moved / value for name, value in self.bandwidth.items()}
        if self.rates and operations:
            fastest = max(self.rates, key=self.rates.__getitem__)
            least[fastest] = operations / self.rates[fastest]
        name = max(least, key=least.__getitem__)
        return name, least[name]

    def to_dict(self) -> dict[str, float | str]:
        """JSON-ready, with units in the names."""
        named: dict[str, float | str] = {}
        named |= {f"{name}_bytes_per_second": value for name, value in self.bandwidth.items()}
        named |= {f"{name}_operations_per_second": value for name, value in self.rates.items()}
        return named | {f"{name}_absent": why for name, why in self.absent.items()}


def measured_peaks(device: str, threads: int, seconds: float = 1.0, size: int = SIZE) -> Peaks:
    """Of a CPU, read bandwidth and int8; of a GPU, copy bandwidth and matrix products.

    Args: seconds: for each. size: of a GPU's products.
    """
    if device == "cpu":
        rate = int8_rate(threads, seconds / 2)
        rates = {"int8": rate} if rate else {}
        return Peaks({"read": read_bandwidth(seconds)}, rates)
    rates, absent = matmul_rates(device, seconds, size)
    return Peaks({"copy": copy_bandwidth(seconds, device)}, rates, absent)


def read_bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second that a reduction over more memory than any cache reads, with all threads."""
    data = torch.ones(BYTES // 2, dtype=torch.int32)
    return data.nbytes / least_seconds(data.amax, clock_for("cpu", cold=False), seconds)


def copy_bandwidth(seconds: float = 1.0, device: str = "cpu") -> float:
    """Bytes a second, read and written, of a copy of more memory than any cache holds.

    The fastest of two on a GPU: in a graph an H200 copies at 2.8 TB/s, and kernels of these
    benchmarks, of duqpp and of cuBLAS, move up to 4.1 TB/s.
    """
    source = torch.ones(BYTES // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    calls: list[Call] = [lambda: target.copy_(source)]
    if device != "cpu":
        calls.append(lambda: torch.bitwise_not(source, out=target))
    clock = clock_for(device, cold=False)
    least = min(least_seconds(call, clock, seconds / len(calls)) for call in calls)
    return 2 * source.nbytes / least


def matmul_rates(
    device: str, seconds: float = 1.0, size: int = SIZE
) -> tuple[dict[str, float], dict[str, str]]:
    """Operations a second of torch's square products of random values, and why a format has none.

    bf16 is `torch.mm`, fp8 `torch._scaled_mm` of e4m3, fp4 the same of E2M1 with a scale for each
    16 values: NVFP4, which the tensor core multiplies at the rate of MXFP4, and cuBLAS can, too.
    """
    clock = clock_for(device, cold=False)
    rates, absent = {}, {}
    for name, make in {"bf16": bf16_product, "fp8": fp8_product, "fp4": nvfp4_product}.items():
        call, why = attempt(lambda make=make: make(device, size))
        if call is None:
            absent[name] = why
        else:
            rates[name] = 2 * size**3 / least_seconds(call, clock, seconds)
    return rates, absent


def attempt(make: Callable[[], Call]) -> tuple[Call | None, str]:
    """A product that torch can do here, tried once; or None, and why not, in torch's own words."""
    try:
        call = make()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except (RuntimeError, ValueError, AttributeError, TypeError, NotImplementedError) as error:
        return None, f"not available: {str(error).splitlines()[0]}"
    return call, ""


def bf16_product(device: str, size: int) -> Call:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    return lambda: torch.mm(a, b.t())


def fp8_product(device: str, size: int) -> Call:
    a, b = (to_fp8(torch.randn(size, size, device=device)) for _ in "ab")
    return lambda: fp8_mm(a, b)


def to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and the float32 scale, one for the tensor, that they are multiplied with."""
    scale = values.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
    return (values / scale).to(torch.float8_e4m3fn), scale


def fp8_mm(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """a [M, K] times b [N, K] transposed, in bfloat16, by the library's fastest accumulation."""
    (x, x_scale), (w, w_scale) = a, b
    return torch._scaled_mm(
        x, w.t(), x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def nvfp4_product(device: str, size: int) -> Call:
    codes = (torch.randint(0, 256, (size, size // 2), dtype=torch.uint8) for _ in "ab")
    a, b = (c.to(device).view(torch.float4_e2m1fn_x2) for c in codes)
    ones = torch.ones(size * size // 16, device=device).to(torch.float8_e4m3fn)
    return lambda: torch._scaled_mm(a, b.t(), ones, ones, out_dtype=torch.bfloat16)


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
