"""mxfp4_linear: the two ops in one, with straight-through gradients."""

import pytest
import torch

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.ops import mxfp4_gemm, mxfp4_linear, prepare_weight, rotate_quantize
from duqpp.rotation.basis import hadamard, random_orthogonal
from tests import inputs, oracle
from tests.ops.backends import BACKENDS

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
K, N = 96, 40
ROTATIONS = {
    "none": None,
    "shared": random_orthogonal(32, inputs.generator(0)).bfloat16(),
    "per block": random_orthogonal(32, inputs.generator(1), count=K // 32).bfloat16(),
}


def weight(n: int, k: int, seed: int) -> MXFP4Tensor:
    return MXFP4Tensor(*inputs.mxfp4_operand(n, k, seed))


def block_diagonal(rotation: torch.Tensor | None, k: int) -> torch.Tensor:
    """The rotation written out over all of K: float64 [K, K]."""
    if rotation is None:
        return torch.eye(k, dtype=torch.float64)
    return torch.block_diag(*rotation.double().expand(k // 32, 32, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_is_the_two_ops_bit_for_bit(dtype, rotation, with_bias, backend):
    x = inputs.outliers(14, K, seed=2).to(dtype)
    w = prepare_weight(weight(N, K, seed=3), backend=backend)
    bias = torch.randn(N).to(dtype) if with_bias else None
    options = {"rule": ScaleRule.EVEN, "backend": backend}
    quantized = rotate_quantize(x, rotation, **options)
    expected = mxfp4_gemm(quantized, w, bias, out_dtype=dtype, backend=backend)
    for shape in ((14, K), (2, 7, K), (1, 2, 7, K)):
        y = mxfp4_linear(x.view(shape), rotation, w, bias, **options)
        oracle.assert_same(y, expected.view(*shape[:-1], N), f"{backend} {shape}")
    one = mxfp4_linear(x[3], rotation, w, bias, **options)
    torch.testing.assert_close(one, expected[3])  # one row may sum in another order


def test_no_rows(backend):
    w = prepare_weight(weight(N, K, seed=3), backend=backend)
    y = mxfp4_linear(torch.zeros(0, 3, K), None, w, rule=ScaleRule.EVEN, backend=backend)
    assert y.shape == (0, 3, N)


# Gradients. The derivative of rounding counts as 1: y = x R W.T + bias, so that
# dL/dx = dL/dy W R.T and dL/dbias is the sum of dL/dy over rows.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (K,)])
def test_straight_through_gradients_are_the_formula(dtype, shape, backend):
    """Integers throughout, so that the gradients are exact and round once."""
    rotation = (hadamard(32) * 32**0.5).round()[torch.arange(32).roll(3)].bfloat16()
    w = weight(N, K, seed=4)
    x = inputs.small_integers(1, int(torch.Size(shape).numel()), seed=5).view(shape).to(dtype)
    bias = torch.ones(N, dtype=dtype, requires_grad=True)
    x.requires_grad_()
    prepared = prepare_weight(w, backend=backend)
    y = mxfp4_linear(x, rotation, prepared, bias, rule=ScaleRule.EVEN, backend=backend)
    grad = inputs.small_integers(1, y.numel(), seed=6, limit=2).view(y.shape).to(dtype)
    y.backward(grad)
    values = torch.from_numpy(oracle.dequantize(w.codes, w.scales))
    exact = grad.double() @ values @ block_diagonal(rotation, K).T
    assert (exact == exact.float()).all(), "the test's own gradient must be exact"
    assert x.grad.dtype == dtype
    oracle.assert_same(x.grad + 0, exact.float().to(dtype) + 0, f"gradient of x, {backend}")
    expected = grad.double().reshape(-1, N).sum(0)
    oracle.assert_same(bias.grad + 0, expected.float().to(dtype) + 0, "gradient of the bias")


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_gradient_of_a_general_rotation(rotation, backend):
    w = weight(N, K, seed=7)
    x = inputs.gaussian(9, K, seed=8).requires_grad_()
    prepared = prepare_weight(w, backend=backend)
    y = mxfp4_linear(x, rotation, prepared, rule=ScaleRule.EVEN, backend=backend)
    grad = inputs.gaussian(9, N, seed=9)
    y.backward(grad)
    values = torch.from_numpy(oracle.dequantize(w.codes, w.scales))
    expected = grad.double() @ values @ block_diagonal(rotation, K).T
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-4)


def test_gradients_stop_where_none_is_asked_for(backend):
    w = prepare_weight(weight(N, K, seed=7), backend=backend)
    x, bias = inputs.gaussian(2, K, seed=8), torch.zeros(N, requires_grad=True)
    y = mxfp4_linear(x, None, w, bias, rule=ScaleRule.EVEN, backend=backend)
    y.sum().backward()
    assert bias.grad.tolist() == [2.0] * N
    assert x.grad is None
    y = mxfp4_linear(x, None, w, bias.detach(), rule=ScaleRule.EVEN, backend=backend)
    assert not y.requires_grad


def test_codes_carry_no_gradient(backend):
    x = inputs.gaussian(2, K, seed=8).requires_grad_()
    quantized = rotate_quantize(x, None, rule=ScaleRule.EVEN, backend=backend)
    assert not quantized.codes.requires_grad
    assert not quantized.scales.requires_grad


def test_gradient_of_the_bias_of_a_gemm(backend):
    a, b = (prepare_weight(weight(n, K, seed=n), backend=backend) for n in (5, N))
    bias = torch.zeros(N, dtype=torch.bfloat16, requires_grad=True)
    grad = inputs.small_integers(5, N, seed=1)
    mxfp4_gemm(a, b, bias, out_dtype=torch.float32, backend=backend).backward(grad)
    assert bias.grad.dtype == torch.bfloat16
    oracle.assert_same(bias.grad + 0, grad.sum(0) + 0, "gradient of the bias")


# Argument errors: the smallest input that triggers each message.


def error_of(x, rotation=None, w=None, bias=None, *, backend) -> str:
    w = weight(2, 32, seed=0) if w is None else w
    with pytest.raises(ValueError) as error:
        mxfp4_linear(x, rotation, w, bias, rule=ScaleRule.EVEN, backend=backend)
    return str(error.value)


def test_every_message_names_the_op_and_the_argument(backend):
    x = torch.zeros(1, 32)
    assert error_of(x.double(), backend=backend) == (
        "mxfp4_linear: x must be bfloat16, float16 or float32, got torch.float64; "
        "convert with x.bfloat16()"
    )
    assert error_of(torch.zeros(1, 31), backend=backend) == (
        "mxfp4_linear: x must be [..., K] with K a multiple of 32, got [1, 31]"
    )
    assert error_of(x, torch.zeros(16, 16).bfloat16(), backend=backend) == (
        "mxfp4_linear: rotation must be [32, 32] or [1, 32, 32], got [16, 16]"
    )
    assert error_of(x, torch.eye(32).half(), backend=backend) == (
        "mxfp4_linear: rotation must be bfloat16, got torch.float16"
    )
    assert error_of(torch.zeros(1, 64), backend=backend) == (
        "mxfp4_linear: x has K = 64, weight has K = 32"
    )
    assert error_of(x, bias=torch.zeros(3), backend=backend) == (
        "mxfp4_linear: bias must be bfloat16, float16 or float32 [2], got torch.float32 [3]"
    )


def test_the_weight_must_be_packed_bytes(backend):
    good, x = weight(2, 64, seed=0), torch.zeros(1, 64)
    assert error_of(x, w=MXFP4Tensor(good.codes.float(), good.scales), backend=backend) == (
        "mxfp4_linear: weight.codes must be uint8 [rows, K/2], got torch.float32 [2, 32]"
    )
    assert error_of(x, w=MXFP4Tensor(good.codes, good.scales.float()), backend=backend) == (
        "mxfp4_linear: weight.scales must be uint8, got torch.float32"
    )
    assert error_of(x, w=MXFP4Tensor(good.codes, good.scales[:, :1]), backend=backend) == (
        "mxfp4_linear: weight.scales must hold 4 blocks' scales, got [2, 1]"
    )
