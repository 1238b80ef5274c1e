"""The input that the linears of a group share: once for all of them, and never a wrong one."""

import copy
import io
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from duqpp.format import ScaleRule
from duqpp.nn import MXFP4Linear, share_input, unshare_input
from duqpp.ops.reference import ReferenceBackend
from tests import inputs, oracle

K, N = 96, 40


def make_linear(seed: int) -> MXFP4Linear:
    linear = MXFP4Linear(K, N, bias=False, rule=ScaleRule.EVEN, rotation=(32, 32))
    linear.weight_packed.data, linear.weight_scale.data = inputs.mxfp4_operand(N, K, seed=seed)
    linear.rotation.copy_(torch.eye(32).flip(0))
    return linear


class Owner(nn.Module):
    """Hands its input to linears, as attention and MLP do; what it raises comes in between."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.between = lambda x: None

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
        outputs = []
        for linear in self.linears:
            outputs.append(linear(hidden_states) * scale)
            self.between(hidden_states)
        return outputs


@pytest.fixture
def quantized(monkeypatch) -> list[torch.Tensor]:
    """What reaches `rotate_quantize` of the reference, with every op sent there."""
    seen: list[torch.Tensor] = []
    original = ReferenceBackend.rotate_quantize

    def counting(self, x, *arguments):
        seen.append(x)
        return original(self, x, *arguments)

    monkeypatch.setenv("DUQPP_BACKEND", "reference")
    monkeypatch.setattr(ReferenceBackend, "rotate_quantize", counting)
    return seen


@pytest.fixture
def owner() -> Owner:
    linears = [make_linear(seed) for seed in (1, 2, 3)]
    owner = Owner(linears)
    share_input(owner, linears)
    return owner


def alone(owner: Owner, x: torch.Tensor) -> list[torch.Tensor]:
    """What the linears make of x, each by itself."""
    return [linear(x) for linear in owner.linears]


def assert_all_same(made: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for y, wanted in zip(made, expected, strict=True):
        oracle.assert_same(y, wanted, "y")


def remembered(owner: Owner) -> dict:
    return owner.linears[0].shared_input._reads


X = inputs.outliers(6, K, seed=9).view(2, 3, K)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_once_however_it_arrives_and_no_bit_changes(guard, owner, quantized):
    with guard():
        expected = [y * 2 for y in alone(owner, X)]
        for call in (
            lambda: owner(X, 2.0),
            lambda: owner(X, scale=2.0),
            lambda: owner(hidden_states=X, scale=2.0),
        ):
            quantized.clear()
            assert_all_same(call(), expected)
            assert len(quantized) == 1
            assert not remembered(owner)


def test_linears_that_run_by_themselves_share_nothing(owner, quantized):
    x = X.clone()
    first = alone(owner, x)
    assert len(quantized) == 3 and not remembered(owner)
    with torch.inference_mode():  # where no change in place could be seen
        x = X.clone()
        owner.linears[0](x)
        x.mul_(-3)
        assert_all_same([owner.linears[1](x)], [make_linear(2)(X * -3)])
    assert_all_same(alone(owner, X), first)


def test_hooks_and_wrappers_get_tensors(owner, quantized):
    seen = []
    for module in (owner, *owner.linears):
        module.register_forward_pre_hook(lambda m, args: seen.append(type(args[0])))
        module.register_forward_hook(lambda m, args, y: seen.append(type(args[0])))
    expected = alone(owner, X)
    seen.clear()
    assert_all_same(owner(X), expected)
    assert set(seen) == {torch.Tensor} and len(seen) == 8
    assert len(quantized) == 4


def test_a_changed_input_is_quantized_for_itself(owner, quantized):
    """A steering vector before the owner, another tensor for one linear, a change in place."""
    owner.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    assert_all_same(owner(X), alone(owner, X + 1))
    assert len(quantized) == 1 + 3
    owner.linears[1].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    expected = [make_linear(1)(X + 1), make_linear(2)(2 * (X + 1)), make_linear(3)(X + 1)]
    assert_all_same(owner(X), expected)
    owner.linears[1]._forward_pre_hooks.clear()
    owner._forward_pre_hooks.popitem()
    owner.between = lambda x: x.mul_(-2)
    changed = [make_linear(1)(X), make_linear(2)(X * -2), make_linear(3)(X * 4)]
    assert_all_same(owner(X.clone()), changed)


def test_an_adapter_around_one_linear_shares_too(owner, quantized):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.low = base, nn.Linear(K, N, bias=False)

        def forward(self, x):
            return self.base(x) + self.low(x)

    expected = alone(owner, X)
    owner.linears[1] = Adapter(owner.linears[1])
    expected[1] = expected[1] + owner.linears[1].low(X)
    quantized.clear()
    assert_all_same(owner(X), expected)
    assert len(quantized) == 1
    assert owner(X)[1].requires_grad


def test_gradients_and_checkpointing_change_no_bit(owner, quantized):
    expected = owner(X)
    asked = X.clone().requires_grad_()
    quantized.clear()
    assert_all_same(owner(asked), expected)
    assert len(quantized) == 3
    with torch.no_grad():
        quantized.clear()
        assert_all_same(owner(asked), expected)
        assert len(quantized) == 1
    gradients = []

    def run(x):
        return torch.stack(owner(x))

    for way in (run, *(partial(checkpoint, run, use_reentrant=old) for old in (False, True))):
        leaf = X.clone().requires_grad_()
        way(leaf).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].any()
    assert_all_same(gradients[1:], [gradients[0]] * 2)


def test_an_error_in_between_leaves_nothing(owner):
    def fail(x):
        raise RuntimeError("in between")

    expected = owner(X)
    owner.between = fail
    with pytest.raises(RuntimeError, match="in between"):
        owner(X)
    assert not remembered(owner)
    owner.between = lambda x: None
    assert_all_same(owner(X), expected)


def test_threads_share_with_themselves_alone(owner):
    barrier, results = threading.Barrier(2, timeout=20), {}
    owner.between = lambda x: barrier.wait()

    def run(sign: int) -> None:
        with torch.inference_mode():
            results[sign] = [owner(X * sign) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(sign,)) for sign in (1, -3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sign, made in results.items():
        for y in made:
            assert_all_same(y, alone(owner, X * sign))
    assert len(results) == 2 and not remembered(owner)


def test_it_can_be_undone(owner, quantized):
    expected = owner(X)
    unshare_input(owner)
    unshare_input(owner)
    quantized.clear()
    assert_all_same(owner(X), expected)
    assert len(quantized) == 3
    assert not owner._forward_pre_hooks and not owner._forward_hooks


def pickled(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "torch.save"])
def test_a_copy_shares_an_input_of_its_own(copied, owner, quantized):
    """Changed, it follows its own linears; undone, it leaves the original as it was."""
    owner.between = None  # a lambda cannot be pickled
    before, other = alone(owner, X), copied(owner)
    owner.between = other.between = lambda x: None
    for linear in other.linears:
        linear.rotation.copy_(-linear.rotation.flip(0))
        linear.rule = ScaleRule.FLOOR
    expected = alone(other, X)
    assert not torch.equal(expected[0], before[0])
    quantized.clear()
    assert_all_same(other(X), expected)
    assert len(quantized) == 1
    unshare_input(other)
    assert_all_same(owner(X), before)
    assert len(quantized) == 2


def test_one_graph_quantizes_once(owner, quantized):
    expected = owner(X)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(owner, backend="eager", fullgraph=True)
        for scale in (1, -3):
            quantized.clear()
            assert_all_same(compiled(X * scale), alone(owner, X * scale))
            assert len(quantized) == 1 + 3, "once in the graph"
        assert_all_same(compiled(X), expected)
    finally:
        torch._dynamo.reset()
