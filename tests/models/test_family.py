"""Families: linear groups, what makes their inputs, names, and the skip list."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import duqpp
from duqpp.checkpoint.layout import Layout, convert_block
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.integrations.transformers import DuqppConfig
from duqpp.models import family as registry
from duqpp.models.family import (
    Family,
    LinearGroup,
    Llama,
    Norm,
    Rows,
    Stored,
    family_of,
    is_skipped,
)
from duqpp.models.source import Source, open_source
from duqpp.models.stack import DecoderStack
from duqpp.nn import MXFP4Linear
from duqpp.tools.inspection import inspect_model
from tests.families import FAMILIES, LLAMA

TOKENS = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def inputs_of(model: nn.Module, block: nn.Module) -> dict[str, torch.Tensor]:
    """What each linear of a block reads when the model runs."""
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, linear in linears_of(block).items()
    ]
    with torch.no_grad():
        model(input_ids=TOKENS)
    for hook in hooks:
        hook.remove()
    return inputs


# What holds for every family of the registry.


@pytest.mark.parametrize("model_type", FAMILIES)
def test_groups_are_all_linears_of_a_block(model_type, make_tiny):
    model = AutoModelForCausalLM.from_pretrained(make_tiny(model_type))
    family = family_of(model.config)
    for index, block in enumerate(model.get_submodule(family.blocks)):
        grouped = [name for group in family.groups(index) for name in group.linears]
        assert sorted(grouped) == sorted(linears_of(block))
        for group in family.groups(index):
            for name in group.linears:
                assert family.group_of(f"{family.block_name(index)}.{name}") == (index, group)
    named = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(family.quantized_linears(())) == named - {"lm_head"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_linears_of_a_group_read_one_tensor(model_type, make_tiny):
    """And the groups come in the order of the forward pass."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny(model_type)).eval()
    family = family_of(model.config)
    inputs = inputs_of(model, model.get_submodule(family.block_name(1)))
    groups = family.groups(1)
    for group in groups:
        first = inputs[group.linears[0]]
        assert all(inputs[name] is first for name in group.linears), group.name
    assert len({id(inputs[group.linears[0]]) for group in groups}) == len(groups)
    assert [name for group in groups for name in group.linears] == list(inputs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_an_owner_returns_for_its_last_linear(model_type, make_tiny):
    """To the last bit, and in the same structure; each owner has one such linear."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny(model_type)).eval()
    family = family_of(model.config)
    block = model.get_submodule(family.block_name(1))
    groups = family.groups(1)
    last = [group for group in groups if group.returns is not None]
    assert {group.owner for group in last} == {group.owner for group in groups}
    returned = {}
    for group in last:
        owner = block.get_submodule(group.owner)
        owner.register_forward_hook(lambda _, __, out, o=group.owner: returned.update({o: out}))
    read = inputs_of(model, block)
    for group in last:
        (name,) = group.linears
        expected = returned[group.owner]
        with torch.no_grad():
            found = group.returns(block.get_submodule(name)(read[name]))
        assert type(found) is type(expected)
        found, expected = ([t] if isinstance(t, torch.Tensor) else t for t in (found, expected))
        assert len(found) == len(expected) and found[1:] == expected[1:]
        assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_producer_divides_the_channels_that_its_group_reads(model_type, make_tiny):
    generator = torch.Generator().manual_seed(2)
    config = open_source(str(make_tiny(model_type))).config
    for group in (group for group in family_of(config).groups(1) if group.producer):
        model = AutoModelForCausalLM.from_pretrained(make_tiny(model_type)).eval()
        block = model.get_submodule(family_of(config).block_name(1))
        before = inputs_of(model, block)[group.linears[0]]
        weights = {name: linear.weight.detach() for name, linear in linears_of(block).items()}
        given = torch.rand(before.shape[-1] // group.repeats, generator=generator) * 3 + 0.25
        absorbed = group.producer.absorb(block, weights, given.double())
        torch.testing.assert_close(absorbed, given.double(), rtol=1e-6, atol=0)
        for name, weight in weights.items():
            block.get_submodule(name).weight.data = weight
        after = inputs_of(model, block)[group.linears[0]]
        expected = before / group.per_reader(absorbed).float()
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)


def test_a_linear_in_floating_point_absorbs_nothing(make_tiny):
    model = AutoModelForCausalLM.from_pretrained(make_tiny("qwen2"))
    block, scales = model.model.layers[0], torch.full((32,), 2.0, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert Rows("self_attn.v_proj").absorb(block, {}, scales) is None
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_rows_of_a_fused_linear_absorb():
    block = nn.ModuleDict({"qkv_proj": nn.Linear(8, 6)})
    linear = block["qkv_proj"]
    weights, bias = {"qkv_proj": linear.weight.detach()}, linear.bias.detach().clone()
    absorbed = Rows("qkv_proj", (4, 6)).absorb(block, weights, torch.tensor([2.0, 4.0]).double())
    divisor = torch.tensor([1, 1, 1, 1, *absorbed.tolist()])
    torch.testing.assert_close(weights["qkv_proj"], linear.weight / divisor[:, None])
    torch.testing.assert_close(linear.bias, bias / divisor)


def test_a_model_of_no_family():
    listed = ", ".join(FAMILIES)
    for config in (
        SimpleNamespace(model_type="gpt2"),
        SimpleNamespace(model_type=[]),
        SimpleNamespace(),
    ):
        with pytest.raises(InputError, match=f"is not supported; duqpp quantizes {listed}$"):
            family_of(config)


def test_names_of_linears():
    gate_up = LLAMA.groups(0)[2]
    assert LLAMA.group_of("model.layers.11.mlp.up_proj") == (11, gate_up)
    # Of a wrapped model.
    assert LLAMA.group_of("language_model.model.layers.0.mlp.up_proj") == (0, gate_up)
    for name in ("mlp.up_proj", "model.layers.mlp.up_proj", "model.layers.0.mlp.up", "lm_head"):
        assert LLAMA.group_of(name) is None, name
    assert LLAMA.group_of("model.layers.0.mlp.up_proj.weight") is None


# Families that are yet to come, in small: what the seam must hold.


# What is stored of a tiny Llama: rows of which tensor each of its linears has.
FUSED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", slice(0, 64)),
    "self_attn.k_proj": ("self_attn.qkv_proj", slice(64, 96)),
    "self_attn.v_proj": ("self_attn.qkv_proj", slice(96, 128)),
    "mlp.gate_proj": ("mlp.gate_up_proj", slice(0, 96)),
    "mlp.up_proj": ("mlp.gate_up_proj", slice(96, 192)),
}


class Fused(Llama):
    """A Llama whose checkpoint has linears that read one input side by side in one tensor."""

    def stored(self, name: str) -> Stored:
        for linear, (fused, rows) in FUSED.items():
            if f".{linear}." in name:
                return Stored(name.replace(linear, fused), rows)
        return Stored(name)


class FusedSource:
    """A tiny Llama as such a checkpoint."""

    def __init__(self, source: Source) -> None:
        self.source, self.config = source, source.config
        self.names = frozenset(Fused(source.config).stored(name).name for name in source.names)

    def tensor(self, name: str) -> torch.Tensor:
        parts = [linear for linear, (fused, _) in FUSED.items() if f".{fused}." in name]
        names = [name.replace(FUSED[linear][0], linear) for linear in parts]
        return torch.cat([self.source.tensor(name) for name in names or [name]])


def test_linears_that_are_slices_of_a_stored_tensor(make_tiny, monkeypatch):
    source = open_source(str(make_tiny("llama")))
    expected = DecoderStack(source).block(1).state_dict()
    monkeypatch.setitem(registry.FAMILIES, "llama", Fused)
    fused = FusedSource(source)
    assert not fused.names & source.names & {f"model.layers.1.{n}.weight" for n in FUSED}
    found = DecoderStack(fused).block(1).state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class Mixture(Family):
    """Blocks with an MLP first; from the second on, with two experts instead."""

    model_types = ("mixture",)

    def groups(self, index: int) -> tuple[LinearGroup, ...]:
        if index == 0:
            names = ("mlp.gate_proj", "mlp.up_proj")
            return (LinearGroup("gate_up", names, Norm("norm"), reads="hidden_size"),)
        return tuple(
            LinearGroup(
                f"expert{expert}",
                (f"mlp.{expert}.gate_proj", f"mlp.{expert}.up_proj"),
                reads="hidden_size",
                expert=expert,
            )
            for expert in range(2)
        )

    def widths(self) -> dict[str, int]:
        return {"hidden_size": self.config.hidden_size}


class Routed(nn.Module):
    """A block whose second expert sees no token."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleList(_Gated() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.mlp[0](x), self.mlp[1](x[:0])])


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(x) * self.up_proj(x)


@pytest.fixture
def mixture(monkeypatch) -> Family:
    monkeypatch.setitem(registry.FAMILIES, "mixture", Mixture)
    sizes = dict.fromkeys(("vocab_size", "num_attention_heads", "num_key_value_heads"), 2)
    config = SimpleNamespace(model_type="mixture", num_hidden_layers=2, hidden_size=64, **sizes)
    return family_of(config)


def test_blocks_with_groups_of_their_own(mixture):
    mixture.check(("mlp.1",))
    assert [[g.name for g in mixture.quantized_groups(i, ())] for i in range(2)] == [
        ["gate_up"],
        ["expert0", "expert1"],
    ]
    assert [g.expert for g in mixture.quantized_groups(1, ("mlp.0",))] == [1]
    assert mixture.kinds() == dict.fromkeys(("gate_up", "expert0", "expert1"), "gate, up")
    assert mixture.group_of("model.layers.1.mlp.1.up_proj") == (1, mixture.groups(1)[1])
    assert mixture.group_of("model.layers.0.mlp.1.up_proj") is None
    assert len(list(mixture.quantized_linears(("model.layers.0",)))) == 4


def test_an_expert_without_tokens_is_converted_and_runs(mixture):
    block, layout = Routed().eval(), Layout("hadamard", "shared", False, "mse", "even")
    convert_block(block, mixture.quantized_groups(1, ()), layout)
    assert sum(isinstance(m, MXFP4Linear) for m in block.modules()) == 4
    with torch.no_grad():
        assert block(torch.randn(3, 64)).shape == (3, 32)


# What is quantized.


@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        ("lm_head", False),
        ("down_proj", True),
        ("mlp.down_proj", True),
        ("mlp", True),
        ("layers.1", True),
        ("lp", False),
        ("model.layers.1", True),
        ("model.layers.1.mlp", True),
        ("model.layers.1.mlp.down_proj", True),
        ("model.layers.11", False),
        ("model.layers.1.mlp.down", False),
        ("proj", False),
        ("own_proj", False),
        ("model", True),
        ("", False),
    ],
)
def test_skip_list(skip, skipped):
    assert is_skipped("model.layers.1.mlp.down_proj", (skip,)) is skipped


def test_block_ten_is_not_block_one():
    assert not is_skipped("model.layers.10.mlp.down_proj", ("model.layers.1",))


def test_groups_without_what_is_skipped():
    assert LLAMA.quantized_groups(0, ()) == LLAMA.groups(0)
    assert [g.name for g in LLAMA.groups(0)] == ["qkv", "o", "gate_up", "down"]
    assert all(g.is_whole for g in LLAMA.quantized_groups(0, ("o_proj",)))
    partly = LLAMA.quantized_groups(0, ("up_proj", "self_attn.o_proj", "model.layers.1"))
    assert [g.label for g in partly] == ["q, k, v", "gate", "down"]
    assert [g.is_whole for g in partly] == [True, False, True]
    assert [g.shares_input for g in partly] == [True, False, False]
    assert LLAMA.quantized_groups(1, ("model.layers.1",)) == ()


def test_architecture_names_what_is_wrong(make_tiny):
    config = open_source(str(make_tiny("llama"))).config
    family_of(config).check(("lm_head", "down_proj", "model.layers.1.self_attn"))
    with pytest.raises(InputError, match="`skip`: down_prj names no linear"):
        family_of(config).check(("down_prj",))
    family_of(config).check(("mlp", "model.layers.0.self_attn"))
    with pytest.raises(InputError, match="`skip`: mlp, self_attn leaves no linear to quant"):
        family_of(config).check(("mlp", "self_attn"))
    config.hidden_size = 72
    with pytest.raises(InputError, match="hidden_size is 72; MXFP4 needs a multiple of 32"):
        family_of(config).check(())


@pytest.mark.parametrize(
    ("field", "value", "skip"),
    [
        ("intermediate_size", 100, ("down_proj",)),
        ("head_dim", 10, ("o_proj",)),
        ("hidden_size", 80, ("q_proj", "k_proj", "v_proj", "mlp.gate_proj", "mlp.up_proj")),
    ],
)
def test_a_width_matters_only_to_what_is_quantized(field, value, skip, make_tiny, tmp_path):
    """And that of a checkpoint to what is quantized in it, for each of its readers."""
    model, out = make_tiny("llama", **{field: value}), tmp_path / "out"
    config = QuantizeConfig(method="hadamard", skip=skip, samples=2, seq_len=32)
    for fewer in ((), skip[1:]):
        with pytest.raises(InputError, match=r"; MXFP4 needs a multiple of 32 \(`skip` leaves out"):
            duqpp.quantize_model(str(model), out, replace(config, skip=fewer))
        with pytest.raises(InputError, match="MXFP4 needs a multiple of 32"):
            inspect_model(str(model), replace(config, skip=fewer))
    inspect_model(str(model), config)
    duqpp.quantize_model(str(model), out, config)
    assert inspect_model(str(out)).groups
    saved, tokens = duqpp.from_pretrained(out), torch.arange(2, 34)[None]
    on_load = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=DuqppConfig(method="hadamard", skip=skip)
    )
    assert torch.equal(saved(tokens).logits, on_load(tokens).logits)


def test_head_dim_has_a_default(make_tiny):
    config = open_source(str(make_tiny("llama"))).config
    assert Llama(config).head_dim == 16
    config.head_dim = None
    assert Llama(config).head_dim == config.hidden_size // config.num_attention_heads
