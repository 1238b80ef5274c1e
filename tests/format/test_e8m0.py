"""E8M0 decode and the scale rules: every byte, every bfloat16 amax, every threshold."""

import pytest
import torch

from duqpp.format.e8m0 import ScaleRule, decode_e8m0, inverse_scale, scale_exponent
from tests import inputs, oracle

AMAX_RULES = [ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.CEIL]
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def test_decode_every_byte():
    values = decode_e8m0(ALL_BYTES)
    assert values.dtype == torch.float32
    oracle.assert_same(values, oracle.decode_e8m0(ALL_BYTES), "decode_e8m0")
    assert values[0].item() == 2.0**-127  # a float32 subnormal: not flushed to zero
    assert values[127].item() == 1.0
    assert values[255].isnan()


def test_inverse_scale_times_scale_is_one():
    scales = ALL_BYTES[:254]
    product = inverse_scale(scales).double() * torch.from_numpy(oracle.decode_e8m0(scales))
    oracle.assert_same(product, torch.ones(254), "inverse_scale * scale")
    assert inverse_scale(ALL_BYTES).isfinite().all()


def test_rule_names():
    assert {rule.value for rule in ScaleRule} == {"floor", "even", "ceil", "mse"}
    assert ScaleRule("even") is ScaleRule.EVEN


@pytest.mark.parametrize("rule", AMAX_RULES)
def test_every_bfloat16_amax(rule):
    amax = inputs.all_bfloat16()[:32768].float()  # the bits without a sign: 0 to NaN
    exponent = scale_exponent(amax, rule)
    assert exponent.dtype == torch.uint8
    oracle.assert_same(exponent, oracle.scale_exponent(amax, rule), f"scale_exponent {rule}")


@pytest.mark.parametrize("rule", AMAX_RULES)
@pytest.mark.parametrize("significand", [1.0, 1.5, 1.75])
def test_around_every_threshold(rule, significand):
    # Where the exponent steps: 2**k (floor), 1.75 * 2**k (even), just above 1.5 * 2**k (ceil).
    powers = significand * torch.exp2(torch.arange(-147, 128).double())
    amax = inputs.neighbours(powers, 2)
    what = f"scale_exponent {rule} around {significand} * 2**k"
    oracle.assert_same(scale_exponent(amax, rule), oracle.scale_exponent(amax, rule), what)


@pytest.mark.parametrize("rule", AMAX_RULES)
def test_across_all_of_float32(rule):
    bits = torch.arange(0, 0x7F800001, 8191)
    amax = bits.int().view(torch.float32)
    oracle.assert_same(
        scale_exponent(amax, rule), oracle.scale_exponent(amax, rule), f"scale_exponent {rule}"
    )


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [(ScaleRule.FLOOR, 4, 8), (ScaleRule.EVEN, 3.5, 7), (ScaleRule.CEIL, 3, 6)],
)
def test_amax_over_scale_lies_where_the_rule_says(rule, low, high):
    amax = inputs.all_bfloat16()[:32640].double()  # finite
    amax = amax[amax >= 2.0**-124]  # below, the exponent is clamped at 0
    scale = torch.from_numpy(oracle.decode_e8m0(scale_exponent(amax.float(), rule)))
    ratio = amax / scale
    if rule is ScaleRule.CEIL:
        assert ((ratio > low) & (ratio <= high)).all()
    else:
        assert ((ratio >= low) & (ratio < high)).all()


@pytest.mark.parametrize("rule", AMAX_RULES)
@pytest.mark.parametrize(
    ("amax", "exponent"),
    [(0.0, 0), (2.0**-149, 0), (float("inf"), 255), (float("nan"), 255), (4.0, 127), (6.0, 127)],
)
def test_special_amax(rule, amax, exponent):
    assert scale_exponent(torch.tensor(amax), rule).item() == exponent


def test_worked_thresholds():
    amax = torch.tensor([6.0, 6.0000005, 6.9999995, 7.0, 7.9999995])
    oracle.assert_same(scale_exponent(amax, ScaleRule.FLOOR), [127] * 5, "floor")
    oracle.assert_same(scale_exponent(amax, ScaleRule.EVEN), [127] * 3 + [128] * 2, "even")
    oracle.assert_same(scale_exponent(amax, ScaleRule.CEIL), [127] + [128] * 4, "ceil")


def test_mse_needs_the_values_of_the_block():
    with pytest.raises(ValueError, match=r"^scale_exponent: .*mse"):
        scale_exponent(torch.ones(1), ScaleRule.MSE)


def test_amax_is_left_as_it_was():
    amax = torch.tensor([0.0, 3.0, float("inf"), float("nan")])
    before = amax.clone()
    for rule in AMAX_RULES:
        scale_exponent(amax, rule)
    oracle.assert_same(amax, before, "amax")
