"""What only a GPU can show: graphs, streams, overlap of launches, compute-sanitizer.

`make gpu` runs these; test_rotate_quantize.py and test_fused_forms.py hold the kernels of a GPU to
the definition where there is one.
"""

import os
import sys
from itertools import product

import pytest
import torch

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.format.scale_layout import swizzle_scales
from duqpp.ops import (
    mxfp4_gemm,
    mxfp4_linear,
    native,
    prepare_weight,
    rmsnorm_rotate_quantize,
    rotate_quantize,
    silu_mul_rotate_quantize,
)
from duqpp.ops.dispatch import available
from duqpp.rotation.basis import random_orthogonal
from duqpp.tools.selfcheck import selfcheck
from tests import inputs, oracle, toolchain
from tests.ops.backends import refuse_reference
from tests.ops.test_mxfp4_gemm import exact_product, operands, round_once

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device"
)

GPU = torch.device("cuda")
RULE = ScaleRule.EVEN


@pytest.fixture
def quantizer(monkeypatch) -> str:
    """The backend with a rotate_quantize kernel for this GPU; nothing is left to the reference."""
    refuse_reference(monkeypatch)
    name = available("rotate_quantize", GPU)[0]
    if name == "reference":
        pytest.skip("no kernel of rotate_quantize for this GPU; see `duqpp doctor`")
    return name


@pytest.fixture
def multiplier(monkeypatch) -> str:
    """The backend with an mxfp4_gemm kernel for this GPU; nothing is left to the reference."""
    refuse_reference(monkeypatch)
    name = available("mxfp4_gemm", GPU)[0]
    if name == "reference":
        pytest.skip("no kernel of mxfp4_gemm for this GPU; see `duqpp doctor`")
    return name


@pytest.fixture
def few_rows(multiplier, monkeypatch) -> str:
    """The multiplier, its kernels for few rows taken for many, whatever crossover.json says."""
    monkeypatch.setattr(native, "_large_rows", lambda *_: float("inf"))
    return multiplier


def activation(rows: int, k: int, seed: int) -> torch.Tensor:
    return inputs.outliers(rows, k, seed).to(GPU, torch.bfloat16)


def rotations(k: int, seed: int) -> torch.Tensor:
    return random_orthogonal(32, inputs.generator(seed), count=k // 32).bfloat16().to(GPU)


def weight(n: int, k: int, backend: str) -> MXFP4Tensor:
    codes, scales = (part.to(GPU) for part in inputs.mxfp4_operand(n, k, seed=n))
    return prepare_weight(MXFP4Tensor(codes, scales), backend=backend)


def same(actual: MXFP4Tensor, expected: MXFP4Tensor, what: str) -> None:
    oracle.assert_same(actual.codes.cpu(), expected.codes.cpu(), f"codes, {what}")
    oracle.assert_same(actual.scales.cpu(), expected.scales.cpu(), f"scales, {what}")


def test_selfcheck_passes(quantizer):
    report = selfcheck(timings=False)
    assert {check.backend for check in report.checks} >= {quantizer}
    assert report.passed, [check for check in report.checks if check.failures]


FORMS = {
    "plain": lambda x, up, r, **options: rotate_quantize(x, r, **options),
    "silu_mul": lambda x, up, r, **options: silu_mul_rotate_quantize(x, up, r, **options),
    "rmsnorm": lambda x, up, r, **options: rmsnorm_rotate_quantize(
        x, up[0], r, epsilon=1e-5, **options
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "k"), [(1, 4096), (129, 160), (1000, 4096)])
def test_a_captured_graph_computes_anew_at_each_replay(form, rows, k, quantizer):
    call, options = FORMS[form], {"rule": RULE, "backend": quantizer}
    x, up, r = activation(rows, k, 1), activation(rows, k, 2), rotations(k, 3)
    call(x, up, r, **options)  # what is set up once is set up before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(x, up, r, **options)
    for seed in (4, 5, 6):
        x.copy_(activation(rows, k, seed))
        graph.replay()
        torch.cuda.synchronize()
        same(captured, call(x, up, r, **options), f"{form}, replay {seed}")


def test_padding_is_written_into_poisoned_memory(quantizer):
    """Rows and blocks are ragged; the allocator hands the op memory that is full of 0xFF."""
    for rows, k in ((1, 32), (33, 96), (129, 160)):
        x = activation(rows, k, 7)
        expected = rotate_quantize(x.cpu(), None, rule=RULE, backend="reference")
        whole = swizzle_scales(expected.scales)
        poison = [torch.full((1 << 16,), 255, dtype=torch.uint8, device=GPU) for _ in range(64)]
        del poison
        actual = rotate_quantize(x, None, rule=RULE, backend=quantizer)
        oracle.assert_same(actual.scales.cpu(), whole, f"scales and padding, [{rows}, {k}]")


def test_another_stream(quantizer):
    x, r = activation(300, 4096, 8), rotations(4096, 9)
    expected = rotate_quantize(x, r, rule=RULE, backend=quantizer)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = x.clone()
        for _ in range(20):
            y = y.flip(0).flip(0)
        actual = rotate_quantize(y, r, rule=RULE, backend=quantizer)
    stream.synchronize()
    same(actual, expected, "another stream")


def test_overlapping_launches_wait_for_what_they_read(quantizer):
    """Each launch reads the codes that the one before it writes, and may start before its end."""

    def chain(x: torch.Tensor, pause: bool) -> MXFP4Tensor:
        quantized = None
        for _ in range(5):
            quantized = rotate_quantize(x, None, rule=RULE, backend=quantizer)
            x = quantized.codes.view(torch.bfloat16)  # any bits will do, NaN among them
            if pause:
                torch.cuda.synchronize()
        return quantized

    for rows in (1, 16, 2048):
        for seed in range(10):
            x = activation(rows, 32 * 4**5, seed)
            same(chain(x, pause=False), chain(x, pause=True), f"{rows} rows, seed {seed}")


def test_a_chain_of_linears_waits_for_what_it_reads(multiplier):
    """rotate_quantize, GEMM, rotate_quantize, ...: in a graph, in a row, and one by one."""
    options = {"rule": RULE, "backend": multiplier}
    k = 1024
    w, r, bias = weight(k, k, multiplier), rotations(k, 10), torch.ones(k, device=GPU)

    def chain(x: torch.Tensor, pause: bool) -> torch.Tensor:
        for _ in range(8):
            x = mxfp4_linear(x, r, w, bias, **options) / 64
            if pause:
                torch.cuda.synchronize()
        return x

    for rows in (1, 64, 300):
        x = activation(rows, k, 11)
        expected = chain(x, pause=True)
        oracle.assert_same(chain(x, pause=False).cpu(), expected.cpu(), f"{rows} rows in a row")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(x, pause=False)
        for replay in range(3):
            graph.replay()
            torch.cuda.synchronize()
            oracle.assert_same(captured.cpu(), expected.cpu(), f"{rows} rows, replay {replay}")


def test_a_product_waits_for_a_weight_written_just_before_it(few_rows):
    """It may start before the kernel that flips every sign of the weight has ended."""
    k = 4096
    a = rotate_quantize(activation(16, k, 18), None, rule=RULE, backend=few_rows)
    w = weight(k, k, few_rows)

    def product() -> torch.Tensor:
        return mxfp4_gemm(a, w, out_dtype=torch.bfloat16, backend=few_rows)

    expected, products = product(), []
    assert expected.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            w.codes.bitwise_xor_(0x88)
            products.append(product())
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        for turn, y in enumerate(products):
            assert torch.equal(y, expected if turn % 2 else -expected), turn


def test_a_linear_is_its_two_ops_and_its_kernels_are_adjacent(multiplier):
    """The barriers of stream-K, which few rows need, are cleared before both kernels."""
    options = {"rule": RULE, "backend": multiplier}
    x, w, r = activation(16, 4096, 12), weight(4096, 4096, multiplier), rotations(4096, 13)
    a = rotate_quantize(x, r, **options)
    expected = mxfp4_gemm(a, w, out_dtype=x.dtype, backend=multiplier)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        y = mxfp4_linear(x, r, w, **options)
        torch.cuda.synchronize()
    oracle.assert_same(y.cpu(), expected.cpu(), "mxfp4_linear")
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    names = [event.name for event in events if event.device_type.name == "CUDA"]
    first = next(i for i, name in enumerate(names) if "rotate_quantize" in name)
    gemm = "gemm_sm80" if multiplier == "cuda-sm80" else "CutlassGemm"
    assert gemm in names[first + 1] and not any("emset" in name for name in names[first + 1 :]), (
        names
    )


# selfcheck has the shapes of each kernel of this GPU; here those that every backend is asked for.
@pytest.mark.parametrize("m", inputs.AWKWARD_ROWS)
@pytest.mark.parametrize("k", [*inputs.AWKWARD_K, 14336])
def test_awkward_shapes_equal_float64(m, k, few_rows):
    for n, dtype in product((8, 72), (torch.bfloat16, torch.float16)):
        a, b = operands(m, n, k, seed=m + k)
        on_gpu = MXFP4Tensor(a.codes.to(GPU), swizzle_scales(a.scales).to(GPU))
        w = prepare_weight(MXFP4Tensor(b.codes.to(GPU), b.scales.to(GPU)), backend=few_rows)
        bias = torch.arange(n, device=GPU, dtype=dtype) / 4
        y = mxfp4_gemm(on_gpu, w, bias, out_dtype=dtype, backend=few_rows)
        exact = exact_product(a, b) + bias.double().cpu().numpy()
        expected = round_once(exact, dtype)
        oracle.assert_same(y.cpu() + 0, expected + 0, f"[{m}, {k}] x [{n}, {k}] to {dtype}")


# M: every kernel and more than one of its parts; N: a tile of 8 rows; K: an odd block, a rest of a
# segment, several rounds.
@pytest.mark.parametrize("k", [32, 96, 544, 4096, 4128, 14336])
def test_the_gemm_equals_the_cpu_bit_for_bit(k, few_rows):
    multiplier = few_rows
    if multiplier != "cuda-sm80":
        pytest.skip(f"{multiplier} adds blocks up in the order of its tensor cores")
    for n, m, dtype in product(
        (8, 24, 1024, 4096), (1, 7, 8, 16, 17, 33, 64, 100), (torch.bfloat16, torch.float16)
    ):
        spread = 9 if m % 2 else 60
        a = MXFP4Tensor(*inputs.mxfp4_operand(m, k, seed=m, spread=spread))
        b = MXFP4Tensor(*inputs.mxfp4_operand(n, k, seed=n + 1, spread=spread))
        if m % 8 == 0:  # rows and columns of NaN, and scales at the ends of their range
            a.scales[m // 2, k // 64], b.scales[n // 2, 0] = 255, 255
            a.scales[0, 0], b.scales[1, 0] = 250, 0
        bias = inputs.gaussian(1, n, seed=3)[0] if n % 16 else None
        expected = mxfp4_gemm(
            a, prepare_weight(b, backend="cpu"), bias, out_dtype=dtype, backend="cpu"
        )
        on_gpu = MXFP4Tensor(a.codes.to(GPU), swizzle_scales(a.scales).to(GPU))
        w = prepare_weight(MXFP4Tensor(b.codes.to(GPU), b.scales.to(GPU)), backend=multiplier)
        bias = None if bias is None else bias.to(GPU)
        actual = mxfp4_gemm(on_gpu, w, bias, out_dtype=dtype, backend=multiplier)
        oracle.assert_same(
            actual.cpu().view(torch.int16), expected.view(torch.int16), f"[{m}, {k}] x [{n}, {k}]"
        )


def test_an_output_of_the_gemm_does_not_depend_on_its_batch(few_rows):
    multiplier = few_rows
    if multiplier != "cuda-sm80":
        pytest.skip(f"{multiplier} has another order of sums for other numbers of rows")
    k, n = 4096, 4096
    x, w = activation(100, k, 14), weight(n, k, multiplier)
    options = {"rule": RULE, "backend": multiplier}
    together = mxfp4_linear(x, None, w, **options)
    for rows in (1, 8, 9, 16, 17, 32, 33, 64):
        alone = mxfp4_linear(x[:rows].contiguous(), None, w, **options)
        oracle.assert_same(alone.cpu(), together[:rows].cpu(), f"{rows} rows")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, quantizer):
    command = [toolchain.compute_sanitizer(), "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "tests.ops.cuda_workload"]
    # Without torch's cache every tensor is an allocation of its own, whose bounds are seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    out = toolchain.run(command, timeout=280, env=environment, cwd=toolchain.ROOT)
    assert "done" in out and "0 errors" in out, out
