"""selfcheck's products: mxfp4_gemm against float64, and every kernel that a GPU has for it.

    python -m duqpp.tools.gemm_checks BACKEND

checks stream-K alone, which selfcheck leaves to such a process: its CTAs wait for each other.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, dequantize
from duqpp.format.scale_layout import swizzle_scales
from duqpp.ops import mxfp4_gemm, prepare_weight
from duqpp.ops.backend import Backend
from duqpp.ops.cover import Product, cover
from duqpp.ops.dispatch import BACKENDS
from duqpp.ops.kernels import machines_here
from duqpp.ops.large_gemm import Route, large_gemm, route_on
from duqpp.ops.native import Sm80Backend, compiled_library

ROWS = (1, 7, 16, 129, 300)  # of x: whole tiles, ragged ones, and one token
K = (32, 96, 160, 4096)
N = (8, 136, 512)
STREAMK_LIMIT = 180.0  # seconds for a process that checks stream-K, its start included
_RAGGED = Product(40, 136, 96)
_BIASES = (None, torch.bfloat16, torch.float16, torch.float32)
# What is added to the scale bytes of both operands, 126 and 127 of each: then one has 253 and 254,
# 254 being the largest, the other 0 and 1, and their products are twice what they were.
_ENDS = {"largest": (127, -126), "smallest": (-126, 127)}


@dataclass(frozen=True)
class Check:
    """One kernel held against the reference over many shapes. failures: the first few, in words."""

    backend: str
    op: str
    cases: int
    failures: tuple[str, ...]


Run = Callable[[Backend, str], Check]  # of a backend on a type of device


def swizzles(backend: Backend) -> bool:
    return len(backend.scales_shape(128, 128)) == 1


def on(tensor: MXFP4Tensor, device: str) -> MXFP4Tensor:
    return MXFP4Tensor(tensor.codes.to(device), tensor.scales.to(device))


def out_dtypes(device: str) -> tuple[torch.dtype, ...]:
    """What kernels write; float32 on a GPU is the reference's."""
    half = (torch.bfloat16, torch.float16)
    return half if device == "cuda" else (*half, torch.float32)


def checks_of(backend: Backend, device: str) -> list[Run]:
    """The checks of products, but that of stream-K, which is to be off meanwhile."""
    large = [check_many_rows] if isinstance(backend, Sm80Backend) else []
    return [check_shapes, check_nan, *large, *_kernel_checks(device, streamk=False)]


def base_products() -> list[Product]:
    """What every backend is to multiply."""
    return [Product(m, n, k) for m, n, k in product(ROWS, N, K)]


def check_shapes(backend: Backend, device: str) -> Check:
    """`base_products`, with a bias of each dtype in turn."""
    failures, cases = [], 0
    generator, biases = torch.Generator(device).manual_seed(3), cycle(_BIASES)
    for shape in base_products():
        pairs = [(dtype, next(biases)) for dtype in out_dtypes(device)]
        cases += len(pairs)
        failures += _differences(backend, shape, pairs, generator)
    return Check(backend.name, "mxfp4_gemm", cases, tuple(failures[:5]))


def check_nan(backend: Backend, device: str, shape: Product = _RAGGED) -> Check:
    """A NaN scale makes its row or column NaN, and no other."""
    generator = torch.Generator(device).manual_seed(4)
    a, b = _operand(shape.M, shape.K, generator), _operand(shape.N, shape.K, generator)
    row, column = 4 * shape.M // 5, shape.N - 6
    a.scales[row, 1] = b.scales[column, -1] = 255
    actual = _multiply(backend, a, b, None, torch.bfloat16)
    expected = torch.zeros_like(actual, dtype=torch.bool)
    expected[row] = expected[:, column] = True
    right = torch.equal(actual.isnan(), expected)
    failures = () if right else ("NaN scales must make their row and column NaN, and no other",)
    return Check(backend.name, "mxfp4_gemm with NaN scales", 1, failures)


def check_many_rows(backend: Backend, device: str) -> Check:
    """Products that torch multiplies, within the bounds of `duqpp.ops.large_gemm`."""
    generator, failures, cases = torch.Generator(device).manual_seed(5), [], 0
    routes = {route_on(torch.device(device)), Route.BFLOAT16}
    for (m, n, k), route in product(((300, 264, 160), (129, 512, 544)), sorted(routes, key=str)):
        a, b = _operand(m, k, generator), _operand(n, k, generator)
        weight = backend.prepare_weight(b)
        actual = large_gemm(_as_activation(a, backend), weight, route=route)
        values = [dequantize(operand).double() for operand in (a, b)]
        exact, magnitude = values[0] @ values[1].T, values[0].abs() @ values[1].abs().T
        bound = exact.abs() / 2**8 + (0 if route is Route.BFLOAT16 else magnitude / 2**5)
        cases += 1
        if wrong := int(((actual.double() - exact).abs() > bound).sum()):
            failures.append(f"[{m}, {k}] x [{n}, {k}] by {route.value}: {wrong} of {m * n} differ")
    return Check(backend.name, "mxfp4_gemm of many rows", cases, tuple(failures))


def _kernel_checks(device: str, *, streamk: bool) -> list[Run]:
    """For each kernel of this machine's GPU, `check_kernel` and `check_ends` of it."""
    if device != "cuda":
        return []
    by_kernel: dict[str, list[Product]] = {}
    for cell, shape in cover(machines_here()[-1], streamk=streamk).items():
        by_kernel.setdefault(cell.kernel, []).append(shape)
    return [
        partial(check, kernel=kernel, shapes=shapes)
        for kernel, shapes in by_kernel.items()
        for check in (check_kernel, check_ends)
    ]


def check_kernel(backend: Backend, device: str, kernel: str, shapes: Iterable[Product]) -> Check:
    """A kernel over the products of its cells, to each dtype, with a bias of each dtype."""
    failures, cases = [], 0
    generator = torch.Generator(device).manual_seed(6)
    pairs = list(product(out_dtypes(device), _BIASES))
    for shape in shapes:
        cases += len(pairs)
        failures += _differences(backend, shape, pairs, generator)
    return Check(backend.name, f"mxfp4_gemm: {kernel}", cases, tuple(failures[:5]))


def check_ends(backend: Backend, device: str, kernel: str, shapes: Iterable[Product]) -> Check:
    """A kernel on scales at both ends of E8M0, and on NaN, in the least of the longest products."""
    shape = min(shapes, key=lambda shape: (-shape.K, shape.M * shape.N))
    generator = torch.Generator(device).manual_seed(7)
    a, b = _operand(shape.M, shape.K, generator), _operand(shape.N, shape.K, generator)
    exact, failures = _exact(a, b), list(check_nan(backend, device, shape).failures)
    for what, added in _ENDS.items():
        one = MXFP4Tensor(a.codes, a.scales + added[0])
        other = MXFP4Tensor(b.codes, b.scales + added[1])
        actual = _multiply(backend, one, other, None, torch.bfloat16)
        if wrong := int((actual + 0 != (2 * exact).float().bfloat16() + 0).sum()):
            failures.append(f"the {what} scales of x: {wrong} of {exact.numel()} differ")
    op = f"mxfp4_gemm: {kernel}, scales at their ends"
    return Check(backend.name, op, len(_ENDS) + 1, tuple(failures))


def check_streamk(backend: Backend, limit: float = STREAMK_LIMIT) -> list[Check]:
    """Stream-K's `check_kernel` and `check_ends` on a GPU, in a process that is stopped in time."""
    command = [sys.executable, "-m", "duqpp.tools.gemm_checks", backend.name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=True, encoding="utf-8"
        )
    except subprocess.TimeoutExpired:
        failure = f"no end within {limit:g} s"
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:]
        failure = f"exit status {error.returncode}: {''.join(last)}"
    else:
        found = json.loads(done.stdout)
        return [Check(**check | {"failures": tuple(check["failures"])}) for check in found]
    failure += "; DUQPP_STREAMK=off keeps stream-K from being chosen"
    return [Check(backend.name, "mxfp4_gemm: stream-K", 0, (failure,))]


def has_streamk() -> bool:
    """Whether this machine's GPU has products that are stream-K's."""
    return bool(_kernel_checks("cuda", streamk=True))


@contextmanager
def streamk(allowed: bool) -> Iterator[bool]:
    """Let ops choose stream-K, or not; what is yielded is whether they could before."""
    library: Any = compiled_library()
    before = library.allow_streamk(allowed)
    try:
        yield before
    finally:
        library.allow_streamk(before)


def _operand(rows: int, k: int, generator: torch.Generator) -> MXFP4Tensor:
    """Random codes, and scales of two exponents: products sum exactly in float32, in any order."""
    options: dict[str, Any] = {"generator": generator, "device": generator.device}
    codes = torch.randint(0, 256, (rows, k // 2), **options, dtype=torch.uint8)
    scales = torch.randint(126, 128, (rows, k // BLOCK_SIZE), **options, dtype=torch.uint8)
    return MXFP4Tensor(codes, scales)


def _as_activation(operand: MXFP4Tensor, backend: Backend) -> MXFP4Tensor:
    """A row-major operand as this backend's rotate_quantize leaves activations."""
    if not swizzles(backend):
        return operand
    return MXFP4Tensor(operand.codes, swizzle_scales(operand.scales))


def _multiply(
    backend: Backend, a: MXFP4Tensor, b: MXFP4Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    weight = prepare_weight(b, backend=backend.name)
    x = _as_activation(a, backend)
    return mxfp4_gemm(x, weight, bias, out_dtype=dtype, backend=backend.name)


def _exact(a: MXFP4Tensor, b: MXFP4Tensor) -> Tensor:
    return dequantize(a).double() @ dequantize(b).double().T


def _differences(
    backend: Backend,
    shape: Product,
    pairs: Iterable[tuple[torch.dtype, torch.dtype | None]],
    generator: torch.Generator,
) -> list[str]:
    """Where a product differs from float64, rounded once; pairs: dtypes of result and bias."""
    failures = []
    a, b = _operand(shape.M, shape.K, generator), _operand(shape.N, shape.K, generator)
    quarters = torch.randint(-4, 5, (shape.N,), generator=generator, device=generator.device) / 4
    product = _exact(a, b)
    for dtype, bias_dtype in pairs:
        bias = None if bias_dtype is None else quarters.to(bias_dtype)
        exact = product if bias is None else product + bias.double()
        actual = _multiply(backend, a, b, bias, dtype)
        if wrong := int((actual + 0 != exact.float().to(dtype) + 0).sum()):
            m, n, k = shape.M, shape.N, shape.K
            what = f"[{m}, {k}] x [{n}, {k}] to {dtype}, bias {bias_dtype}"
            failures.append(f"{what}: {wrong} of {m * n} differ")
    return failures


def main(name: str) -> None:
    """Check stream-K on a backend, and print the checks as JSON."""
    backend = next(backend for backend in BACKENDS if backend.name == name)
    with streamk(True):
        checks = [run(backend, "cuda") for run in _kernel_checks("cuda", streamk=True)]
    print(json.dumps([asdict(check) for check in checks]))


if __name__ == "__main__":
    main(sys.argv[1])
