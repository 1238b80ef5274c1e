"""The forms of rotate_quantize with RMSNorm and SiLU * up in front."""

import pytest
import torch

from duqpp.format import MXFP4Tensor, ScaleRule, dequantize
from duqpp.ops.reference import rotate_blocks
from duqpp.rotation.basis import random_orthogonal
from tests import inputs, oracle
from tests.ops.backends import (
    QUANTIZERS,
    in_kernel_dtype,
    rmsnorm_rotate_quantize,
    rotate_quantize,
    row_major_scales,
    silu_mul_rotate_quantize,
)

pytestmark = pytest.mark.parametrize("backend", QUANTIZERS)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
K = 160
ROTATIONS = {
    "none": None,
    "shared": random_orthogonal(32, inputs.generator(0)).bfloat16().contiguous(),
    "per block": random_orthogonal(32, inputs.generator(1), count=K // 32).bfloat16().contiguous(),
}
each_rotation = pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


# A float32 sum of 32 products and its prologue, relative to the block's amax: each term is at most
# the block's largest input and off by some 16 roundings of 2**-24; the largest output of an
# orthogonal rotation is at least 1/6 of the largest input (1/sqrt(32) of it, from the inverse).
SLACK = 32 * 16 * 6 * 2.0**-24
# What a prologue's float32 result, off by a rounding, may move by when it is rounded to a dtype: a
# unit in the last place of one input, as a share of the block's amax.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}


def values(quantized) -> torch.Tensor:
    """Float64 [M, K] of an op's result."""
    return dequantize(MXFP4Tensor(quantized.codes, row_major_scales(quantized))).double()


def assert_rounds(quantized, exact: torch.Tensor, rule: ScaleRule, slack: float = SLACK) -> None:
    """Every value is a nearest E2M1 value under its block's scale, which is the rule's own.

    exact: float64 [M, K], what is rounded. `slack` is an error relative to a block's amax that is
    forgiven: of the amax from which the scale follows, and of each value.
    """
    blocks = exact.unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1)
    lowest, highest = (
        torch.from_numpy(oracle.scale_exponent((amax * factor).float().numpy(), rule.value))
        for factor in (1 - slack, 1 + slack)
    )
    scales = row_major_scales(quantized)
    assert ((scales >= lowest) & (scales <= highest)).all(), "scale"
    unit = torch.exp2(scales.double() - 127)[..., None]
    scaled = (blocks / unit).clamp(-6, 6)
    error = (values(quantized).unflatten(-1, (-1, 32)) / unit - scaled).abs()
    half_step = torch.where(scaled.abs() < 2, 0.25, torch.where(scaled.abs() < 4, 0.5, 1.0))
    assert (error <= half_step + 8 * slack).all(), f"off by {(error - half_step).max()}"


def rotated(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    return x if rotation is None else rotate_blocks(x, rotation.double())


@each_rotation
@each_dtype
@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.CEIL])
@pytest.mark.parametrize("rows", [1, 17, 33])
def test_silu_mul_is_its_definition(rotation, dtype, rule, rows, backend):
    gate, up = (inputs.gaussian(rows, K, seed).to(dtype) for seed in (1, 2))
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    quantized = silu_mul_rotate_quantize(gate, up, rotation, rule=rule, backend=backend)
    exact = exact.to(dtype).double()
    assert_rounds(quantized, rotated(exact, rotation), rule, SLACK + UNIT[dtype])


@each_rotation
@each_dtype
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 33])
def test_rmsnorm_is_its_definition(rotation, dtype, with_weight, rows, backend):
    x = inputs.outliers(rows, K, seed=3).to(dtype)
    weight = (inputs.gaussian(1, K, seed=4)[0] + 2).to(dtype) if with_weight else None
    epsilon = 0.5  # large enough to be missed when it is forgotten
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    exact = exact if weight is None else exact * weight.double()
    quantized = rmsnorm_rotate_quantize(
        x, weight, rotation, epsilon=epsilon, rule=ScaleRule.EVEN, backend=backend
    )
    exact = exact.to(dtype).double()
    assert_rounds(quantized, rotated(exact, rotation), ScaleRule.EVEN, SLACK + UNIT[dtype])


def test_silu_of_extreme_gates(backend):
    """Where exp overflows or vanishes: 0 for very negative gates, the gate for large ones."""
    gate = torch.tensor([-1e30, -500.0, -88.0, 0.0, 88.0, 500.0, 1e30, 3.0] * 4)[None]
    gate, up = (in_kernel_dtype(x, backend) for x in (gate, torch.full((1, 32), 2.0)))
    quantized = silu_mul_rotate_quantize(gate, up, None, rule=ScaleRule.EVEN, backend=backend)
    exact = (torch.nn.functional.silu(gate.double()) * 2).to(gate.dtype).double()
    assert_rounds(quantized, exact, ScaleRule.EVEN, 1e-6 + UNIT[gate.dtype])
    small = silu_mul_rotate_quantize(
        gate.clamp(max=0), up, None, rule=ScaleRule.EVEN, backend=backend
    )
    assert values(small).abs().max() < 1e-30, "nothing but what exp(-88) leaves"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_give_the_nan_scale(bad, backend):
    x, ones = (in_kernel_dtype(torch.ones(2, 64), backend) for _ in range(2))
    x[1, 40] = bad
    quantized = silu_mul_rotate_quantize(x, ones, None, rule=ScaleRule.EVEN, backend=backend)
    assert (row_major_scales(quantized) == 255).tolist() == [[False, False], [False, True]]
    quantized = rmsnorm_rotate_quantize(
        x, None, None, epsilon=1e-5, rule=ScaleRule.EVEN, backend=backend
    )
    rows = (row_major_scales(quantized) == 255).any(1)
    assert rows.tolist() == [False, True]


def test_leading_dimensions_are_flattened(backend):
    gate, up = (in_kernel_dtype(inputs.gaussian(6, K, seed), backend) for seed in (1, 2))
    flat = silu_mul_rotate_quantize(gate, up, None, rule=ScaleRule.EVEN, backend=backend)
    shaped = silu_mul_rotate_quantize(
        gate.view(2, 3, K), up.view(2, 3, K), None, rule=ScaleRule.EVEN, backend=backend
    )
    oracle.assert_same(shaped.codes, flat.codes, "codes")
    empty = rmsnorm_rotate_quantize(
        gate[:0], None, None, epsilon=1e-5, rule=ScaleRule.EVEN, backend=backend
    )
    assert empty.shape == (0, K)


def test_a_row_does_not_depend_on_its_batch(backend):
    x = inputs.outliers(40, K, seed=9).bfloat16()
    rotation = ROTATIONS["per block"]
    options = {"epsilon": 1e-5, "rule": ScaleRule.MSE, "backend": backend}
    if backend == "reference":
        pytest.skip("reference: the order of a float32 mean is torch's")
    together = rmsnorm_rotate_quantize(x, x[0], rotation, **options)
    alone = rmsnorm_rotate_quantize(x[37:38], x[0], rotation, **options)
    oracle.assert_same(alone.codes[0], together.codes[37], "codes")


def error_of(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def test_argument_errors(backend):
    x, rule = torch.zeros(2, 64), ScaleRule.EVEN
    assert error_of(
        lambda: silu_mul_rotate_quantize(x, x.half(), None, rule=rule, backend=backend)
    ) == (
        "silu_mul_rotate_quantize: up must be torch.float32 [2, 64] like gate, "
        "got torch.float16 [2, 64]"
    )
    assert error_of(
        lambda: silu_mul_rotate_quantize(x, x[:1], None, rule=rule, backend=backend)
    ).endswith("got torch.float32 [1, 64]")
    assert (
        error_of(
            lambda: rmsnorm_rotate_quantize(
                x, torch.ones(32), None, epsilon=1e-5, rule=rule, backend=backend
            )
        )
        == "rmsnorm_rotate_quantize: norm_weight must be torch.float32 [64], got torch.float32 [32]"
    )
    assert error_of(
        lambda: rmsnorm_rotate_quantize(
            x.long(), None, None, epsilon=1e-5, rule=rule, backend=backend
        )
    ).startswith("rmsnorm_rotate_quantize: x must be bfloat16, float16 or float32")
    assert error_of(
        lambda: silu_mul_rotate_quantize(
            x, x, torch.zeros(3, 32, 32).bfloat16(), rule=rule, backend=backend
        )
    ).startswith("silu_mul_rotate_quantize: rotation must be [32, 32] or [2, 32, 32]")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_prologue_is_rounded_once_to_the_dtype_of_its_input(dtype, backend):
    """So that a fused form and the same steps one by one, in a model's dtype, agree."""
    gate, up = (inputs.gaussian(1000, K, seed).to(dtype) for seed in (11, 12))
    rotation = ROTATIONS["shared"]
    options = {"rule": ScaleRule.EVEN, "backend": backend}
    fused = silu_mul_rotate_quantize(gate, up, rotation, **options)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    steps = rotate_quantize(exact.float().to(dtype), rotation, **options)
    unrounded = rotate_quantize(exact.float(), rotation, **options | {"backend": "reference"})
    # An ulp of silu crosses a midpoint of the dtype now and then; not to round at all moves more.
    off, without_rounding = ((q.codes != steps.codes).sum() for q in (fused, unrounded))
    assert without_rounding > 20
    assert off < without_rounding / 4, (int(off), int(without_rounding))
