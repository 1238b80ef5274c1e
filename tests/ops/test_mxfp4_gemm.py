"""mxfp4_gemm: where every partial sum is exact, the float64 result rounded once; else a bound."""

import numpy as np
import pytest
import torch

from duqpp.format import MXFP4Tensor
from duqpp.ops import mxfp4_gemm, prepare_weight
from tests import inputs, oracle
from tests.ops.backends import BACKENDS, as_activation

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def operands(m: int, n: int, k: int, seed: int) -> tuple[MXFP4Tensor, MXFP4Tensor]:
    """Operands whose products sum exactly in float32, in any order."""
    a, b = inputs.mxfp4_operand(m, k, seed), inputs.mxfp4_operand(n, k, seed + 100)
    return MXFP4Tensor(*a), MXFP4Tensor(*b)


def exact_product(a: MXFP4Tensor, b: MXFP4Tensor) -> np.ndarray:
    return oracle.dequantize(a.codes, a.scales) @ oracle.dequantize(b.codes, b.scales).T


# `+ 0` makes -0 into 0: a sum that is zero may have either sign.


def round_once(exact: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Float64 values that float32 holds exactly, rounded to dtype."""
    single = torch.from_numpy(exact).float()
    assert (single.double() == torch.from_numpy(exact)).all(), "the test's values must be exact"
    return single.to(dtype)


def run(a, b, bias=None, *, out_dtype, backend):
    """The op on row-major operands, brought into the backend's layouts first."""
    a, b = as_activation(a, backend), prepare_weight(b, backend=backend)
    y = mxfp4_gemm(a, b, bias, out_dtype=out_dtype, backend=backend)
    assert y.dtype == out_dtype
    return y


@pytest.mark.parametrize("m", inputs.AWKWARD_ROWS)
@pytest.mark.parametrize("k", inputs.AWKWARD_K)
@pytest.mark.parametrize("n", [8, 72])
def test_awkward_shapes_equal_float64(m, k, n, backend):
    a, b = operands(m, n, k, seed=m + k)
    y = run(a, b, out_dtype=torch.float32, backend=backend)
    expected = round_once(exact_product(a, b), torch.float32)
    oracle.assert_same(y + 0, expected + 0, f"{backend}, [{m}, {k}] x [{n}, {k}]")


def test_longest_k_of_llama_3(backend):
    a, b = operands(3, 8, 14336, seed=0)
    expected = round_once(exact_product(a, b), torch.float32)
    oracle.assert_same(run(a, b, out_dtype=torch.float32, backend=backend) + 0, expected + 0, "y")


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_output_is_rounded_once(out_dtype, bias_dtype, backend):
    a, b = operands(33, 40, 96, seed=1)
    exact, bias = exact_product(a, b), None
    if bias_dtype is not None:
        # Quarters, like the products: nothing rounds before the end, if the end is one rounding.
        bias = (inputs.small_integers(1, 40, seed=2, limit=255)[0] / 4).to(bias_dtype)
        exact = exact + bias.double().numpy()
    y = run(a, b, bias, out_dtype=out_dtype, backend=backend)
    expected = round_once(exact, out_dtype)
    oracle.assert_same(y + 0, expected + 0, f"{backend}, bias {bias_dtype}, to {out_dtype}")
    if bias_dtype is not None and out_dtype == torch.bfloat16:
        twice = round_once(exact_product(a, b), out_dtype) + bias.to(out_dtype)
        assert (twice != expected).any(), "rounding twice must show in this test"


def test_worked_example(backend):
    # Row of a: 6 times 2**1 in block 0, 1 times 2**-2 in block 1. Row of b: -1.5 * 2**0, 4 * 2**3.
    def row(first: int, second: int, scales: list[int]) -> MXFP4Tensor:
        codes = torch.zeros(1, 64, dtype=torch.uint8)
        codes[0, 5], codes[0, 40] = first, second
        return MXFP4Tensor(torch.from_numpy(oracle.pack(codes)), torch.tensor([scales]).byte())

    a, b = row(7, 2, [128, 125]), row(8 + 3, 6, [127, 130])
    bias = torch.tensor([0.5])
    y = run(a, b, bias, out_dtype=torch.float32, backend=backend)
    assert y.tolist() == [[12 * -1.5 + 0.25 * 32 + 0.5]]


def test_wide_scales_stay_within_the_bound_of_a_float32_sum(backend):
    m, n, k = 31, 24, 4096
    scales = torch.randint(100, 150, (m + n, k // 32), generator=inputs.generator(3)).byte()
    codes = torch.randint(0, 256, (m + n, k // 2), generator=inputs.generator(4)).byte()
    a, b = MXFP4Tensor(codes[:m], scales[:m]), MXFP4Tensor(codes[m:], scales[m:])
    y = run(a, b, out_dtype=torch.float32, backend=backend)
    exact = torch.from_numpy(exact_product(a, b))
    size = torch.from_numpy(
        np.abs(oracle.dequantize(a.codes, a.scales))
        @ np.abs(oracle.dequantize(b.codes, b.scales)).T
    )
    # K additions, in any order, each off by at most 2**-24 of a partial sum.
    assert ((y.double() - exact).abs() <= size * k * 2.0**-24).all()
    correctly_rounded = torch.from_numpy(oracle.gemm(a.codes[:2], a.scales[:2], b.codes, b.scales))
    assert torch.allclose(exact[:2], correctly_rounded, rtol=1e-9, atol=0), "the test's own exact"


def in_order(a: MXFP4Tensor, b: MXFP4Tensor) -> np.ndarray:
    return oracle.gemm_in_order(*(t.numpy() for t in (a.codes, a.scales, b.codes, b.scales)))


def test_a_block_that_sums_to_zero_takes_nothing_from_others(backend):
    """0.5 * 0.5 * 2**-4 in block 0, and in block 1 products of 36 * 2**20 that cancel."""
    codes = torch.zeros(2, 64, dtype=torch.uint8)
    codes[:, 3] = 1
    codes[0, 40] = codes[0, 41] = codes[1, 40] = 7
    codes[1, 41] = 15
    packed = torch.from_numpy(oracle.pack(codes))
    a = MXFP4Tensor(packed[:1], torch.tensor([[123, 147]]).byte())
    b = MXFP4Tensor(packed[1:], torch.tensor([[127, 127]]).byte())
    assert run(a, b, out_dtype=torch.float32, backend=backend).tolist() == [[2.0**-6]]


@pytest.mark.parametrize("blocks", [1, 3, 18])
def test_every_scale_byte_is_added_in_order(blocks, backend):
    """Bit by bit, over- and underflow of float32 included: what kernels and reference share."""
    draw = inputs.generator(blocks)
    m, n = 255, 9
    codes = torch.randint(0, 256, (m + n, blocks * 16), generator=draw).byte()
    scales = torch.arange(m)[:, None] + torch.randint(-30, 31, (m, blocks), generator=draw)
    middles = torch.tensor([0, 1, 2, 60, 127, 128, 200, 253, 254])[:, None]
    near = middles + torch.randint(-2, 3, (n, blocks), generator=draw)
    scales[:, 0], near[:, 0] = torch.arange(m), middles[:, 0]
    a = MXFP4Tensor(codes[:m], scales.clamp(0, 254).byte())
    b = MXFP4Tensor(codes[m:], near.clamp(0, 254).byte())
    y = run(a, b, out_dtype=torch.float32, backend=backend)
    oracle.assert_same(y + 0, torch.from_numpy(in_order(a, b)).float() + 0, backend)


@pytest.mark.parametrize("spread", [0, 10, 40])
def test_long_sums_are_added_in_order(spread, backend):
    """Over segments, with cancellation, and with scales some octaves apart."""
    draw = inputs.generator(spread)
    m, n, blocks = 5, 8, 67
    scales = torch.randint(127 - spread, 128 + spread, (m + n, blocks), generator=draw).byte()
    codes = torch.randint(0, 256, (m + n, blocks * 16), generator=draw).byte()
    a, b = MXFP4Tensor(codes[:m], scales[:m]), MXFP4Tensor(codes[m:], scales[m:])
    y = run(a, b, out_dtype=torch.float32, backend=backend)
    oracle.assert_same(y + 0, torch.from_numpy(in_order(a, b)).float() + 0, backend)


def test_scale_255_makes_its_row_or_column_nan_and_no_other(backend):
    a, b = operands(5, 8, 96, seed=5)
    a.scales[3, 1] = 255
    b.scales[6, 2] = 255
    y = run(a, b, out_dtype=torch.bfloat16, backend=backend)
    expected = torch.zeros(5, 8, dtype=torch.bool)
    expected[3] = expected[:, 6] = True
    oracle.assert_same(y.isnan(), expected, "NaN")


def test_arguments_are_left_as_they_were(backend):
    a, b = operands(5, 8, 96, seed=6)
    bias = torch.ones(8)
    kept = [t.clone() for t in (a.codes, a.scales, b.codes, b.scales, bias)]
    run(a, b, bias, out_dtype=torch.float32, backend=backend).zero_()
    for tensor, copy in zip((a.codes, a.scales, b.codes, b.scales, bias), kept, strict=True):
        oracle.assert_same(tensor, copy, "argument")


# Argument errors: the smallest input that triggers each message.


def zeros(rows: int, k: int) -> MXFP4Tensor:
    codes = torch.zeros(rows, k // 2, dtype=torch.uint8)
    return MXFP4Tensor(codes, torch.zeros(rows, k // 32, dtype=torch.uint8))


def error_of(a, b, bias=None, *, out_dtype=torch.float32, backend) -> str:
    with pytest.raises(ValueError) as error:
        mxfp4_gemm(a, b, bias, out_dtype=out_dtype, backend=backend)
    return str(error.value)


def test_codes_must_be_packed_bytes(backend):
    good = zeros(2, 64)
    wrong_dtype = MXFP4Tensor(torch.zeros(2, 32), good.scales)
    assert error_of(wrong_dtype, good, backend=backend) == (
        "mxfp4_gemm: a.codes must be uint8 [rows, K/2], got torch.float32 [2, 32]"
    )
    wrong_shape = MXFP4Tensor(torch.zeros(1, 2, 32).byte(), good.scales)
    assert error_of(good, wrong_shape, backend=backend) == (
        "mxfp4_gemm: b.codes must be uint8 [rows, K/2], got torch.uint8 [1, 2, 32]"
    )


@pytest.mark.parametrize("columns", [0, 8, 17])
def test_k_must_be_a_multiple_of_32(columns, backend):
    odd = MXFP4Tensor(torch.zeros(2, columns).byte(), torch.zeros(2, 1).byte())
    assert error_of(odd, odd, backend=backend) == (
        f"mxfp4_gemm: a.codes must be uint8 [rows, K/2], K a multiple of 32, got [2, {columns}]"
    )


def test_scales_must_be_bytes(backend):
    bad = MXFP4Tensor(zeros(2, 64).codes, torch.ones(2, 2))
    assert error_of(zeros(2, 64), bad, backend=backend) == (
        "mxfp4_gemm: b.scales must be uint8, got torch.float32"
    )


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (1, 1), (0, 2)])
def test_a_scale_must_not_serve_two_blocks(shape, backend):
    # Shapes that plain torch would broadcast: a wrong result, and no error.
    bad = MXFP4Tensor(zeros(2, 64).codes, torch.zeros(shape).byte())
    assert error_of(bad, zeros(8, 64), backend=backend) == (
        f"mxfp4_gemm: a.scales must hold 4 blocks' scales, got {list(shape)}"
    )


@pytest.mark.parametrize("place", ["a.scales", "b.codes", "b.scales", "bias"])
def test_operands_must_be_on_one_device(place, backend):
    tensors = {
        "a.codes": zeros(2, 64).codes,
        "a.scales": zeros(2, 64).scales,
        "b.codes": zeros(8, 64).codes,
        "b.scales": zeros(8, 64).scales,
        "bias": torch.zeros(8),
    }
    tensors[place] = tensors[place].to("meta")
    a, b = (MXFP4Tensor(tensors[f"{x}.codes"], tensors[f"{x}.scales"]) for x in "ab")
    assert error_of(a, b, tensors["bias"], backend=backend) == (
        f"mxfp4_gemm: a.codes and {place} must be on one device, got cpu and meta"
    )


def test_k_must_agree(backend):
    assert error_of(zeros(2, 64), zeros(2, 96), backend=backend) == (
        "mxfp4_gemm: a has K = 64 but b has K = 96"
    )


@pytest.mark.parametrize(
    "bias", [torch.zeros(1), torch.zeros(1, 2), torch.zeros(2).int(), torch.zeros(2).double()]
)
def test_bias_must_fit(bias, backend):
    assert error_of(zeros(1, 32), zeros(2, 32), bias, backend=backend) == (
        "mxfp4_gemm: bias must be bfloat16, float16 or float32 [2], "
        f"got {bias.dtype} {list(bias.shape)}"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8])
def test_out_dtype_must_be_one_that_models_compute_in(dtype, backend):
    assert error_of(zeros(1, 32), zeros(2, 32), out_dtype=dtype, backend=backend) == (
        f"mxfp4_gemm: out_dtype must be bfloat16, float16 or float32, got {dtype}"
    )
