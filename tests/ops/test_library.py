"""The ops in torch's dispatcher: schemas, fake implementations, autograd registration."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.ops import library, mxfp4_gemm, mxfp4_linear, prepare_weight, rotate_quantize
from duqpp.rotation.basis import hadamard, random_orthogonal
from tests import inputs, oracle
from tests.ops.backends import BACKENDS

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

K, N = 64, 16
SHARED = hadamard(32).bfloat16()
PER_BLOCK = random_orthogonal(32, inputs.generator(0), count=K // 32).bfloat16()
WEIGHT = MXFP4Tensor(*inputs.mxfp4_operand(N, K, seed=1))


def test_the_ops_are_in_the_namespace_duqpp(backend):
    names = (
        *("rotate_quantize", "rmsnorm_rotate_quantize", "silu_mul_rotate_quantize"),
        *("prepare_weight", "mxfp4_gemm", "mxfp4_linear", "mxfp4_linear_input_gradient"),
    )
    for name in names:
        assert getattr(torch.ops.duqpp, name).default._schema.name == f"duqpp::{name}"


# opcheck: the schema mutates and aliases nothing, the fake implementation agrees with the real one
# with static and with dynamic shapes, and autograd works under AOTAutograd.


@pytest.mark.parametrize("rotation", [None, SHARED, PER_BLOCK], ids=["none", "shared", "per block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck_rotate_quantize(rotation, dtype, backend):
    x = inputs.gaussian(5, K, seed=2).to(dtype)
    torch.library.opcheck(library.rotate_quantize, (x, rotation, "even", backend))
    torch.library.opcheck(library.rotate_quantize, (x.requires_grad_(), rotation, "mse", backend))


@pytest.mark.parametrize("bias", [None, torch.ones(N, requires_grad=True)], ids=["none", "bias"])
def test_opcheck_mxfp4_gemm(bias, backend):
    a = rotate_quantize(inputs.gaussian(5, K, seed=3), None, rule=ScaleRule.EVEN, backend=backend)
    b = prepare_weight(WEIGHT, backend=backend)
    arguments = (a.codes, a.scales, b.codes, b.scales, bias, torch.bfloat16, backend)
    torch.library.opcheck(library.mxfp4_gemm, arguments)


@pytest.mark.parametrize("rotation", [None, SHARED, PER_BLOCK], ids=["none", "shared", "per block"])
def test_opcheck_mxfp4_linear(rotation, backend):
    x = inputs.gaussian(5, K, seed=4)
    w, bias = prepare_weight(WEIGHT, backend=backend), torch.ones(N)
    torch.library.opcheck(
        library.mxfp4_linear, (x, rotation, "even", w.codes, w.scales, None, backend)
    )
    x.requires_grad_()
    bias.requires_grad_()
    torch.library.opcheck(
        library.mxfp4_linear, (x, rotation, "even", w.codes, w.scales, bias, backend)
    )


@pytest.mark.parametrize("rotation", [None, SHARED, PER_BLOCK], ids=["none", "shared", "per block"])
def test_opcheck_input_gradient(rotation, backend):
    w, grad = prepare_weight(WEIGHT, backend=backend), inputs.gaussian(5, N, seed=5)
    arguments = (grad, rotation, w.codes, w.scales, backend)
    torch.library.opcheck(library.mxfp4_linear_input_gradient, arguments)


@pytest.mark.parametrize("rotation", [None, SHARED, PER_BLOCK], ids=["none", "shared", "per block"])
def test_opcheck_fused_forms(rotation, backend):
    x, up = (inputs.gaussian(5, K, seed=seed).bfloat16() for seed in (6, 7))
    torch.library.opcheck(library.silu_mul_rotate_quantize, (x, up, rotation, "even", backend))
    for norm_weight in (None, up[0]):
        arguments = (x, norm_weight, 1e-5, rotation, "even", backend)
        torch.library.opcheck(library.rmsnorm_rotate_quantize, arguments)


def test_opcheck_prepare_weight(backend):
    torch.library.opcheck(library.prepare_weight, (WEIGHT.codes, WEIGHT.scales, backend))


@pytest.mark.parametrize("rows", [0, 1, 129])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(rows, dtype, backend):
    def results(rows, rotation, w, bias):
        x = torch.ones(rows, 2, K, dtype=dtype)
        quantized = rotate_quantize(x, rotation, rule=ScaleRule.EVEN, backend=backend)
        y = mxfp4_gemm(quantized, w, bias, out_dtype=torch.bfloat16, backend=backend)
        z = mxfp4_linear(x, rotation, w, bias, rule=ScaleRule.EVEN, backend=backend)
        return quantized.codes, quantized.scales, y, z

    w, bias = prepare_weight(WEIGHT, backend=backend), torch.ones(N)
    real = results(rows, SHARED, w, bias)
    with FakeTensorMode() as mode:
        fake_weight = MXFP4Tensor(mode.from_tensor(w.codes), mode.from_tensor(w.scales))
        fake = results(rows, mode.from_tensor(SHARED), fake_weight, mode.from_tensor(bias))
    for made, expected in zip(fake, real, strict=True):
        assert isinstance(made, torch._subclasses.FakeTensor)
        assert (made.shape, made.dtype, made.stride()) == (
            expected.shape,
            expected.dtype,
            expected.stride(),
        )


def test_meta_tensors_compute_nothing(backend):
    x = torch.empty(3, K, device="meta")
    quantized = rotate_quantize(x, None, rule=ScaleRule.EVEN, backend=backend)
    assert quantized.codes.device.type == "meta"
    assert quantized.shape == (3, K)


def test_fake_tensors_are_checked_like_real_ones(backend):
    with FakeTensorMode(), pytest.raises(ValueError, match="K a multiple of 32"):
        rotate_quantize(torch.zeros(2, 33), None, rule=ScaleRule.EVEN, backend=backend)


# Plain calls skip the dispatcher; what watches, fakes, traces or differentiates does not miss them.


class Names(TorchDispatchMode):
    """The names of the ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_ops(backend):
    w, x = prepare_weight(WEIGHT, backend=backend), inputs.gaussian(3, K, seed=1)
    options = {"rule": ScaleRule.EVEN, "backend": backend}
    with Names() as names:
        quantized = rotate_quantize(x, None, **options)
        mxfp4_gemm(quantized, w, out_dtype=torch.float32, backend=backend)
        mxfp4_linear(x, None, w, **options)
    for op in ("rotate_quantize", "mxfp4_gemm", "mxfp4_linear"):
        assert f"duqpp::{op}" in names.seen


def test_a_plain_call_gives_the_bytes_of_the_dispatched_one(backend):
    w, x = prepare_weight(WEIGHT, backend=backend), inputs.outliers(3, K, seed=1)
    bias = torch.linspace(-1, 1, N)
    plain = mxfp4_linear(x, SHARED, w, bias, rule=ScaleRule.EVEN, backend=backend)
    dispatched = torch.ops.duqpp.mxfp4_linear(x, SHARED, "even", w.codes, w.scales, bias, backend)
    oracle.assert_same(plain, dispatched, "mxfp4_linear")


def test_what_must_not_run_directly(backend):
    x = torch.zeros(2, K)
    assert library.runs_directly(x, None, torch.nn.Parameter(x, requires_grad=False))
    wants_gradient = x.clone().requires_grad_()
    assert not library.runs_directly(wants_gradient)
    assert not library.runs_directly(x, wants_gradient)
    with torch.no_grad():
        assert library.runs_directly(wants_gradient)
    assert not library.runs_directly(x.to("meta"))
    with FakeTensorMode() as mode:
        assert not library.runs_directly(mode.from_tensor(x))
    with Names():
        assert not library.runs_directly(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(library.runs_directly(row)) or row)(x)
    assert seen == [False]
