"""selfcheck: every kernel that can run here against the reference, and its speed on a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from duqpp.checkpoint.shard import Progress
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule, dequantize
from duqpp.format.scale_layout import swizzle_scales, unswizzle_scales
from duqpp.ops import (
    mxfp4_gemm,
    mxfp4_linear,
    prepare_weight,
    rmsnorm_rotate_quantize,
    rotate_quantize,
    silu_mul_rotate_quantize,
)
from duqpp.ops.backend import Backend
from duqpp.ops.dispatch import BACKENDS
from duqpp.ops.large_gemm import Route, large_gemm, route_on
from duqpp.ops.native import Sm80Backend
from duqpp.rotation.basis import hadamard
from duqpp.tools.doctor import doctor

REFERENCE = "reference"
# (K, N) of LLaMA-3's linears; those that read one input are one product.
LLAMA_3 = {
    "8B qkv": (4096, 6144),
    "8B o": (4096, 4096),
    "8B gate_up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B qkv": (8192, 10240),
    "70B o": (8192, 8192),
    "70B gate_up": (8192, 57344),
    "70B down": (28672, 8192),
}
_ROWS = (1, 7, 16, 129, 300)  # of x: whole tiles, ragged ones, and one token
_K = (32, 96, 160, 4096)
_N = (8, 136, 512)
_TIMED_ROWS = (1, 16, 128, 1024, 8192)
_FUSED_TOLERANCE = 1e-3  # share of E2M1 codes: float32 sums in another order cross some midpoints


@dataclass(frozen=True)
class Check:
    """One kernel held against the reference over many shapes. failures: the first few, in words."""

    backend: str
    op: str
    cases: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """A quantized linear on a GPU, its activations quantized, and torch's linear in bfloat16.

    Medians in microseconds. weight_bytes_per_second: packed weight bytes over the whole time.
    """

    linear: str
    M: int
    N: int
    K: int
    quantize_us: float
    gemm_us: float
    linear_us: float
    bf16_us: float
    weight_bytes_per_second: float


@dataclass(frozen=True)
class Report:
    """What was found. skipped: what could not run here, and why. machine: as `doctor` says."""

    checks: tuple[Check, ...]
    timings: tuple[Timing, ...]
    copy_bytes_per_second: float | None
    skipped: tuple[str, ...]
    machine: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every check did, and there was one."""
        return bool(self.checks) and not any(check.failures for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self) | {"passed": self.passed}


def selfcheck(*, timings: bool = True, progress: Progress | None = None) -> Report:
    """Run every backend that can run here against the reference; on a CUDA device, time it too.

    Inputs are such that every float32 sum is exact, in any order: results must be equal, byte for
    byte. The fused forms compute a square root or an exponential, so that a few codes may differ;
    products of many rows on GPUs up to sm_90 are within the bounds of `duqpp.ops.large_gemm`.

    Args:
        timings: whether to time LLaMA-3's linears on a CUDA device.
        progress: called with ("selfcheck", steps done, steps in all).
    """
    skipped, runnable = [], []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for backend, device in product(BACKENDS, devices):
        if backend.name == REFERENCE or not backend.name.startswith(device):
            continue
        for op in ("rotate_quantize", "mxfp4_gemm"):
            reason = backend.unavailable_reason(op, torch.device(device))
            if reason is None:
                runnable.append((backend, op, device))
            else:
                skipped.append(f"{op} on {backend.name}: {reason}")
    if "cuda" not in devices:
        skipped.append("all CUDA backends: torch sees no CUDA device")

    steps = [(run, *case) for case in runnable for run in _checks(*case[:2])]
    timed = [(b, d) for b, op, d in runnable if timings and op == "mxfp4_gemm" and d == "cuda"]
    total, checks, measured, bandwidth = len(steps) + len(timed), [], [], None
    for done, (run, backend, _, device) in enumerate(steps):
        if progress:
            progress("selfcheck", done, total)
        checks.append(run(backend, device))
    for backend, device in timed:
        bandwidth = _copy_bandwidth(device)
        measured += list(_timings(backend, device))
    if timings and not timed:
        skipped.append("timings: they are for CUDA devices; benchmarks/ has the CPU's")
    if progress:
        progress("selfcheck", total, total)
    return Report(tuple(checks), tuple(measured), bandwidth, tuple(skipped), doctor())


def _integers(rows: int, k: int, generator: torch.Generator, limit: int = 4) -> Tensor:
    return torch.randint(-limit, limit + 1, (rows, k), generator=generator).float()


def _rotations(k: int, generator: torch.Generator) -> dict[str, Tensor | None]:
    """Integer matrices, none symmetric, whose products with small integers are exact."""
    shared = (hadamard(BLOCK_SIZE) * BLOCK_SIZE**0.5).round()[
        torch.randperm(32, generator=generator)
    ]
    per_block = torch.randint(-2, 3, (k // BLOCK_SIZE, 32, 32), generator=generator)
    return {
        "none": None,
        "shared": shared.bfloat16().contiguous(),
        "per block": per_block.bfloat16(),
    }


def _row_major(quantized: MXFP4Tensor, backend: Backend) -> MXFP4Tensor:
    """An op's result with row-major scales, on the CPU."""
    if not _swizzles(backend):
        return _on(quantized, "cpu")
    rows, columns = quantized.shape
    scales = unswizzle_scales(quantized.scales, rows, columns // BLOCK_SIZE)
    return _on(MXFP4Tensor(quantized.codes, scales), "cpu")


def _as_activation(operand: MXFP4Tensor, backend: Backend, device: str) -> MXFP4Tensor:
    """A row-major operand as this backend's rotate_quantize leaves activations."""
    operand = _on(operand, device)
    if not _swizzles(backend):
        return operand
    return MXFP4Tensor(operand.codes, swizzle_scales(operand.scales))


def _swizzles(backend: Backend) -> bool:
    return len(backend.scales_shape(128, 128)) == 1


def _on(tensor: MXFP4Tensor, device: str) -> MXFP4Tensor:
    return MXFP4Tensor(tensor.codes.to(device), tensor.scales.to(device))


def _moved(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _without_sign_of_zero(codes: Tensor) -> Tensor:
    low, high = codes & 0x0F, codes & 0xF0
    return torch.where(low == 0x08, 0, low) | torch.where(high == 0x80, 0, high)


def _dtypes(device: str) -> tuple[torch.dtype, ...]:
    half = (torch.bfloat16, torch.float16)
    return half if device == "cuda" else (*half, torch.float32)


def _check_rotate_quantize(backend: Backend, device: str) -> Check:
    generator, failures, cases = torch.Generator().manual_seed(1), [], 0
    for rows, k in product(_ROWS, _K):
        x = _integers(rows, k, generator)
        for (name, r), rule, dtype in product(
            _rotations(k, generator).items(), ScaleRule, _dtypes(device)
        ):
            expected = rotate_quantize(x.to(dtype), r, rule=rule, backend=REFERENCE)
            on_device = rotate_quantize(
                x.to(device, dtype), _moved(r, device), rule=rule, backend=backend.name
            )
            actual = _row_major(on_device, backend)
            same = torch.equal(actual.scales, expected.scales) and torch.equal(
                _without_sign_of_zero(actual.codes), _without_sign_of_zero(expected.codes)
            )
            cases += 1
            if not same:
                failures.append(f"[{rows}, {k}] {dtype}, {rule}, rotation {name}")
    return Check(backend.name, "rotate_quantize", cases, tuple(failures[:5]))


def _check_fused(backend: Backend, device: str) -> Check:
    generator, failures, cases = torch.Generator().manual_seed(2), [], 0
    for rows, k in product(_ROWS, _K):
        x, up = (
            torch.randn(rows, k, dtype=torch.float32, generator=generator).bfloat16()
            for _ in range(2)
        )
        weight = torch.rand(k, dtype=torch.float32, generator=generator).bfloat16() + 0.5
        for name, r in _rotations(k, generator).items():

            def forms(
                where: str,
                runs_on: str,
                r: Tensor | None = r,
                x: Tensor = x,
                up: Tensor = up,
                weight: Tensor = weight,
            ) -> Iterator[MXFP4Tensor]:
                options: dict[str, Any] = {"rule": ScaleRule.EVEN, "backend": runs_on}
                r = _moved(r, where)
                yield silu_mul_rotate_quantize(x.to(where), up.to(where), r, **options)
                yield rmsnorm_rotate_quantize(
                    x.to(where), weight.to(where), r, epsilon=1e-5, **options
                )

            pairs = zip(forms(device, backend.name), forms("cpu", REFERENCE), strict=True)
            for form, (actual, expected) in zip(("silu_mul", "rmsnorm"), pairs, strict=True):
                cases += 1
                one, two = dequantize(_row_major(actual, backend)), dequantize(expected)
                differ = (one != two).float().mean()
                if not differ <= max(_FUSED_TOLERANCE, 4 / one.numel()):
                    failures.append(f"{form} [{rows}, {k}], rotation {name}: {differ:.2%} differ")
    return Check(backend.name, "fused rotate_quantize", cases, tuple(failures[:5]))


def _operand(rows: int, k: int, generator: torch.Generator) -> MXFP4Tensor:
    """Random codes, and scales of two exponents: products sum exactly in float32."""
    codes = torch.randint(0, 256, (rows, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(126, 128, (rows, k // BLOCK_SIZE), generator=generator)
    return MXFP4Tensor(codes, scales.to(torch.uint8))


def _check_gemm(backend: Backend, device: str) -> Check:
    generator, failures, cases = torch.Generator().manual_seed(3), [], 0
    for m, n, k in product(_ROWS, _N, _K):
        a, b = _operand(m, k, generator), _operand(n, k, generator)
        bias = _integers(1, n, generator)[0] / 4
        exact = dequantize(a).double() @ dequantize(b).double().T + bias.double()
        prepared = _as_activation(a, backend, device)
        weight = prepare_weight(_on(b, device), backend=backend.name)
        for dtype in _dtypes(device):
            actual = mxfp4_gemm(
                prepared, weight, bias.to(device), out_dtype=dtype, backend=backend.name
            )
            cases += 1
            wrong = int((actual.cpu() + 0 != exact.float().to(dtype) + 0).sum())
            if wrong:
                failures.append(f"[{m}, {k}] x [{n}, {k}] to {dtype}: {wrong} of {m * n} differ")
    return Check(backend.name, "mxfp4_gemm", cases, tuple(failures[:5]))


def _check_nan(backend: Backend, device: str) -> Check:
    generator, failures = torch.Generator().manual_seed(4), []
    a, b = _operand(40, 96, generator), _operand(136, 96, generator)
    a.scales[33, 1] = b.scales[130, 2] = 255
    prepared = _as_activation(a, backend, device)
    weight = prepare_weight(_on(b, device), backend=backend.name)
    actual = mxfp4_gemm(prepared, weight, out_dtype=torch.bfloat16, backend=backend.name)
    expected = torch.zeros(40, 136, dtype=torch.bool)
    expected[33] = expected[:, 130] = True
    if not torch.equal(actual.isnan().cpu(), expected):
        failures.append("NaN scales must make their row and column NaN, and no other")
    return Check(backend.name, "mxfp4_gemm with NaN scales", 1, tuple(failures))


def _check_many_rows(backend: Backend, device: str) -> Check:
    generator, failures, cases = torch.Generator().manual_seed(5), [], 0
    routes = {route_on(torch.device(device)), Route.BFLOAT16}
    for (m, n, k), route in product(((300, 264, 160), (129, 512, 544)), sorted(routes, key=str)):
        a, b = _operand(m, k, generator), _operand(n, k, generator)
        actual = large_gemm(
            _as_activation(a, backend, device),
            backend.prepare_weight(_on(b, device)),
            route=route,
        )
        values = [dequantize(operand).double() for operand in (a, b)]
        exact, magnitude = values[0] @ values[1].T, values[0].abs() @ values[1].abs().T
        bound = exact.abs() / 2**8 + (0 if route is Route.BFLOAT16 else magnitude / 2**5)
        cases += 1
        if wrong := int(((actual.cpu().double() - exact).abs() > bound).sum()):
            failures.append(f"[{m}, {k}] x [{n}, {k}] by {route.value}: {wrong} of {m * n} differ")
    return Check(backend.name, "mxfp4_gemm of many rows", cases, tuple(failures))


_CHECKS: dict[str, tuple[Callable[[Backend, str], Check], ...]] = {
    "rotate_quantize": (_check_rotate_quantize, _check_fused),
    "mxfp4_gemm": (_check_gemm, _check_nan),
}


def _checks(backend: Backend, op: str) -> tuple[Callable[[Backend, str], Check], ...]:
    large = op == "mxfp4_gemm" and isinstance(backend, Sm80Backend)
    return (*_CHECKS[op], _check_many_rows) if large else _CHECKS[op]


def _median_us(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a call on the current CUDA stream, microseconds."""
    for _ in range(3):
        call()
    marks = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = sorted(start.elapsed_time(end) * 1e3 for start, end in marks)
    return times[repeats // 2]


def _copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _median_us(lambda: target.copy_(source)) * 1e-6
    return 2 * int(source.numel()) / seconds


def _timings(backend: Backend, device: str) -> Iterator[Timing]:
    rotation = hadamard(BLOCK_SIZE).bfloat16().contiguous().to(device)
    options: dict[str, Any] = {"rule": ScaleRule.EVEN, "backend": backend.name}
    for name, (k, n) in LLAMA_3.items():
        weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        scales = torch.full((n, k // BLOCK_SIZE), 120, dtype=torch.uint8, device=device)
        packed = prepare_weight(MXFP4Tensor(codes, scales), backend=backend.name)
        for m in _TIMED_ROWS:
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            a = rotate_quantize(x, rotation, **options)

            def quantize(x: Tensor = x) -> MXFP4Tensor:
                return rotate_quantize(x, rotation, **options)

            def gemm(a: MXFP4Tensor = a, packed: MXFP4Tensor = packed) -> Tensor:
                return mxfp4_gemm(a, packed, out_dtype=torch.bfloat16, backend=backend.name)

            def both(x: Tensor = x, packed: MXFP4Tensor = packed) -> Tensor:
                return mxfp4_linear(x, rotation, packed, **options)

            def bf16(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                return linear(x, weight)

            calls: tuple[Callable[[], object], ...] = (quantize, gemm, both, bf16)
            quantize_us, gemm_us, linear_us, bf16_us = map(_median_us, calls)
            rate = n * k * (0.5 + 1 / BLOCK_SIZE) / (linear_us * 1e-6)
            yield Timing(name, m, n, k, quantize_us, gemm_us, linear_us, bf16_us, rate)
