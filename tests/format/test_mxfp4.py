"""quantize and dequantize: hand-checked blocks, the oracle on troublesome inputs, properties."""

import dataclasses
import json
from pathlib import Path

import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from duqpp.format.e2m1 import unpack_e2m1
from duqpp.format.e8m0 import ScaleRule
from duqpp.format.mxfp4 import BLOCK_SIZE, MXFP4Tensor, dequantize, quantize
from tests import inputs, oracle

RULES = list(ScaleRule)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "blocks.json").read_text())["blocks"]

INPUTS = {
    "gaussian": inputs.gaussian,
    "outliers": inputs.outliers,
    "small integers": inputs.small_integers,
    "all magnitudes": inputs.all_magnitudes,
    "subnormals": inputs.subnormals,
    "grid and ties": inputs.grid_and_ties,
    "zero blocks": inputs.zero_blocks,
}


def assert_quantizes_like_the_oracle(x: torch.Tensor, rule: ScaleRule, what: str) -> None:
    """Compare scales and codes byte for byte; codes only where the scale is not NaN."""
    quantized = quantize(x, rule=rule)
    codes, scales = (torch.from_numpy(part) for part in oracle.quantize(x, rule.value))
    assert quantized.codes.dtype == quantized.scales.dtype == torch.uint8
    oracle.assert_same(quantized.scales, scales, f"scales, {rule}, {what}")
    known = (scales != 255).repeat_interleave(BLOCK_SIZE // 2, dim=-1)
    oracle.assert_same(quantized.codes * known, codes * known, f"codes, {rule}, {what}")


def parse(number: str) -> float:
    return float.fromhex(number) if "x" in number else float(number)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", GOLDEN, ids=[block["name"] for block in GOLDEN])
def test_golden_blocks(block, rule):
    x = torch.tensor([[parse(number) for number in block["values"]]])
    expected = block["expected"][rule.value]
    quantized = quantize(x, rule=rule)
    oracle_codes, oracle_scales = oracle.quantize(x, rule.value)
    assert quantized.scales.tolist() == [[expected["scale"]]]
    assert oracle_scales.tolist() == [[expected["scale"]]]
    if expected["codes"] is None:
        assert dequantize(quantized).isnan().all()
    else:
        assert bytes(quantized.codes[0].tolist()).hex() == expected["codes"]
        assert bytes(oracle_codes[0].tolist()).hex() == expected["codes"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_oracle(make, rule, seed):
    assert_quantizes_like_the_oracle(make(40, 160, seed), rule, f"{make.__name__} seed {seed}")


@pytest.mark.parametrize("rule", RULES)
def test_every_bfloat16(rule):
    x = inputs.all_bfloat16()
    # Neighbours in a block, and scattered so that a block spans many exponents.
    order = torch.randperm(65536, generator=inputs.generator(0))
    assert_quantizes_like_the_oracle(x.view(2048, 32), rule, "bfloat16 in order")
    finite = torch.where(x.isfinite(), x, torch.zeros((), dtype=x.dtype))
    assert_quantizes_like_the_oracle(finite[order].view(2048, 32), rule, "bfloat16 scattered")


@pytest.mark.parametrize("rule", RULES)
def test_amax_across_bfloat16_with_a_filled_block(rule):
    amax = inputs.all_bfloat16()[1:32640:5].float()[:, None]  # positive and finite
    fraction = torch.rand(len(amax), 32, generator=inputs.generator(0)) * 2 - 1
    fraction[:, 7] = 1
    assert_quantizes_like_the_oracle(amax * fraction, rule, "fractions of every amax")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", inputs.AWKWARD_ROWS)
@pytest.mark.parametrize("k", inputs.AWKWARD_K[:3])
def test_awkward_shapes(rows, k, rule):
    x = inputs.outliers(rows, k, seed=rows + k)
    quantized = quantize(x, rule=rule)
    assert quantized.codes.shape == (rows, k // 2)
    assert quantized.scales.shape == (rows, k // 32)
    assert quantized.shape == dequantize(quantized).shape == (rows, k)
    if rows:
        sample = x[-128:]
        assert_quantizes_like_the_oracle(sample, rule, f"last rows of {rows} x {k}")
        oracle.assert_same(quantize(sample, rule=rule).codes, quantized.codes[-128:], "same rows")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(32,), (4096,), (2, 3, 64), (0, 5, 32), (3, 0)])
def test_leading_dimensions(shape, rule):
    x = torch.randn(shape, generator=inputs.generator(3))
    quantized = quantize(x, rule=rule)
    assert quantized.shape == x.shape
    assert dequantize(quantized).shape == x.shape
    if x.numel():
        assert_quantizes_like_the_oracle(x, rule, f"shape {shape}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype, rule):
    x = inputs.outliers(16, 96, seed=5).to(dtype)
    before = x.clone()
    assert_quantizes_like_the_oracle(x, rule, str(dtype))
    oracle.assert_same(x, before, "x")


@pytest.mark.parametrize("rule", RULES)
def test_strides_do_not_matter(rule):
    x = inputs.outliers(64, 96, seed=6)
    for view in (x.T, x[::3, 32:], x.view(64, 3, 32).transpose(0, 1), x[:1].expand(5, 96)):
        strided, contiguous = quantize(view, rule=rule), quantize(view.contiguous(), rule=rule)
        oracle.assert_same(strided.codes, contiguous.codes, f"codes {view.stride()}")
        oracle.assert_same(strided.scales, contiguous.scales, f"scales {view.stride()}")
        oracle.assert_same(dequantize(strided), dequantize(contiguous), f"values {view.stride()}")


@pytest.mark.parametrize("rule", RULES)
def test_input_is_left_as_it_was(rule):
    x, _ = inputs.nonfinite(8, 64, seed=0)
    before = x.clone()
    quantize(x, rule=rule)
    oracle.assert_same(x, before, "x")


@pytest.mark.parametrize("rule", RULES)
def test_tensors_that_require_a_gradient(rule):
    x = inputs.outliers(8, 64, seed=1)
    quantized = quantize(x.clone().requires_grad_(), rule=rule)
    oracle.assert_same(quantized.codes, quantize(x, rule=rule).codes, "codes")
    oracle.assert_same(quantized.scales, quantize(x, rule=rule).scales, "scales")


@pytest.mark.parametrize("rule", RULES)
def test_infinity_and_nan_make_their_block_nan_and_no_other(rule):
    x, poisoned = inputs.nonfinite(100, 96, seed=2)
    quantized = quantize(x, rule=rule)
    oracle.assert_same(quantized.scales == 255, poisoned, "blocks with scale 255")
    nan = poisoned.repeat_interleave(32, dim=-1)
    values = dequantize(quantized)
    oracle.assert_same(values.isnan(), nan, "NaN values")
    clean = dequantize(quantize(torch.where(nan, torch.zeros(()), x), rule=rule))
    oracle.assert_same(values[~nan], clean[~nan], "values of the other blocks")


@pytest.mark.parametrize("rule", RULES)
def test_zero_blocks(rule):
    quantized = quantize(torch.zeros(3, 64), rule=rule)
    assert not quantized.codes.any()
    assert not quantized.scales.any()
    oracle.assert_same(dequantize(quantized), torch.zeros(3, 64), "zeros")


def test_dequantize_every_code_under_every_scale():
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    values = dequantize(MXFP4Tensor(codes, scales))
    exact = torch.from_numpy(oracle.dequantize(codes, scales))
    assert values.dtype == torch.float32
    oracle.assert_same(values, exact.float(), "dequantize")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        result = dequantize(MXFP4Tensor(codes, scales), dtype)
        assert result.dtype == dtype
        oracle.assert_same(result, exact.float().to(dtype), f"dequantize to {dtype}")
    finite = exact.float().isfinite()
    oracle.assert_same(
        dequantize(MXFP4Tensor(codes, scales), torch.bfloat16).double()[finite],
        exact[finite],
        "bfloat16 holds every finite value exactly",
    )


# Properties. Blocks are drawn from the grid and its ties and from float32 up to 2**100 in magnitude
# (above 1.75 * 2**127 a rounded value may exceed float32).


def _blocks(*elements: st.SearchStrategy[float]) -> st.SearchStrategy[torch.Tensor]:
    arrays = numpy_strategies.arrays(
        np.float32, (2, 32), elements=st.one_of(*elements), fill=st.nothing()
    )
    return arrays.map(torch.from_numpy)


_GRID = [sign * v for v in inputs.E2M1_MAGNITUDES + inputs.E2M1_TIES for sign in (1, -1)]
BLOCKS = _blocks(
    st.sampled_from(_GRID),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-8, 8, width=32),
)
# Zero, or far enough from both ends of float32 to be multiplied by 2**-40 to 2**40.
MIDDLE_BLOCKS = _blocks(
    st.just(0.0), st.floats(2.0**-60, 2.0**60, width=32), st.floats(-8, -0.125, width=32)
)


@given(BLOCKS, st.sampled_from(RULES))
def test_drawn_blocks_equal_the_oracle(x, rule):
    assert_quantizes_like_the_oracle(x, rule, "drawn blocks")


@given(BLOCKS, st.sampled_from(RULES), st.sampled_from(RULES))
def test_quantizing_a_dequantized_tensor_changes_no_value(x, first, second):
    values = dequantize(quantize(x, rule=first))
    again = dequantize(quantize(values, rule=second))
    oracle.assert_same(again, values, f"{first} then {second}")


@given(MIDDLE_BLOCKS, st.integers(-40, 40), st.sampled_from(RULES))
def test_scaling_by_a_power_of_two_moves_only_exponents(x, power, rule):
    plain, scaled = quantize(x, rule=rule), quantize(x * 2.0**power, rule=rule)
    oracle.assert_same(scaled.codes, plain.codes, "codes")
    zero = (x == 0).all(-1, keepdim=True)
    oracle.assert_same(scaled.scales, torch.where(zero, 0, plain.scales.int() + power), "scales")


@given(BLOCKS, st.sampled_from(RULES))
def test_negation_flips_only_signs(x, rule):
    plain, negated = quantize(x, rule=rule), quantize(-x, rule=rule)
    oracle.assert_same(negated.codes, plain.codes ^ 0x88, "codes")
    oracle.assert_same(negated.scales, plain.scales, "scales")


@given(BLOCKS, st.permutations(range(32)), st.sampled_from(RULES))
def test_permutation_inside_a_block_permutes_codes(x, order, rule):
    plain, permuted = quantize(x, rule=rule), quantize(x[:, order], rule=rule)
    oracle.assert_same(unpack_e2m1(permuted.codes), unpack_e2m1(plain.codes)[:, order], "codes")
    oracle.assert_same(permuted.scales, plain.scales, "scales")


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_mse_is_the_least_error_of_floor_and_the_exponent_above(make):
    x = make(30, 160, 9)
    blocks = x.view(30, 5, 32)
    floor = quantize(x, rule=ScaleRule.FLOOR).scales
    at_floor = oracle.squared_error(blocks, oracle.round_block(blocks, floor))
    above = oracle.squared_error(blocks, oracle.round_block(blocks, floor + 1))
    chosen = quantize(x, rule=ScaleRule.MSE)
    error = oracle.squared_error(blocks, oracle.dequantize(*_parts(chosen)).reshape(30, 5, 32))
    assert (error == np.minimum(at_floor, above)).all()
    expected = floor + torch.from_numpy((above < at_floor).astype(np.uint8))
    oracle.assert_same(chosen.scales, expected, "scales: floor wherever the errors are equal")
    for rule in (ScaleRule.EVEN, ScaleRule.CEIL):
        other = oracle.dequantize(*_parts(quantize(x, rule=rule))).reshape(30, 5, 32)
        assert (error <= oracle.squared_error(blocks, other)).all(), rule


def test_mse_takes_floor_on_exact_ties_in_any_order():
    x = inputs.mse_ties(500, seed=0)
    floor, chosen = quantize(x, rule=ScaleRule.FLOOR), quantize(x, rule=ScaleRule.MSE)
    oracle.assert_same(chosen.scales, floor.scales, "scales of exact ties")


@pytest.mark.parametrize(
    ("moved", "ulps", "steps_up"),
    [
        (7.5, -1, 0),  # closer to 6
        (7.5, 1, 1),  # closer to 8, which the exponent above has
        (0.5, -1, 1),  # less to lose as 0
        (0.5, 1, 1),  # becomes 1 and not 0 above, and is closer to it
    ],
)
def test_mse_tells_an_ulp_from_a_tie(moved, ulps, steps_up):
    x = inputs.mse_ties(500, seed=1)
    amax = x.abs().amax(-1, keepdim=True)
    place = (x.abs() == amax * (moved / 7.5)).int().argmax(-1, keepdim=True)  # the first such value
    x.scatter_(-1, place, (x.gather(-1, place).view(torch.int32) + ulps).view(torch.float32))
    floor, chosen = quantize(x, rule=ScaleRule.FLOOR), quantize(x, rule=ScaleRule.MSE)
    what = f"{moved} moved by {ulps} ulp"
    oracle.assert_same(chosen.scales, floor.scales + steps_up, f"scales, {what}")
    assert_quantizes_like_the_oracle(x, ScaleRule.MSE, what)


def _parts(quantized: MXFP4Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantized.codes, quantized.scales


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 16, 31, 33, 4112])
def test_k_must_be_a_multiple_of_32(k, rule):
    with pytest.raises(ValueError, match=rf"^quantize: .*32.*{k}"):
        quantize(torch.zeros(2, k), rule=rule)


def test_mxfp4_tensor_is_frozen_and_knows_its_logical_shape():
    tensor = MXFP4Tensor(torch.zeros(2, 3, 48).byte(), torch.zeros(2, 3, 3).byte())
    assert tensor.shape == torch.Size((2, 3, 96))
    with pytest.raises(dataclasses.FrozenInstanceError):
        tensor.codes = tensor.scales
