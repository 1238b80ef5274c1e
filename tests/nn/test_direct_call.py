"""A prepared MXFP4Linear calls its backend's op by itself; what is changed or refused goes on.

Each case is one linear prepared and one that is not: what is done to both must show in neither.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.nn import MXFP4Linear, share_input
from duqpp.ops.native import compiled_library
from duqpp.rotation.basis import random_orthogonal
from tests import inputs, oracle

K, N = 96, 40
X = inputs.outliers(6, K, seed=1).bfloat16()
needs_library = pytest.mark.skipif(compiled_library() is None, reason="no compiled library")


def make_linear(*, seed: int = 0, prepared: bool = True, duquant: bool = False) -> MXFP4Linear:
    shapes = {"pre_rotation": (32, 32), "permutation": True} if duquant else {}
    linear = MXFP4Linear(K, N, bias=True, rule=ScaleRule.EVEN, rotation=(32, 32), **shapes)
    linear.weight_packed.data, linear.weight_scale.data = inputs.mxfp4_operand(N, K, seed)
    linear.bias.data = inputs.small_integers(1, N, seed=seed)[0].bfloat16()
    for name in ("rotation", "pre_rotation") if duquant else ("rotation",):
        getattr(linear, name).data = random_matrix(seed)
    if duquant:
        linear.permutation.data = torch.randperm(K, generator=inputs.generator(seed)).int()
    if prepared:
        linear.prepare()
    return linear


def random_matrix(seed: int) -> torch.Tensor:
    return random_orthogonal(32, inputs.generator(seed)).bfloat16().contiguous()


def ops_called(call) -> list[str]:
    """Ops that a call gives to torch's dispatcher, but for those that these call themselves."""
    with torch.profiler.profile() as profiler, torch.no_grad():
        call()
    return [event.name for event in profiler.events() if event.cpu_parent is None]


@needs_library
@pytest.mark.parametrize("shape", [(K,), (6, K), (2, 3, K), (0, K)])
def test_a_call_is_one_op(shape):
    linear, x = make_linear(), X.reshape(-1)[: torch.Size(shape).numel()].view(shape)
    assert ops_called(lambda: linear(x)) == ["duqpp_native::mxfp4_linear"]
    with torch.no_grad():
        y = linear(x)
    assert y.shape == (*shape[:-1], N)
    oracle.assert_same(y, make_linear(prepared=False)(x), "y")


@needs_library
def test_an_input_of_several_is_quantized_by_one_op_and_multiplied_by_one():
    owner = nn.ModuleList([make_linear(seed=0), make_linear(seed=0)])
    share_input(owner, list(owner))
    owner.forward = lambda x: [linear(x) for linear in owner]
    called = ops_called(lambda: owner(X))
    products = [f"duqpp_native::{name}" for name in ("rotate_quantize", "mxfp4_gemm", "mxfp4_gemm")]
    assert [name for name in called if name.startswith("duqpp")] == products
    with torch.no_grad():
        expected = make_linear(prepared=False)(X.view(2, 3, K))
        for y in owner(X.view(2, 3, K)):
            oracle.assert_same(y, expected, "y")


def replaced_data(linear: MXFP4Linear) -> None:
    """Another weight, row-major, in the memory of the module's own Parameters."""
    linear.weight_packed.data, linear.weight_scale.data = inputs.mxfp4_operand(N, K, seed=9)


def replaced_parameters(linear: MXFP4Linear) -> None:
    codes, scales = inputs.mxfp4_operand(N, K, seed=9)
    linear.weight_packed = nn.Parameter(codes, requires_grad=False)
    linear.weight_scale = nn.Parameter(scales, requires_grad=False)


def loaded(linear: MXFP4Linear, *, assign: bool = False) -> None:
    other = make_linear(seed=9, duquant=linear.permutation is not None)
    linear.load_state_dict(other.state_dict(), assign=assign)


def moved(linear: MXFP4Linear) -> None:
    linear.to("meta").to_empty(device="cpu")
    loaded(linear)


def other_bias(linear: MXFP4Linear) -> None:
    linear.bias = nn.Parameter(torch.arange(N).float(), requires_grad=False)


def without_bias(linear: MXFP4Linear) -> None:
    linear.bias = None


class Doubled(nn.Module):
    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return bias * 2


CHANGES = {
    "data": replaced_data,
    "parameters": replaced_parameters,
    "replace_weight": lambda m: m.replace_weight(MXFP4Tensor(*inputs.mxfp4_operand(N, K, 9))),
    "load_state_dict": loaded,
    "load_state_dict(assign)": lambda m: loaded(m, assign=True),
    "meta and back": moved,
    "memory": lambda m: setattr(m.weight_packed, "data", m.weight_packed.data.clone()),
    "half": lambda m: m.half(),
    "bias": other_bias,
    "no bias": without_bias,
    "parametrized bias": lambda m: parametrize.register_parametrization(m, "bias", Doubled()),
    "rotation": lambda m: setattr(m, "rotation", nn.Buffer(random_matrix(9))),
    "rotation turned": lambda m: setattr(m.rotation, "data", m.rotation.data.T),
    "no rotation": lambda m: setattr(m, "rotation", None),
    "permutation": lambda m: setattr(m, "permutation", nn.Buffer(torch.arange(K).flip(0).int())),
    "rule": lambda m: setattr(m, "rule", ScaleRule.CEIL),
    "hook": lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
}


@torch.no_grad()
@pytest.mark.parametrize("duquant", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_after_a_call_shows_in_the_next(change, duquant):
    plain, prepared = make_linear(prepared=False, duquant=duquant), make_linear(duquant=duquant)
    oracle.assert_same(prepared(X), plain(X), "y before")
    change(plain)
    change(prepared)
    for x in (X, X.float(), X.half(), X.T.contiguous().T, X.view(2, 3, K)[:, 1:]):
        y = prepared(x)
        assert y.dtype == x.dtype
        oracle.assert_same(y, plain(x), "y after")


@torch.no_grad()
@needs_library
@pytest.mark.parametrize("change", [loaded, lambda m: loaded(m, assign=True), lambda m: m.half()])
def test_a_linear_that_was_prepared_is_so_again(change):
    linear = make_linear()
    change(linear)
    assert ops_called(lambda: linear(X)) == ["duqpp_native::mxfp4_linear"]
    copied = copy.deepcopy(linear)
    oracle.assert_same(copied(X), linear(X), "y of a copy")
    assert ops_called(lambda: copied(X)) == ["duqpp_native::mxfp4_linear"]


@torch.no_grad()
def test_functional_call_takes_the_tensors_that_it_is_given():
    linear, other = make_linear(), make_linear(seed=9)
    y = torch.func.functional_call(linear, other.state_dict(), (X,))
    oracle.assert_same(y, other(X), "y")
    oracle.assert_same(linear(X), make_linear(prepared=False)(X), "y afterwards")


@torch.no_grad()
def test_what_is_wrong_is_said_as_before():
    linear = make_linear()
    linear(X)
    with pytest.raises(ValueError, match=r"^mxfp4_linear: x must be .* got torch.float64"):
        linear(X.double())
    with pytest.raises(ValueError, match=r"^mxfp4_linear: x has K = 64, weight has") as found:
        linear(X[:, :64])
    assert found.value.__context__ is None, "no message of a lower layer beside it"
    linear.bias = nn.Parameter(torch.empty(N, device="meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"^mxfp4_linear: x and bias must be on one device"):
        linear(X)
    linear.bias = nn.Parameter(torch.zeros(N + 1), requires_grad=False)
    with pytest.raises(ValueError, match=r"^mxfp4_linear: bias must be .* \[40\]"):
        linear(X)


def test_a_gradient_that_is_asked_for_is_there():
    grads = []
    for prepared in (False, True):
        linear = make_linear(prepared=prepared)
        linear.bias.requires_grad_()
        x = X.clone().requires_grad_()
        for asked in (X, x):
            linear(asked).float().sum().backward()
        grads.append((x.grad, linear.bias.grad))
    for one, other in zip(*grads, strict=True):
        oracle.assert_same(one, other, "gradient")
