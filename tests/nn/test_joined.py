"""Linears that read one input and whose weights are joined: one product, and no other change."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from duqpp.config import QuantizeConfig
from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.methods.base import Block, Streams
from duqpp.models.family import family_of
from duqpp.nn import MXFP4Linear, share_input, unshare_input
from duqpp.ops.native import compiled_library
from duqpp.rotation.basis import random_orthogonal
from tests import inputs, oracle
from tests.nn.test_direct_call import ops_called

pytestmark = pytest.mark.skipif(compiled_library() is None, reason="no compiled library")

K, ROWS = 96, (48, 16, 32)  # of q, k and v
X = inputs.outliers(6, K, seed=1).bfloat16().view(2, 3, K)


class Owner(nn.Module):
    def __init__(self, rows: tuple[int, ...], bias: bool = False) -> None:
        super().__init__()
        options = {"rule": ScaleRule.EVEN, "rotation": (32, 32)}
        self.linears = nn.ModuleList([MXFP4Linear(K, n, bias=bias, **options) for n in rows])
        rotation = random_orthogonal(32, inputs.generator(3)).bfloat16().contiguous()
        for seed, (linear, n) in enumerate(zip(self.linears, rows, strict=True)):
            linear.weight_packed.data, linear.weight_scale.data = inputs.mxfp4_operand(n, K, seed)
            linear.rotation.data = rotation

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x) for linear in self.linears]

    @property
    def joined(self) -> bool:
        return self.linears[0].shared_input.joined is not None


def make_owner(*, rows: tuple[int, ...] = ROWS, bias: bool = False) -> Owner:
    owner = Owner(rows, bias)
    share_input(owner, list(owner.linears))
    for linear in owner.linears:
        linear.prepare()
    return owner


def assert_same(owner: Owner, plain: Owner, x: torch.Tensor = X) -> None:
    for y, expected in zip(owner(x), plain(x), strict=True):
        oracle.assert_same(y, expected, "y")


@torch.no_grad()
def test_a_group_is_one_product():
    owner, plain = make_owner(), Owner(ROWS)
    assert owner.joined
    called = ops_called(lambda: owner(X))
    assert called == ["duqpp_native::mxfp4_linear", "aten::split_with_sizes"]
    for x in (X, X[0], X[0, 0], X[:0], X.float()):
        assert_same(owner, plain, x)
    assert all(
        y.view(2, 3, -1, 16).shape[2] == n // 16 for y, n in zip(owner(X), ROWS, strict=True)
    )


def test_where_gradients_are_recorded_outputs_can_be_changed_in_place():
    owner, plain = make_owner(), Owner(ROWS)
    scale = torch.full((), 2.0, requires_grad=True)
    for y, expected in zip(owner(X), plain(X), strict=True):
        oracle.assert_same(y.mul_(scale), expected * 2, "y")


def test_nothing_shows_that_weights_are_joined():
    owner, plain = make_owner(), Owner(ROWS)
    for name, tensor in plain.state_dict().items():
        oracle.assert_same(owner.state_dict()[name], tensor, name)
    for linear, other in zip(owner.linears, plain.linears, strict=True):
        oracle.assert_same(linear.weight.codes, other.weight_packed, "codes")
        assert linear.weight_packed.shape == other.weight_packed.shape
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in owner.parameters()
    }
    assert sum(storages.values()) == sum(p.numel() for p in plain.parameters()), "no second copy"


@pytest.mark.parametrize("options", [{"rows": (48, 40)}, {"bias": True}], ids=["ragged", "bias"])
def test_what_cannot_be_joined_is_not(options):
    owner = make_owner(**options)
    assert not owner.joined
    with torch.no_grad():
        assert_same(owner, Owner(options.get("rows", ROWS), options.get("bias", False)))


def loaded(owner: Owner) -> None:
    state = {name: tensor.flip(0) for name, tensor in owner.state_dict().items()}
    owner.load_state_dict(state)


def without_first(owner: Owner) -> None:
    owner.linears[0].register_forward_pre_hook(lambda _, args: (args[0] * 2,))


def another(linear: MXFP4Linear) -> None:
    linear.replace_weight(MXFP4Tensor(*inputs.mxfp4_operand(linear.out_features, K, seed=9)))


def other_parameter(linear: MXFP4Linear) -> None:
    codes, scales = inputs.mxfp4_operand(linear.out_features, K, seed=9)
    linear.weight_packed.data, linear.weight_scale.data = codes, scales


CHANGES = {
    "load_state_dict": loaded,
    "half": lambda owner: owner.half(),
    "replace_weight": lambda owner: another(owner.linears[1]),
    "data of the last": lambda owner: other_parameter(owner.linears[2]),
    "data of the first": lambda owner: other_parameter(owner.linears[0]),
    "bias": lambda owner: setattr(owner.linears[1], "bias", nn.Parameter(torch.ones(16), False)),
    "another input for one": without_first,
    "unshared": unshare_input,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_shows(change):
    owner, plain = make_owner(), Owner(ROWS)
    assert_same(owner, plain)
    change(owner)
    change(plain)
    assert_same(owner, plain)
    assert_same(copy.deepcopy(owner), plain)


@torch.no_grad()
def test_each_output_is_its_own():
    """A linear that is called twice, and an output that is changed in place."""
    owner, plain = make_owner(), Owner(ROWS)
    owner.forward = lambda x: [owner.linears[i](x).mul_(2) for i in (0, 0, 1, 2, 0)]
    for y, i in zip(owner(X), (0, 0, 1, 2, 0), strict=True):
        oracle.assert_same(y, plain.linears[i](X) * 2, f"y of linear {i}")


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_logits_are_those_of_the_unjoined_model(model_type, make_tiny):
    model = AutoModelForCausalLM.from_pretrained(make_tiny(model_type, num_hidden_layers=2)).eval()
    method = QuantizeConfig(method="hadamard").build_method()
    for index, block in enumerate(model.model.layers):
        family = family_of(model.config)
        method.quantize(Block.of(block, index, (), family), Streams())
    tokens = torch.randint(0, 300, (2, 12), generator=inputs.generator(0))
    expected = model(tokens).logits
    for module in model.modules():
        if isinstance(module, MXFP4Linear):
            module.prepare()
    block = model.model.layers[0]
    for linear in (block.self_attn.q_proj, block.mlp.up_proj):
        assert linear.shared_input.joined is not None
    oracle.assert_same(model(tokens).logits, expected, "logits")
    new = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    joined = model.generate(tokens, **new)
    for layer in model.model.layers:
        unshare_input(layer.self_attn)
        unshare_input(layer.mlp)
        for module in layer.modules():
            if isinstance(module, MXFP4Linear):
                module.shared_input = None
    oracle.assert_same(model(tokens).logits, expected, "logits of the unjoined model")
    oracle.assert_same(joined, model.generate(tokens, **new), "tokens")
