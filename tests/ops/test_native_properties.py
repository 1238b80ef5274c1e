"""The CPU kernels on shapes and contents that hypothesis draws."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duqpp.format import MXFP4Tensor, ScaleRule, quantize
from duqpp.ops import mxfp4_gemm, prepare_weight, restore_weight, rotate_quantize
from duqpp.ops.gptq_block import gptq_block
from duqpp.ops.native import CpuBackend
from tests import inputs, oracle

shapes = st.tuples(st.integers(0, 40), st.integers(1, 70), st.integers(1, 36))  # M, N, K / 32
seeds = st.integers(0, 2**32 - 1)
bounded = settings(max_examples=60, deadline=None, derandomize=True)


def operand(rows: int, blocks: int, generator, lowest: int, highest: int) -> MXFP4Tensor:
    codes = torch.randint(0, 256, (rows, blocks * 16), generator=generator).byte()
    scales = torch.randint(lowest, highest + 1, (rows, blocks), generator=generator).byte()
    return MXFP4Tensor(codes, scales)


def in_block_order(a: MXFP4Tensor, b: MXFP4Tensor) -> np.ndarray:
    """The definition: exact block products, added in float32, rounded each time: the 16 blocks of a
    segment in order, then the segments in order.

    In float64 each addition is exact before it is rounded, while exponents are within 2**29.
    """
    x, w = oracle.dequantize(a.codes, a.scales), oracle.dequantize(b.codes, b.scales)
    total = np.zeros((len(x), len(w)), dtype=np.float32)
    for segment in range(0, x.shape[1], 512):
        sums = np.zeros_like(total)
        for first in range(segment, min(segment + 512, x.shape[1]), 32):
            block = x[:, first : first + 32] @ w[:, first : first + 32].T
            sums = (sums.astype(np.float64) + block).astype(np.float32)
        total += sums
    return total


@bounded
@given(shapes, seeds, st.integers(0, 230), st.integers(0, 24))
def test_gemm_is_the_sum_over_blocks_in_order(shape, seed, lowest, spread):
    m, n, blocks = shape
    generator = inputs.generator(seed)
    a = operand(m, blocks, generator, lowest, lowest + spread)
    b = operand(n, blocks, generator, 250 - lowest, 250 - lowest + min(spread, 4))
    prepared = prepare_weight(b, backend="cpu")
    y = mxfp4_gemm(a, prepared, out_dtype=torch.float32, backend="cpu")
    oracle.assert_same(y + 0, torch.from_numpy(in_block_order(a, b)) + 0, f"{shape}, {lowest}")


@bounded
@given(shapes, seeds)
def test_a_weight_survives_preparation(shape, seed):
    _, n, blocks = shape
    weight = operand(n, blocks, inputs.generator(seed), 0, 255)
    restored = restore_weight(prepare_weight(weight, backend="cpu"), backend="cpu")
    oracle.assert_same(restored.codes, weight.codes, "codes")
    oracle.assert_same(restored.scales, weight.scales, "scales")


@bounded
@given(shapes, seeds, st.sampled_from(list(ScaleRule)), st.integers(-140, 120))
def test_rounding_is_that_of_the_format(shape, seed, rule, exponent):
    """Without a rotation: any float32 values, from subnormal to huge, byte for byte."""
    rows, _, blocks = shape
    x = torch.randn(rows, blocks * 32, generator=inputs.generator(seed)) * 2.0**exponent
    expected, actual = quantize(x, rule=rule), rotate_quantize(x, None, rule=rule, backend="cpu")
    oracle.assert_same(actual.scales, expected.scales, "scales")
    oracle.assert_same(actual.codes, expected.codes, "codes")


@bounded
@given(shapes, seeds, st.booleans())
def test_rotation_of_integers_is_exact(shape, seed, per_block):
    rows, _, blocks = shape
    generator = inputs.generator(seed)
    x = torch.randint(-8, 9, (rows, blocks * 32), generator=generator).float()
    count = blocks if per_block else 1
    r = torch.randint(-3, 4, (count, 32, 32), generator=generator).bfloat16()
    expanded = r.float().expand(blocks, 32, 32)
    exact = torch.einsum("mbk,bkn->mbn", x.view(rows, blocks, 32), expanded).flatten(1)
    expected = quantize(exact, rule=ScaleRule.EVEN)
    rotation = r if per_block else r[0]
    actual = rotate_quantize(x, rotation, rule=ScaleRule.EVEN, backend="cpu")
    oracle.assert_same(actual.scales, expected.scales, "scales")
    values = (actual.codes ^ expected.codes) & 0x77  # a sum that is zero may have either sign
    assert not values.any()


@bounded
@given(shapes, seeds, st.sampled_from(list(ScaleRule)), st.integers(-140, 100))
def test_gptq_block_is_its_definition(shape, seed, rule, exponent):
    generator = inputs.generator(seed)
    values = torch.randn(shape[1], 32, generator=generator) * 2.0**exponent
    factor = torch.randn(32, 32, generator=generator)
    made, expected = CpuBackend().gptq_block(values, factor, rule), gptq_block(values, factor, rule)
    for name, one, two in zip(expected._fields, made, expected, strict=True):
        oracle.assert_same(one, two, f"{name}, {shape[1]} rows, {rule}, 2**{exponent}")
