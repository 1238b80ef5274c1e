"""Folding: (x R)(W R^-T).T == x W.T to 1e-6 in float64, for every transform a method builds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, InputError
from duqpp.methods import METHODS
from duqpp.methods.independent import GroupInput
from duqpp.rotation import BlockRotation, InputTransform
from duqpp.rotation.basis import hadamard, random_orthogonal
from duqpp.rotation.block_rotation import MAX_CONDITION, check_invertible
from duqpp.rotation.construct import zigzag_permutation
from tests import inputs, oracle

SINGLE = [name for name in METHODS if name not in ("learned", "duqpp")]  # group by group
SCOPES = ("shared", "per-block")


def relative(made: torch.Tensor, exact: torch.Tensor) -> float:
    return float((made - exact).norm() / exact.norm())


def method_transform(method: str, scope: str, scales, x: torch.Tensor, seed: int) -> InputTransform:
    """What a method does to the input x [n, K]; scales are smoothing folded into the matrices."""
    config = QuantizeConfig(method=method, rotation=scope, max_steps=12)
    ones = torch.ones(x.shape[1], dtype=torch.float64)
    group = GroupInput(x.shape[1] // 32, x, ones, scales, inputs.generator(seed))
    return config.build_method().transform(group)


def smoothing(k: int, seed: int) -> torch.Tensor:
    """Scales over the whole range that smoothing allows: float64 [K]."""
    exponent = torch.rand(k, generator=inputs.generator(seed), dtype=torch.float64) * 14 - 7
    return torch.exp2(exponent)


@given(
    method=st.sampled_from(SINGLE),
    scope=st.sampled_from(SCOPES),
    smooth=st.booleans(),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    blocks=st.integers(1, 5),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=120)
def test_the_linears_function_is_unchanged(
    method, scope, smooth, rows, columns, blocks, with_bias, seed
):
    k = 32 * blocks
    x = inputs.outliers(rows, k, seed)
    W = inputs.outliers(columns, k, seed + 5).double()
    bias = torch.randn(columns, dtype=torch.float64) if with_bias else 0
    scales = smoothing(k, seed) if smooth and scope == "per-block" else None
    transform = method_transform(method, scope, scales, x, seed)
    exact = x.double() @ W.T + bias
    made = transform.apply(x.double()) @ transform.fold(W).T + bias
    assert made.dtype == torch.float64
    assert relative(made, exact) < 1e-6


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize(
    ("scope", "smooth"), [("shared", False), ("per-block", False), ("per-block", True)]
)
def test_the_transform_is_what_a_linear_can_hold(method, scope, smooth):
    """Shapes and dtypes of MXFP4Linear's parameters; rotations that differ where they should."""
    x = inputs.outliers(100, 96, seed=1)
    transform = method_transform(method, scope, smoothing(96, 2) if smooth else None, x, 3)
    if method == "rtn" and not smooth:
        assert transform == InputTransform()
        return
    shape = (32, 32) if scope == "shared" else (3, 32, 32)
    matrices = [transform.rotation.matrix]
    if method == "duquant":
        matrices.append(transform.pre_rotation.matrix)
        assert transform.permutation.dtype == torch.int32
    else:
        assert transform.pre_rotation is None
        assert transform.permutation is None
    for matrix in matrices:
        assert matrix.shape == shape
        assert matrix.dtype == torch.bfloat16
        assert matrix.is_contiguous()
    if scope == "per-block" and method in ("random", "duquant", "duquant++"):
        assert (matrices[0][0] != matrices[0][1]).any(), "one rotation for all blocks"


def test_smoothing_folds_into_the_first_matrix():
    """x diag(1/s) before anything else: undoing s on x gives the rotation alone, up to bfloat16."""
    x, s = inputs.outliers(50, 64, seed=4), smoothing(64, 5)
    for method in ("hadamard", "random", "duquant++", "rtn"):
        smoothed = method_transform(method, "per-block", s, x, 6)
        plain = method_transform(method, "per-block", None, x / s.float(), 6)
        values = inputs.gaussian(20, 64, seed=7).double()
        made, expected = smoothed.apply(values * s), plain.apply(values)
        assert relative(made, expected) < 2.0**-7


def test_apply_and_fold_on_a_worked_example():
    # R swaps channels 0 and 1 and doubles channel 0 on its way; W R^-T undoes it.
    R = torch.eye(32, dtype=torch.float64)
    R[:2, :2] = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    rotation = BlockRotation.rounded(R)
    x, W = torch.zeros(1, 32), torch.zeros(1, 32)
    x[0, 0], x[0, 1], W[0, 0], W[0, 1] = 3.0, 5.0, 7.0, 11.0
    assert rotation.apply(x)[0, :3].tolist() == [5.0, 6.0, 0.0]
    assert rotation.fold(W)[0, :3].tolist() == [11.0, 3.5, 0.0]


def test_the_transform_permutes_between_its_rotations():
    """(x P)[permutation] R, each step written out."""
    k = 64
    P = random_orthogonal(32, inputs.generator(1), count=2)
    R = random_orthogonal(32, inputs.generator(2))
    permutation = zigzag_permutation(torch.rand(k, generator=inputs.generator(3)))
    transform = InputTransform(BlockRotation.rounded(R), BlockRotation.rounded(P), permutation)
    x = inputs.gaussian(7, k, seed=4).double()
    y = x @ torch.block_diag(*transform.pre_rotation.matrix.double())
    y = torch.stack([y[:, source] for source in permutation.tolist()], dim=1)
    y = y @ torch.block_diag(*[transform.rotation.matrix.double()] * 2)
    assert relative(transform.apply(x), y) < 1e-14
    parts = transform.apply(x.view(7, 1, k))
    assert parts.shape == (7, 1, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_keeps_the_dtype_and_fold_is_float64(dtype):
    transform = InputTransform(BlockRotation.rounded(hadamard(32)))
    assert transform.apply(torch.ones(2, 64, dtype=dtype)).dtype == dtype
    assert transform.fold(torch.ones(2, 64, dtype=dtype)).dtype == torch.float64


def test_the_inverse_is_that_of_the_rounded_matrix():
    """The bfloat16 matrix is not quite orthogonal: folding with its transpose is 1000 times off."""
    rotation = BlockRotation.rounded(random_orthogonal(32, inputs.generator(4)))
    x, W = inputs.gaussian(30, 32, seed=5).double(), inputs.gaussian(30, 32, seed=6).double()
    exact, R = x @ W.T, rotation.matrix.double()
    assert relative(rotation.apply(x) @ rotation.fold(W).T, exact) < 1e-12
    assert relative((x @ R) @ (W @ R).T, exact) > 1e-4


def test_rounded_leaves_its_argument_and_is_contiguous():
    R = random_orthogonal(32, inputs.generator(7), count=3)
    copy = R.clone()
    rotation = BlockRotation.rounded(R.transpose(1, 2))
    assert rotation.matrix.is_contiguous()
    oracle.assert_same(rotation.matrix, R.transpose(1, 2).bfloat16(), "rounded")
    oracle.assert_same(R, copy, "R")


# Errors.


def with_values(*diagonal: float) -> torch.Tensor:
    matrix = torch.eye(32, dtype=torch.float64)
    matrix.diagonal()[: len(diagonal)] = torch.tensor(diagonal, dtype=torch.float64)
    return matrix


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(32, 32, dtype=torch.float64),
        torch.ones(32, 32, dtype=torch.float64),
        with_values(0.0),
        with_values(2.0**-9, 2.0**9),
    ],
    ids=["zero", "rank one", "a zero channel", "ill-conditioned"],
)
def test_a_singular_rotation_is_an_input_error(matrix):
    with pytest.raises(InputError, match=r"^rotation is singular: condition number .* in block 0"):
        BlockRotation.rounded(matrix)
    stack = torch.stack([torch.eye(32, dtype=torch.float64)] * 2 + [matrix])
    with pytest.raises(
        InputError, match=r"^rotation is singular: .* in block 2, at most 65536 all"
    ):
        BlockRotation.rounded(stack)


def test_a_matrix_that_only_rounding_makes_singular_is_refused():
    matrix = torch.eye(32, dtype=torch.float64)
    matrix[0, :2] = matrix[1, :2] = 1.0
    matrix[1, 1] = 1 + 2.0**-11  # bfloat16 rounds it to 1
    assert torch.linalg.matrix_rank(matrix) == 32
    with pytest.raises(InputError, match="singular"):
        BlockRotation.rounded(matrix)


def test_condition_numbers_up_to_the_limit_are_allowed():
    assert MAX_CONDITION == 2.0**16
    BlockRotation.rounded(with_values(2.0**-8, 2.0**8))
    BlockRotation.rounded(torch.eye(32, dtype=torch.float64) * 2.0**-40)  # small is not singular


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(InputError, match=r"^rotation contains NaN or infinite values$"):
        BlockRotation.rounded(with_values(value))


def test_the_check_names_its_matrix_and_raises_what_it_is_told_to():
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.x\.rotation is singular"):
        check_invertible(torch.zeros(32, 32), "model.layers.0.x.rotation", CheckpointError)
    check_invertible(torch.eye(32).expand(5, 32, 32), "identity")
