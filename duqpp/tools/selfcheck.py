"""selfcheck: every kernel that can run here against the reference, and its speed on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from duqpp.checkpoint.shard import Progress
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule, dequantize
from duqpp.format.scale_layout import unswizzle_scales
from duqpp.ops import (
    mxfp4_gemm,
    mxfp4_linear,
    prepare_weight,
    rmsnorm_rotate_quantize,
    rotate_quantize,
    silu_mul_rotate_quantize,
)
from duqpp.ops.backend import OPS, Backend
from duqpp.ops.dispatch import BACKENDS
from duqpp.rotation.basis import hadamard
from duqpp.tools.doctor import doctor
from duqpp.tools.gemm_checks import (
    ROWS,
    Check,
    K,
    Run,
    check_streamk,
    checks_of,
    has_streamk,
    on,
    out_dtypes,
    streamk,
    swizzles,
)

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
_TIMED_ROWS = (1, 16, 128, 1024, 8192)
_FUSED_TOLERANCE = 1e-3  # share of E2M1 codes: float32 sums in another order cross some midpoints


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
    products of many rows on GPUs up to sm_90 are within the bounds of `duqpp.ops.large_gemm`. Of
    mxfp4_gemm on a GPU every kernel runs, as `duqpp.ops.cover` says; stream-K comes after all
    others, in a process of its own, and is timed only where it has passed.

    Args:
        timings: whether to time LLaMA-3's linears on a CUDA device.
        progress: called with ("selfcheck", steps done, steps in all).
    """
    runnable, skipped = _runnable()
    on_gpu = [b for b, op, d in runnable if op == "mxfp4_gemm" and d == "cuda"]
    steps = [(run, b, d) for b, op, d in runnable for run in _checks(b, op, d)]
    total, checks = len(steps) + (1 + timings) * len(on_gpu), []
    advance = progress or (lambda *step: None)
    with streamk(False) if on_gpu else nullcontext(False) as allowed:
        for done, (run, backend, device) in enumerate(steps):
            advance("selfcheck", done, total)
            checks.append(run(backend, device))
    works = False
    if on_gpu and has_streamk():
        if allowed:
            advance("selfcheck", len(steps), total)
            found = check_streamk(on_gpu[0])
            works = not any(check.failures for check in found)
            checks += found
        else:
            skipped.append(f"stream-K on {on_gpu[0].name}: DUQPP_STREAMK=off")
    measured, bandwidth = [], None
    for backend in on_gpu if timings else []:
        bandwidth = _copy_bandwidth("cuda")
        with streamk(works):
            measured += list(_timings(backend, "cuda"))
    if timings and not on_gpu:
        skipped.append("timings: they are for CUDA devices; benchmarks/ has the CPU's")
    advance("selfcheck", total, total)
    return Report(tuple(checks), tuple(measured), bandwidth, tuple(skipped), doctor())


def _runnable() -> tuple[list[tuple[Backend, str, str]], list[str]]:
    """Backends that can run here, each with an op and a type of device; and why others cannot."""
    runnable, skipped = [], []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for backend, device in product(BACKENDS, devices):
        if backend.name == REFERENCE or not backend.name.startswith(device):
            continue
        for op in OPS:
            reason = backend.unavailable_reason(op, torch.device(device))
            if reason is None:
                runnable.append((backend, op, device))
            else:
                skipped.append(f"{op} on {backend.name}: {reason}")
    if "cuda" not in devices:
        skipped.append("all CUDA backends: torch sees no CUDA device")
    return runnable, skipped


def _checks(backend: Backend, op: str, device: str) -> list[Run]:
    if op == "rotate_quantize":
        return [_check_rotate_quantize, _check_fused]
    return checks_of(backend, device)


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
    if not swizzles(backend):
        return on(quantized, "cpu")
    rows, columns = quantized.shape
    scales = unswizzle_scales(quantized.scales, rows, columns // BLOCK_SIZE)
    return on(MXFP4Tensor(quantized.codes, scales), "cpu")


def _moved(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _without_sign_of_zero(codes: Tensor) -> Tensor:
    low, high = codes & 0x0F, codes & 0xF0
    return torch.where(low == 0x08, 0, low) | torch.where(high == 0x80, 0, high)


def _check_rotate_quantize(backend: Backend, device: str) -> Check:
    generator, failures, cases = torch.Generator().manual_seed(1), [], 0
    for rows, k in product(ROWS, K):
        x = _integers(rows, k, generator)
        for (name, r), rule, dtype in product(
            _rotations(k, generator).items(), ScaleRule, out_dtypes(device)
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
    for rows, k in product(ROWS, K):
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
