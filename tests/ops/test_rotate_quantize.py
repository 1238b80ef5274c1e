"""rotate_quantize: byte for byte where every sum is exact, explained differences elsewhere."""

import numpy as np
import pytest
import torch

from duqpp.format import ScaleRule, quantize
from duqpp.rotation.basis import hadamard, random_orthogonal
from tests import inputs, oracle
from tests.ops.backends import QUANTIZERS, in_kernel_dtype, rotate_quantize, row_major_scales

pytestmark = pytest.mark.parametrize("backend", QUANTIZERS)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RULES = list(ScaleRule)
BOUNDED_RULES = (ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.CEIL)


# Matrices whose products with small integers are small integers, so that no float32 sum rounds.
# None is symmetric: a transposed matrix gives other codes.


def signed_permutation(k: int, seed: int) -> torch.Tensor:
    order = torch.randperm(32, generator=inputs.generator(seed))
    sign = torch.randint(0, 2, (32,), generator=inputs.generator(seed + 1)) * 2.0 - 1
    return torch.eye(32)[order] * sign


def integer_hadamard(k: int, seed: int) -> torch.Tensor:
    return (hadamard(32) * 32**0.5).round().float()[torch.arange(32).roll(5)]


def integers_per_block(k: int, seed: int) -> torch.Tensor:
    return torch.randint(-3, 4, (k // 32, 32, 32), generator=inputs.generator(seed)).float()


EXACT_ROTATIONS = {
    "signed permutation": signed_permutation,
    "integer Hadamard": integer_hadamard,
    "integers per block": integers_per_block,
}


def scaled_integers(rows: int, k: int, seed: int) -> torch.Tensor:
    """Integers up to 8 in magnitude, each row times its own power of two: exact in float16 too."""
    power = torch.randint(-8, 8, (rows, 1), generator=inputs.generator(seed + 7))
    return inputs.small_integers(rows, k, seed) * torch.exp2(power.float())


def rotate_in_float64(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """x R with the matrix written out over all of K; sums in float64."""
    if rotation is None:
        return x.double()
    blocks = x.shape[-1] // 32
    matrices = rotation.double().expand(blocks, 32, 32)
    parts = [x.double()[:, 32 * b : 32 * b + 32] @ matrices[b] for b in range(blocks)]
    return torch.cat(parts, dim=1)


def without_signs_of_zero(packed: torch.Tensor) -> torch.Tensor:
    """Packed codes with every -0 made 0: a sum that is zero may have either sign."""
    low, high = packed & 0x0F, packed & 0xF0
    return torch.where(low == 0x08, 0, low) | torch.where(high == 0x80, 0, high)


def assert_equals_definition(x, rotation, rule, backend, *, rows=None):
    """Compare codes and scales, of `rows` or of all, with the oracle on exactly rotated values."""
    rounded = None if rotation is None else rotation.to(torch.bfloat16)
    quantized = rotate_quantize(x, rounded, rule=rule, backend=backend)
    flat = x.reshape(-1, x.shape[-1])
    what = f"{backend}, {rule}, {list(x.shape)} {x.dtype}"
    assert quantized.shape == flat.shape, what
    chosen = torch.arange(len(flat)) if rows is None else torch.tensor(rows, dtype=torch.int64)
    exact = rotate_in_float64(flat[chosen], rotation)
    assert (exact == exact.float()).all(), "the test's own inputs must be exact in float32"
    codes, scales = (torch.from_numpy(part) for part in oracle.quantize(exact, rule.value))
    oracle.assert_same(row_major_scales(quantized)[chosen], scales, f"scales, {what}")
    actual = without_signs_of_zero(quantized.codes[chosen])
    oracle.assert_same(actual, without_signs_of_zero(codes), f"codes, {what}")


@pytest.mark.parametrize("rows", inputs.AWKWARD_ROWS)
@pytest.mark.parametrize("k", inputs.AWKWARD_K)
@pytest.mark.parametrize("make", EXACT_ROTATIONS.values(), ids=EXACT_ROTATIONS)
def test_awkward_shapes_equal_the_definition(rows, k, make, backend):
    x = scaled_integers(rows, k, seed=rows + k).bfloat16()
    checked = sorted({*range(min(rows, 3)), *range(max(0, rows - 3), rows)})  # the oracle is slow
    assert_equals_definition(x, make(k, seed=k), ScaleRule.EVEN, backend, rows=checked)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [None, *EXACT_ROTATIONS.values()], ids=["none", *EXACT_ROTATIONS])
def test_rules_and_dtypes_equal_the_definition(rule, dtype, make, backend):
    x = scaled_integers(31, 96, seed=3).to(dtype)
    rotation = None if make is None else make(96, seed=4)
    assert_equals_definition(x, rotation, rule, backend)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (1, 1, 1, 32), (0, 5, 32), (3, 0, 96)])
@pytest.mark.parametrize("make", EXACT_ROTATIONS.values(), ids=EXACT_ROTATIONS)
def test_leading_dimensions_are_rows(shape, make, backend):
    x = inputs.small_integers(1, int(np.prod(shape)) or 1, seed=1)[:, : int(np.prod(shape))]
    x = x.reshape(shape).bfloat16()
    assert_equals_definition(x, make(shape[-1], seed=2), ScaleRule.EVEN, backend)


@pytest.mark.parametrize("rule", RULES)
def test_no_rotation_is_quantize(rule, backend):
    for make in (inputs.outliers, inputs.grid_and_ties, inputs.zero_blocks):
        x = in_kernel_dtype(make(40, 160, seed=5), backend)
        quantized = rotate_quantize(x, None, rule=rule, backend=backend)
        expected = quantize(x, rule=rule)
        oracle.assert_same(quantized.codes, expected.codes, f"codes, {make.__name__}, {rule}")
        oracle.assert_same(row_major_scales(quantized), expected.scales, f"scales, {rule}")


def test_strides_do_not_matter(backend):
    x = in_kernel_dtype(scaled_integers(64, 96, seed=6), backend)
    rotation = signed_permutation(96, seed=7)
    for view in (x[::3, 32:], x.view(64, 3, 32).transpose(0, 1), x[:1].expand(5, 96)):
        assert_equals_definition(view, rotation, ScaleRule.EVEN, backend)
    transposed = torch.stack((rotation, rotation)).to(torch.bfloat16).transpose(1, 2)
    strided = rotate_quantize(x[:, :64], transposed, rule=ScaleRule.EVEN, backend=backend)
    same = rotate_quantize(x[:, :64], rotation.T.bfloat16(), rule=ScaleRule.EVEN, backend=backend)
    oracle.assert_same(strided.codes, same.codes, "codes under a transposed matrix")


def test_arguments_are_left_as_they_were(backend):
    x = in_kernel_dtype(inputs.outliers(8, 64, seed=0), backend)
    rotation = signed_permutation(64, seed=0).bfloat16()
    copies = x.clone(), rotation.clone()
    quantized = rotate_quantize(x, rotation, rule=ScaleRule.EVEN, backend=backend)
    quantized.codes.zero_()
    quantized.scales.zero_()
    oracle.assert_same(x, copies[0], "x")
    oracle.assert_same(rotation, copies[1], "rotation")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", RULES)
def test_nan_and_infinity_make_their_block_nan_and_no_other(value, rule, backend):
    x = in_kernel_dtype(inputs.small_integers(4, 96, seed=8), backend)
    x[2, 40] = value
    rotation = hadamard(32).bfloat16()
    scales = row_major_scales(rotate_quantize(x, rotation, rule=rule, backend=backend))
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[2, 1] = True
    oracle.assert_same(scales == 255, expected, f"blocks with scale 255, {rule}")


# General matrices: a float32 sum of 32 products is off by at most 32 units of 2**-24 of the sum of
# magnitudes, in any order and with or without fused multiply-add.


def rotated_with_bound(x: torch.Tensor, rotation: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """x R in float64, and how far a float32 computation may be from it."""
    size = rotate_in_float64(x.abs(), rotation.abs())
    return rotate_in_float64(x, rotation).numpy(), (size * 33 * 2.0**-24).numpy()


GENERAL_ROTATIONS = {
    "shared": lambda k: random_orthogonal(32, inputs.generator(1)),
    "per block": lambda k: random_orthogonal(32, inputs.generator(2), count=k // 32),
}


@pytest.mark.parametrize("rule", BOUNDED_RULES)
@pytest.mark.parametrize("make", GENERAL_ROTATIONS.values(), ids=GENERAL_ROTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_general_rotations_differ_only_within_the_rounding_bound(make, rule, dtype, backend):
    x = inputs.outliers(129, 160, seed=9).to(dtype)
    rotation = make(160).bfloat16()
    quantized = rotate_quantize(x, rotation, rule=rule, backend=backend)
    exact, bound = rotated_with_bound(x, rotation)
    scales = row_major_scales(quantized).numpy()
    blocks, bounds = exact.reshape(129, 5, 32), bound.reshape(129, 5, 32)
    least = oracle.scale_exponent((np.abs(blocks) - bounds).max(-1), rule.value)
    most = oracle.scale_exponent((np.abs(blocks) + bounds).max(-1), rule.value)
    assert ((least <= scales) & (scales <= most)).all(), "a scale is off by more than rounding"

    scale = np.repeat(oracle.decode_e8m0(scales), 32, axis=-1)
    values = oracle.E2M1_VALUES[oracle.unpack(quantized.codes.numpy())]
    below = oracle.E2M1_VALUES[oracle.encode_e2m1((exact - bound) / scale)]
    above = oracle.E2M1_VALUES[oracle.encode_e2m1((exact + bound) / scale)]
    wrong = (values < below) | (above < values)
    assert not wrong.any(), f"{wrong.sum()} codes are off by more than rounding, {backend} {rule}"
    assert (below != above).mean() < 1e-3, "the bound must decide nearly every code"


@pytest.mark.parametrize("make", GENERAL_ROTATIONS.values(), ids=GENERAL_ROTATIONS)
def test_general_rotations_with_mse_take_the_better_exponent(make, backend):
    x = in_kernel_dtype(inputs.outliers(40, 160, seed=10), backend)
    rotation = make(160).bfloat16()
    quantized = rotate_quantize(x, rotation, rule=ScaleRule.MSE, backend=backend)
    exact, _ = rotated_with_bound(x, rotation)
    blocks = exact.reshape(40, 5, 32)
    floor = oracle.scale_exponent(np.abs(blocks).max(-1), "floor")

    def error(values):
        return ((values - blocks) ** 2).sum(-1)

    best = np.minimum(
        error(oracle.round_block(blocks, floor)), error(oracle.round_block(blocks, floor + 1))
    )
    values = oracle.dequantize(quantized.codes.numpy(), row_major_scales(quantized).numpy())
    assert (error(values.reshape(40, 5, 32)) <= best * (1 + 1e-4)).all()


@pytest.mark.parametrize("per_block", [False, True])
def test_rotation_acts_from_the_right(per_block, backend):
    # x has ones in channel 3 of its first block; row 3 of R is then the output.
    rotation = inputs.small_integers(32, 32, seed=11, limit=6)
    rotation[3, 0] = 6
    x = in_kernel_dtype(torch.zeros(1, 64), backend)
    x[0, 3] = 1
    matrix = torch.stack((rotation, torch.eye(32))) if per_block else rotation
    quantized = rotate_quantize(x, matrix.bfloat16(), rule=ScaleRule.EVEN, backend=backend)
    values = oracle.dequantize(quantized.codes, row_major_scales(quantized))
    expected, _ = oracle.quantize(rotation[3:4], "even")
    oracle.assert_same(quantized.codes[:, :16], expected, "row 3 of R")
    assert values[0, 0] == 6
    assert not values[0, 32:].any()


# Argument errors: the smallest input that triggers each message.


def test_x_must_be_floating_point(backend):
    for dtype in (torch.int32, torch.float64):
        message = (
            rf"^rotate_quantize: x must be bfloat16, float16 or float32, got {dtype}; "
            r"convert with x\.bfloat16\(\)$"
        )
        x = torch.zeros(1, 32, dtype=dtype)
        with pytest.raises(ValueError, match=message):
            rotate_quantize(x, None, rule=ScaleRule.EVEN, backend=backend)


@pytest.mark.parametrize("shape", [(), (0,), (31,), (2, 33), (4, 0)])
def test_k_must_be_a_multiple_of_32(shape, backend):
    message = "rotate_quantize: x must be [..., K] with K a multiple of 32, got " + str(list(shape))
    with pytest.raises(ValueError) as error:
        rotate_quantize(torch.zeros(shape), None, rule=ScaleRule.EVEN, backend=backend)
    assert str(error.value) == message


@pytest.mark.parametrize("shape", [(32,), (64, 64), (3, 32, 32), (1, 32, 32), (2, 32, 16)])
def test_rotation_must_fit(shape, backend):
    message = f"rotate_quantize: rotation must be [32, 32] or [2, 32, 32], got {list(shape)}"
    with pytest.raises(ValueError) as error:
        rotation = torch.zeros(shape, dtype=torch.bfloat16)
        rotate_quantize(torch.zeros(1, 64), rotation, rule=ScaleRule.EVEN, backend=backend)
    assert str(error.value) == message


def test_rotation_must_be_bfloat16(backend):
    with pytest.raises(
        ValueError, match=r"^rotate_quantize: rotation must be bfloat16, got torch.f"
    ):
        rotate_quantize(torch.zeros(1, 32), torch.eye(32), rule=ScaleRule.EVEN, backend=backend)


def test_unknown_rule(backend):
    with pytest.raises(ValueError, match="nearest"):
        rotate_quantize(torch.zeros(1, 32), None, rule="nearest", backend=backend)
