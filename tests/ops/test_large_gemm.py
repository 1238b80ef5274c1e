"""Products of many rows: the expansion of MXFP4 against float64, and the product on every route.

The CPU runs the routes of every GPU: the expansion is the arithmetic of the GPU's (tests/cpp holds
it to a definition by search, tests/cuda the machine code), torch's products are the CPU's.
"""

import itertools
import logging
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from duqpp.format import MXFP4Tensor, dequantize
from duqpp.format.scale_layout import swizzle_scales
from duqpp.ops import large_gemm, library
from duqpp.ops.large_gemm import Route, chunks, inexact_rows, report_inexact_rows, route_for
from tests import inputs, oracle
from tests.ops import cuda_workload

E4M3 = torch.float8_e4m3fn


def _no_cpu_product() -> str | None:
    """Why torch on this CPU does not multiply float8_e4m3fn with a scale for each row.

    torch 2.11 hands such products to oneDNN where it has them, which takes one scale a tensor.
    """
    values, scales = torch.zeros(16, 32).to(E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(values, values.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError as error:
        return f"torch {torch.__version__}: {str(error).splitlines()[0]}"
    return None


WHY_NOT = _no_cpu_product()


def on_this_cpu(route: Route) -> bool:
    return route is Route.BFLOAT16 or WHY_NOT is None


ROUTES = [
    pytest.param(route, marks=pytest.mark.skipif(not on_this_cpu(route), reason=f"{WHY_NOT}"))
    for route in Route
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def operand(rows: int, k: int, seed: int, exponents: tuple[int, int] = (120, 128)) -> MXFP4Tensor:
    """Random codes, and random scales in a range of exponents."""
    codes, _ = inputs.mxfp4_operand(rows, k, seed)
    scales = torch.randint(*exponents, (rows, k // 32), generator=inputs.generator(seed + 1))
    return MXFP4Tensor(codes, scales.to(torch.uint8))


def as_activation(row_major: MXFP4Tensor) -> MXFP4Tensor:
    return MXFP4Tensor(row_major.codes, swizzle_scales(row_major.scales))


def prepared(row_major: MXFP4Tensor) -> MXFP4Tensor:
    """A weight in the order of csrc/format/weight_fragment.h, written from its description.

    Tiles of 16 rows, the last of 8 where N % 16 = 8. Of codes: pairs of blocks; lanes 4 r + q;
    words of eight codes, [block of the pair][row r, row r + 8]. Of scales: 16 blocks at a time;
    then the largest of each row but 255, and at least 7.
    """
    words = row_major.codes.numpy().view(np.uint32)
    scales, blocks = row_major.scales.numpy(), row_major.scales.shape[1]
    new_words, new_scales = [], []
    for first_row in range(0, len(words), 16):
        tile = words[first_row : first_row + 16]
        tile = tile.reshape(len(tile) // 8, 8, blocks, 4)  # [half, r, block, q]
        for first in range(0, blocks, 2):
            new_words.append(tile[:, :, first : first + 2].transpose(1, 3, 2, 0).flatten())
        for first in range(0, blocks, 16):
            new_scales.append(scales[first_row : first_row + 16, first : first + 16].flatten())
    codes = torch.from_numpy(np.concatenate(new_words).view(np.uint8).reshape(len(words), -1))
    new_scales.append(np.where(scales == 255, 0, scales).max(1).clip(7))
    return MXFP4Tensor(codes, torch.from_numpy(np.concatenate(new_scales)))


def expand_activation(row_major: MXFP4Tensor, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Values in float64, and row scales, float64 [rows, 1]."""
    a = as_activation(row_major)
    values, scales = torch.ops.duqpp_native.expand_activation(a.codes, a.scales, dtype)
    assert values.dtype == dtype and list(values.shape) == list(row_major.shape)
    return values.double().numpy(), scales.double().numpy()


def check_activation(row_major: MXFP4Tensor) -> None:
    """Each value, times its row's scale, is that of MXFP4; the sign of zero, too."""
    expected = oracle.dequantize(row_major.codes, row_major.scales)
    values, scales = expand_activation(row_major, E4M3)
    oracle.assert_same(values * scales, expected, "float8_e4m3fn")
    values, none = expand_activation(row_major, torch.bfloat16)
    assert none.size == 0
    oracle.assert_same(values, expected, "bfloat16")


@pytest.mark.parametrize("k", [32, 96, 160, 4096])
@pytest.mark.parametrize("rows", [1, 33, 129])
def test_activations_within_15_binades_are_exact(rows, k):
    check_activation(operand(rows, k, seed=rows, exponents=(113, 128)))


@pytest.mark.parametrize("top", [14, 15, 127, 200, 252])
def test_rows_that_just_fit_are_exact(top):
    """Every code at every distance up to 14 binades below the row's largest scale."""
    scales = torch.arange(top - 14, top + 1).to(torch.uint8).repeat(16, 1)  # [16, 15]
    codes = torch.arange(256).to(torch.uint8).view(16, 1, 16).expand(16, 15, 16)
    check_activation(MXFP4Tensor(codes.reshape(16, 240).contiguous(), scales))


def test_the_lowest_scales_are_exact_together():
    """Scales of 2**-127 and what is just above: the row's power of two is a normal float32."""
    check_activation(operand(40, 256, seed=1, exponents=(0, 15)))


def test_beyond_15_binades_the_error_is_bounded():
    """At most 2**-16 of the row's largest scale, and 2**-17 of its largest value where that is a
    top code; blocks near the largest scale stay exact."""
    row_major = operand(200, 512, seed=2, exponents=(90, 140))
    expected = oracle.dequantize(row_major.codes, row_major.scales)
    values, scales = expand_activation(row_major, E4M3)
    error = np.abs(values * scales - expected)
    largest = oracle.decode_e8m0(row_major.scales).max(-1, keepdims=True)
    assert (error <= 2.0**-16 * largest).all()
    assert (error < 2.0**-17 * np.abs(expected).max(-1, keepdims=True)).all()
    assert (error > 0).any(axis=-1).mean() > 0.5, "nothing was rounded: no evidence"
    near = row_major.scales >= row_major.scales.amax(-1, keepdim=True) - 14
    assert not error[near.repeat_interleave(32, -1).numpy()].any()


def test_zero_rows_and_nan_blocks():
    row_major = operand(6, 128, seed=3)
    codes, scales = row_major.codes.clone(), row_major.scales.clone()
    codes[0], scales[0] = 0, 0  # what quantize makes of zeros
    codes[1], scales[2] = 0x80, 0  # zeros of both signs; and a row of the least scales
    scales[3, 1], scales[4] = 255, 255
    row_major = MXFP4Tensor(codes, scales)
    check_activation(row_major)
    for dtype in (E4M3, torch.bfloat16):
        values, row_scales = expand_activation(row_major, dtype)
        assert np.isnan(values).any(-1).tolist() == [False] * 3 + [True, True, False]
        assert np.isnan(values[3]).sum() == 32
        assert np.isfinite(row_scales).all()


def test_the_largest_scales_overflow_in_bfloat16_as_in_float32():
    row_major = operand(4, 64, seed=4, exponents=(250, 255))
    a = as_activation(row_major)
    values, _ = torch.ops.duqpp_native.expand_activation(a.codes, a.scales, torch.bfloat16)
    oracle.assert_same(values.float(), dequantize(row_major), "bfloat16")
    assert values.isinf().any()


@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (24, 96), (64, 512), (72, 544), (48, 4096)])
def test_rows_of_a_weight(n, k, dtype):
    """Any rows from a multiple of 16 on, and up to 15 zeros beyond the last."""
    row_major = operand(n, k, seed=n, exponents=(113, 128))
    row_major.scales[-1, -1] = 255
    expected = oracle.dequantize(row_major.codes, row_major.scales)
    b = prepared(row_major)
    for first in range(0, n, 16):
        for rows in {1, 16, n - first, -(-n // 16) * 16 - first}:
            values, scales = torch.ops.duqpp_native.expand_weight(
                b.codes, b.scales, first, rows, dtype
            )
            values = values.double().numpy() * (scales.double().numpy() if dtype == E4M3 else 1)
            inside = expected[first : first + rows]
            beyond = np.zeros((rows - len(inside), k))
            oracle.assert_same(values, np.concatenate((inside, beyond)), f"{rows} from {first}")


def test_expansion_names_the_argument():
    b, bad = prepared(operand(24, 64, seed=1)), torch.zeros(3, dtype=torch.uint8)
    weight, activation = (
        getattr(torch.ops.duqpp_native, name) for name in ("expand_weight", "expand_activation")
    )
    for message, call in {
        "first_row must be a multiple of 16": lambda: weight(b.codes, b.scales, 8, 8, E4M3),
        "rows must end at most 15 beyond": lambda: weight(b.codes, b.scales, 16, 24, E4M3),
        "scales must have 72 bytes": lambda: weight(b.codes, bad, 0, 16, E4M3),
        "dtype must be float8_e4m3fn or bfloat16": lambda: weight(
            b.codes, b.scales, 0, 16, torch.float16
        ),
        "rows a multiple of 8": lambda: weight(
            b.codes[:12].contiguous(), b.scales[: 12 * 3].contiguous(), 0, 12, E4M3
        ),
        "scales must have 512 bytes": lambda: activation(b.codes, b.scales, E4M3),
        "codes must be uint8": lambda: activation(b.codes.int(), bad, E4M3),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


# ------------------------------------------------------------------ products


def float64_product(a: MXFP4Tensor, b: MXFP4Tensor, bias: torch.Tensor | None) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        product = oracle.dequantize(a.codes, a.scales) @ oracle.dequantize(b.codes, b.scales).T
    return product if bias is None else product + bias.double().numpy()


def magnitude(a: MXFP4Tensor, b: MXFP4Tensor) -> np.ndarray:
    """sum(|a_k b_k|) of each output: what the bounds of duqpp.ops.large_gemm are multiples of."""
    one, two = (np.abs(oracle.dequantize(t.codes, t.scales)) for t in (a, b))
    return one @ two.T


def multiply(a: MXFP4Tensor, b: MXFP4Tensor, *others: object, **options: object) -> torch.Tensor:
    return large_gemm.large_gemm(as_activation(a), prepared(b), *others, **options)


def assert_near(out: torch.Tensor, a: MXFP4Tensor, b: MXFP4Tensor, bias: torch.Tensor | None):
    """Within K float32 roundings of the sum of magnitudes, and one rounding to the dtype of out."""
    expected = float64_product(a, b, bias)
    bound = a.shape[1] * 2.0**-23 * (magnitude(a, b) + (0 if bias is None else bias.abs().numpy()))
    precision = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
    bound += precision[out.dtype] * (np.abs(expected) + bound)
    assert (np.abs(out.double().numpy() - expected) <= bound).all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_products_on_every_route(route, out_dtype, bias_dtype):
    """Rows, N and K that fill no tile; in three chunks, the last of them ragged."""
    a, b = operand(70, 160, seed=5), operand(600, 160, seed=6)
    bias = None
    if bias_dtype is not None:
        bias = inputs.gaussian(1, 600, seed=7)[0].mul(100).to(bias_dtype)
    out = multiply(a, b, bias, out_dtype, route=route, workspace_bytes=1)
    assert out.dtype == out_dtype and out.is_contiguous()
    assert_near(out, a, b, bias if bias is None else bias.float())


@pytest.mark.parametrize("route", ROUTES)
def test_exact_sums_are_rounded_once(route):
    """Scales near one another make every float32 sum exact: the result is the rounded float64."""
    a = MXFP4Tensor(*inputs.mxfp4_operand(33, 1024, seed=8))
    b = MXFP4Tensor(*inputs.mxfp4_operand(280, 1024, seed=9))
    bias = inputs.small_integers(1, 280, seed=10)[0]
    product = float64_product(a, b, None)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for one in (None, bias.to(dtype), bias.half()):
            out = multiply(a, b, one, dtype, route=route, workspace_bytes=1)
            expected = product if one is None else product + one.double().numpy()
            oracle.assert_same(out, expected, f"{dtype}, bias {one is not None}")


@pytest.mark.parametrize("route", ROUTES)
def test_nan_blocks_and_zeros(route):
    a, b = operand(70, 128, seed=11), operand(48, 128, seed=12)
    a.scales[3, 2], b.scales[5, 0], b.scales[7] = 255, 255, 255
    a.codes[10], a.scales[10] = 0, 0
    b.codes[20], b.scales[20] = 0x80, 0
    out = multiply(a, b, route=route)
    nan = torch.zeros(70, 48, dtype=torch.bool)
    nan[3], nan[:, 5], nan[:, 7] = True, True, True
    assert torch.equal(out.isnan(), nan)
    zero = out.masked_fill(nan, 0)
    assert not zero[10].any() and not zero[:, 20].any()


@pytest.mark.parametrize("route", [Route.CUBLASLT, Route.CUTLASS])
def test_rows_beyond_15_binades_are_near(route):
    """The error of the expansion, at most 2**-16 of a row's largest scale, on both sides."""
    k = 512
    a, b = operand(80, k, 13, exponents=(100, 128)), operand(64, k, 14, exponents=(100, 128))
    out = multiply(a, b, route=route).double().numpy()
    one, two = (oracle.dequantize(t.codes, t.scales) for t in (a, b))
    step_a, step_b = (
        2.0**-16 * oracle.decode_e8m0(t.scales).max(-1, keepdims=True) for t in (a, b)
    )
    sum_a, sum_b = (np.abs(t).sum(-1, keepdims=True) for t in (one, two))
    bound = step_a * sum_b.T + sum_a * step_b.T + k * step_a * step_b.T
    bound += k * 2.0**-23 * magnitude(a, b)
    expected = one @ two.T
    assert (np.abs(out - expected) <= bound + 2.0**-8 * (np.abs(expected) + bound)).all()


def test_strides_of_the_activation_do_not_matter():
    a, b = operand(70, 64, seed=15), operand(32, 64, seed=16)
    strided = MXFP4Tensor(a.codes.T.contiguous().T, a.scales)
    assert not strided.codes.is_contiguous()
    one, two = (multiply(x, b, route=Route.BFLOAT16) for x in (strided, a))
    oracle.assert_same(one, two, "strided codes")


def test_no_rows():
    a = operand(0, 64, seed=15)
    for route in filter(on_this_cpu, Route):
        assert multiply(a, operand(32, 64, seed=16), route=route).shape == (0, 32)


# ------------------------------------------------------------------ the workspace


def test_chunks_cover_all_rows_once():
    for rows in (1, 255, 256, 257, 600, 4096, 28672, 57344, 128256):
        for row_bytes in (64, 4100, 28676, 2 * 28672):
            for limit in (1, 16 << 20, 64 << 20):
                parts = list(chunks(rows, row_bytes, limit))
                assert parts[0].start == 0 and parts[-1].stop == rows
                lengths = [part.stop - part.start for part in parts]
                assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
                assert all(length % 256 == 0 for length in lengths[:-1])
                assert lengths[0] == max(lengths) and lengths[-1] > 0
                assert max(lengths) <= 256 or max(lengths) * row_bytes <= limit
                # As few as the limit allows, counted in the 256 rows that chunks are multiples of.
                most = max(1, limit // (row_bytes * 256)) * 256
                assert len(parts) <= -(-rows // most)


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that ops return and that are alive, and the most that there were."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        result = op(*arguments, **(options or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(tensor, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_the_workspace_is_bounded(route, out_dtype, monkeypatch):
    """Beside the result and the expanded activations, no more than the bound is alive."""
    # The CPU has no such product, and the stand-in for it takes more memory.
    monkeypatch.setattr(
        large_gemm, "_float32_mm", lambda a, b: a.new_empty((len(a), b.shape[1]), dtype=torch.float)
    )
    m, n, k = 64, 4096, 96
    a, b = as_activation(operand(m, k, seed=17)), prepared(operand(n, k, seed=18))
    bound = 1 << 17
    with LiveBytes() as live:
        large_gemm.large_gemm(a, b, None, out_dtype, route=route, workspace_bytes=bound)
    width = 2 if route is Route.BFLOAT16 else 1
    beside = m * n * 2 + m * k * width + m * 4
    assert bound // 4 < live.most - beside <= bound, live.most - beside
    assert n * k * width > 2 * bound, "the whole weight would fit: no evidence"


def test_the_setting_of_torch_is_restored(monkeypatch):
    settings = torch.backends.cuda.matmul
    a, b = operand(4, 64, seed=19), operand(32, 64, seed=20)
    seen, mm = [], torch.mm

    def state() -> list[bool]:
        """Whether reduced precision is allowed and, where torch knows of it, split-k."""
        name = "allow_bf16_reduced_precision_reduction"
        return [
            getattr(settings, key) for key in (name, f"{name}_split_k") if hasattr(settings, key)
        ]

    def watched(*arguments, **options):
        seen.append(settings.allow_bf16_reduced_precision_reduction)
        return mm(*arguments, **options)

    monkeypatch.setattr(torch, "mm", watched)
    assert settings.allow_bf16_reduced_precision_reduction, "torch's default"
    choices = [True, False, (False, True), (False, False)][: 2 * len(state())]
    try:
        for choice in choices:
            settings.allow_bf16_reduced_precision_reduction = choice
            before = state()
            multiply(a, b, route=Route.BFLOAT16)
            assert state() == before
        if len(choices) > 2:
            with pytest.raises(RuntimeError, match="allow_splitk"):
                settings.allow_bf16_reduced_precision_reduction = (True, False)
    finally:
        settings.allow_bf16_reduced_precision_reduction = True
    assert seen == [False] * len(choices)


# ------------------------------------------------------------------ weights, and the choice


def test_inexact_rows_are_those_that_lose_bits():
    weight = operand(300, 256, seed=21, exponents=(105, 128))
    weight.codes[:50] = 0  # zeros are exact whatever their scale
    weight.scales[50:60] = 255
    values, scales = expand_activation(weight, E4M3)
    expected = oracle.dequantize(weight.codes, weight.scales)
    lost = (values * scales != expected) & ~np.isnan(expected)
    assert 100 < lost.any(-1).sum() < 250
    assert inexact_rows(weight) == lost.any(-1).sum()
    assert inexact_rows(operand(64, 256, seed=22, exponents=(113, 128))) == 0
    # 1 and 2 fit one binade lower than 0.5 does; what float32 has no factor for is lost, too.
    scales = torch.tensor([[127, 112], [127, 111], [250, 1]], dtype=torch.uint8)
    assert inexact_rows(MXFP4Tensor(torch.full((3, 32), 0x22, dtype=torch.uint8), scales)) == 2


def test_inexact_rows_are_reported_where_they_are_rounded(caplog):
    weight = operand(32, 64, seed=23, exponents=(60, 128))
    with caplog.at_level(logging.WARNING):
        report_inexact_rows(weight, Route.BFLOAT16)
        report_inexact_rows(operand(32, 64, seed=24), Route.CUBLASLT)
        assert not caplog.records
        report_inexact_rows(weight, Route.CUBLASLT)
    assert f"{inexact_rows(weight)} of 32 rows of a weight [32, 64]" in caplog.text


def test_routes():
    assert route_for((8, 0), "13.0") is route_for((8, 6), None) is Route.BFLOAT16
    assert route_for((8, 9), "13.0") is Route.CUTLASS
    assert route_for((9, 0), "12.8") is route_for((9, 0), None) is Route.CUTLASS
    assert route_for((9, 0), "12.9") is route_for((9, 0), "13.0") is Route.CUBLASLT


# ------------------------------------------------------------------ as an op of torch


class LargeBackend:
    """A backend whose products are all large."""

    def __init__(self, route: Route):
        self._route = route

    def mxfp4_gemm(self, a, b, bias, out_dtype):
        return large_gemm.large_gemm(a, b, bias, out_dtype, route=self._route)


@pytest.mark.parametrize("route", ROUTES)
def test_behind_the_op_torch_checks_and_compiles_it(route, monkeypatch):
    monkeypatch.setattr(library, "select", lambda *_: LargeBackend(route))
    a, b = as_activation(operand(33, 64, seed=25)), prepared(operand(48, 64, seed=26))
    bias = inputs.gaussian(1, 48, seed=27)[0].bfloat16()
    arguments = (a.codes, a.scales, b.codes, b.scales, bias, torch.bfloat16, "auto")
    op = torch.ops.duqpp.mxfp4_gemm
    torch.library.opcheck(op.default, arguments)
    expected = op(*arguments)
    compiled = torch.compile(lambda *values: op(*values) + 1, fullgraph=True, backend="aot_eager")
    oracle.assert_same(compiled(*arguments), expected + 1, "compiled")


class Expansions(TorchDispatchMode):
    """The calls of ops that expand an operand: its rows, and those of what it becomes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        result = op(*arguments, **(options or {}))
        name = op._schema.name.removeprefix("duqpp_native::")
        if name.startswith("expand_"):
            first = arguments[2] if name == "expand_weight" else 0
            self.seen.add((name, result[0].dtype, arguments[0].shape[0], first, len(result[0])))
        return result


def test_the_workload_that_is_watched_has_every_form_of_an_expansion(monkeypatch):
    """What tests/ops/test_cuda.py runs on a GPU under compute-sanitizer."""
    monkeypatch.setattr(cuda_workload, "GPU", torch.device("cpu"))
    with Expansions() as expansions:
        cuda_workload.expand()
    for dtype in (E4M3, torch.bfloat16):
        for rows in (1, 129):
            assert ("expand_activation", dtype, rows, 0, rows) in expansions.seen
        # A tile of 8 rows alone, and as the last; with the rows that make it 16, and without.
        for rows, first, made in ((8, 0, 8), (8, 0, 16), (136, 0, 144), (1032, 1024, 16)):
            assert ("expand_weight", dtype, rows, first, made) in expansions.seen
        assert ("expand_weight", dtype, 1032, 256, 256) in expansions.seen  # a part


# ------------------------------------------------------------------ on a GPU

on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (8, 9),
    reason="needs a GPU of compute capability 8.x or 9.0",
)


def to_gpu(tensor: MXFP4Tensor) -> MXFP4Tensor:
    return MXFP4Tensor(tensor.codes.cuda(), tensor.scales.cuda())


@on_a_gpu
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
@pytest.mark.parametrize("k", [32, 96, 544, 4096, 28672])
def test_the_kernels_expand_what_the_cpu_does(k, dtype):
    for rows in (1, 33, 200):
        row_major = operand(rows, k, seed=rows, exponents=(95, 256))
        a = as_activation(row_major)
        op = torch.ops.duqpp_native.expand_activation
        for one, two in zip(
            op(a.codes.cuda(), a.scales.cuda(), dtype), op(*(a.codes, a.scales), dtype), strict=True
        ):
            oracle.assert_same(one.float(), two.float(), f"activations [{rows}, {k}]")
        n = 8 * rows
        b = prepared(operand(n, k, seed=rows, exponents=(95, 256)))
        op = torch.ops.duqpp_native.expand_weight
        for first in {0, n // 16 * 16 - (0 if n % 16 else 16)}:
            last = -(-n // 16) * 16
            for one, two in zip(
                op(b.codes.cuda(), b.scales.cuda(), first, last - first, dtype),
                op(b.codes, b.scales, first, last - first, dtype),
                strict=True,
            ):
                oracle.assert_same(one.float(), two.float(), f"weight [{n}, {k}] from {first}")


@on_a_gpu
@pytest.mark.parametrize("route", Route)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_on_a_gpu_are_within_the_bounds(route, out_dtype, with_bias):
    if route is not Route.BFLOAT16 and torch.cuda.get_device_capability() not in ((8, 9), (9, 0)):
        pytest.skip("this GPU has no FP8 tensor cores")
    if route is Route.CUBLASLT and large_gemm.route_on(torch.device("cuda")) is not route:
        pytest.skip("torch does not call cuBLASLt here")
    for m, n, k in ((65, 264, 160), (300, 1000, 4096), (1024, 4096, 4096)):
        a, b = operand(m, k, 30, (118, 128)), operand(n, k, 31, (118, 128))
        bias = inputs.gaussian(1, n, seed=32)[0].to(out_dtype) if with_bias else None
        out = large_gemm.large_gemm(
            to_gpu(as_activation(a)),
            to_gpu(prepared(b)),
            None if bias is None else bias.cuda(),
            out_dtype,
            route=route,
            workspace_bytes=1 << 20,
        )
        error = np.abs(out.cpu().double().numpy() - (expected := float64_product(a, b, bias)))
        s, rounding = magnitude(a, b), 2.0**-8 if out_dtype == torch.bfloat16 else 2.0**-11
        bound = s * (2.0**-22 * k if route is Route.BFLOAT16 else 2.0**-5)
        assert (error <= bound + rounding * (np.abs(expected) + bound)).all(), (m, n, k)
        rms = np.sqrt((error**2).mean() / (expected**2).mean())
        assert rms <= 2.0**-9 + rounding, f"{(m, n, k)}: {rms}"


@on_a_gpu
def test_a_captured_product_computes_anew_and_keeps_its_workspace():
    k, n = 4096, 4096
    b = to_gpu(prepared(operand(n, k, seed=33)))
    a = to_gpu(as_activation(operand(512, k, seed=34)))
    torch.cuda.reset_peak_memory_stats()
    before, bound = torch.cuda.memory_allocated(), 4 << 20
    large_gemm.large_gemm(a, b, workspace_bytes=bound)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    cublas = 64 << 20  # its own workspace, once, which torch allocates
    assert taken <= 512 * n * 2 + 512 * k * 2 + bound + cublas, taken
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = large_gemm.large_gemm(a, b, workspace_bytes=bound)
    for seed in (35, 36):
        a.codes.copy_(operand(512, k, seed).codes)
        graph.replay()
        expected = large_gemm.large_gemm(a, b, workspace_bytes=bound)
        torch.cuda.synchronize()
        oracle.assert_same(captured.cpu(), expected.cpu(), "replay")
