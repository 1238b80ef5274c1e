"""Smoothing scales against SmoothQuant's equation, and the maps of grouped-query attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duqpp.calibration.smoothing import (
    per_repeated_channel,
    per_source_channel,
    representable,
    smoothing_scales,
)
from tests import inputs, oracle


def amaxes(seed: int, k: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.rand(2, k, generator=inputs.generator(seed)) * 4 - 2
    return torch.exp(values[0]), torch.exp(values[1])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_equation_up_to_a_common_factor(alpha, seed):
    activation, weight = amaxes(seed)
    s = smoothing_scales(activation, weight, alpha)
    assert s.dtype == torch.float64
    direct = activation.double() ** alpha / weight.double() ** (1 - alpha)
    torch.testing.assert_close(s / s[0], direct / direct[0], rtol=1e-12, atol=0)
    assert float(s.log().mean().exp()) == pytest.approx(1, abs=1e-12), "geometric mean"


def test_alpha_1_makes_all_activation_peaks_equal_and_alpha_0_all_weight_peaks():
    activation, weight = amaxes(0)
    peaks = activation / smoothing_scales(activation, weight, 1.0)
    torch.testing.assert_close(peaks, peaks[0].expand(96), rtol=1e-12, atol=0)
    peaks = weight * smoothing_scales(activation, weight, 0.0)
    torch.testing.assert_close(peaks, peaks[0].expand(96), rtol=1e-12, atol=0)


def test_a_worked_example():
    s = smoothing_scales(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 1.0]), 0.5)
    assert s.tolist() == pytest.approx([2.0, 0.5])  # 4 and 1, over their geometric mean 2


def test_channels_that_are_never_used_keep_the_scale_1():
    activation, weight = amaxes(1, k=8)
    alone = smoothing_scales(activation[:6], weight[:6], 0.6)
    activation[6] = weight[7] = 0.0
    s = smoothing_scales(activation, weight, 0.6)
    assert s[6:].tolist() == [1.0, 1.0]
    torch.testing.assert_close(s[:6], alone, rtol=1e-12, atol=0)
    assert smoothing_scales(torch.zeros(4), torch.ones(4), 0.6).tolist() == [1.0] * 4


def test_scales_are_bounded():
    activation = torch.ones(32)
    activation[0], activation[1] = 1e30, 1e-30
    s = smoothing_scales(activation, torch.ones(32), 1.0)
    assert s[:2].tolist() == [2.0**7, 2.0**-7]
    assert s.isfinite().all()


@pytest.mark.parametrize(("kv_heads", "repeats", "head_dim"), [(2, 3, 4), (1, 4, 2), (5, 1, 8)])
def test_value_channels_map_to_their_query_heads(kv_heads, repeats, head_dim):
    """Head h reads value head h // repeats, as transformers' repeat_kv lays them out."""
    shared = torch.arange(1.0, kv_heads * head_dim + 1)
    repeated = per_repeated_channel(shared, repeats=repeats, head_dim=head_dim)
    value = shared.view(1, kv_heads, 1, head_dim)
    layout = value[:, :, None].expand(1, kv_heads, repeats, 1, head_dim).reshape(-1)
    oracle.assert_same(repeated, layout, "scales of o_proj's inputs")
    amax = torch.rand(kv_heads * repeats * head_dim, generator=inputs.generator(0))
    reduced = per_source_channel(amax, repeats=repeats, head_dim=head_dim)
    assert reduced.shape == shared.shape
    for kv in range(kv_heads):
        for d in range(head_dim):
            readers = [(kv * repeats + r) * head_dim + d for r in range(repeats)]
            assert reduced[kv * head_dim + d] == amax[readers].max()
    back = per_source_channel(repeated, repeats=repeats, head_dim=head_dim)
    oracle.assert_same(back, shared, "there and back")


def test_maps_agree_with_transformers_attention():
    from transformers.models.llama.modeling_llama import repeat_kv

    values = torch.randn(1, 2, 5, 16)  # batch, kv heads, tokens, head_dim
    attended = repeat_kv(values, 3).transpose(1, 2).reshape(5, -1)  # what o_proj reads
    scales = torch.rand(32, dtype=torch.float64) + 0.5
    scaled = values / scales.view(1, 2, 1, 16)
    expected = repeat_kv(scaled, 3).transpose(1, 2).reshape(5, -1)
    mapped = per_repeated_channel(scales, repeats=3, head_dim=16)
    torch.testing.assert_close(attended / mapped, expected)


# representable: s is nudged so that dividing what is stored by it rounds nothing.

DTYPES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 10_000))
def test_stored_divided_by_scales_is_exact(dtype, seed):
    stored = inputs.gaussian(1, 64, seed)[0].to(dtype)
    stored[stored.abs() < 1e-3] = 0.25
    scales = torch.exp(torch.randn(64, generator=inputs.generator(seed + 1), dtype=torch.float64))
    nudged = representable(scales, stored)
    assert nudged.dtype == torch.float64
    divided = (stored.double() / nudged).to(dtype)
    # Float64 holds stored / nudged to 2**-53: the value of dtype that it means is within that.
    torch.testing.assert_close(divided.double() * nudged, stored.double(), rtol=2.0**-52, atol=0)
    assert ((nudged / scales - 1).abs() <= DTYPES[dtype] * 1.01).all()


def test_scales_stay_where_nothing_is_stored():
    scales = torch.tensor([2.0, 3.0], dtype=torch.float64)
    nudged = representable(scales, torch.tensor([0.0, -0.0]).bfloat16())
    assert nudged.tolist() == [2.0, 3.0]


def test_powers_of_two_need_no_nudge():
    scales = torch.exp2(torch.arange(-3.0, 4.0)).double()
    stored = inputs.gaussian(1, 7, seed=0)[0].bfloat16()
    oracle.assert_same(representable(scales, stored), scales, "scales")


@pytest.mark.parametrize(("value", "scale"), [(60000.0, 2.0**-7), (6e-8, 2.0**7)])
def test_what_float16_cannot_hold_divided_is_left_undivided(value, scale):
    """Overflow to infinity, or a channel that vanishes: the model's function would change."""
    stored = torch.tensor([value, 1.0]).half()
    nudged = representable(torch.tensor([scale, 2.0], dtype=torch.float64), stored)
    assert nudged.tolist() == [1.0, 2.0]
