"""The LLaMA family: linear groups, and the skip list."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from duqpp.errors import InputError
from duqpp.models.family import (
    ARCHITECTURES,
    GROUPS,
    check_architecture,
    head_dim,
    is_skipped,
    is_whole,
    quantized_groups,
)
from duqpp.models.source import open_source

TOKENS = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_groups_are_all_linears_of_a_block(family, make_tiny):
    model = AutoModelForCausalLM.from_pretrained(make_tiny(family))
    linears = {n for n, m in model.model.layers[0].named_modules() if isinstance(m, nn.Linear)}
    grouped = [name for group in GROUPS for name in group.linears]
    assert sorted(grouped) == sorted(linears)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_linears_of_a_group_read_one_tensor(family, make_tiny):
    """And a group's producer is what makes its channels: a zeroed channel of it arrives as zero."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny(family)).eval()
    block, inputs = model.model.layers[1], {}
    with torch.no_grad():
        for group in GROUPS:
            producer = block.get_submodule(group.producer)
            producer.weight.data[3] = 0
            if getattr(producer, "bias", None) is not None:
                producer.bias.data[3] = 0
        for group in GROUPS:
            for name in group.linears:
                block.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, name=name: inputs.update({name: args[0]})
                )
        model(input_ids=TOKENS)
    for group in GROUPS:
        first = inputs[group.linears[0]]
        assert all(inputs[name] is first for name in group.linears), group.name
        assert (first[..., 3] == 0).all(), group.name
        assert (first[..., 4] != 0).any(), group.name


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
    assert [g.name for g in quantized_groups(0, ())] == ["qkv", "o", "gate_up", "down"]
    assert all(is_whole(g) for g in quantized_groups(0, ("o_proj",)))
    partly = quantized_groups(0, ("up_proj", "self_attn.o_proj", "model.layers.1"))
    assert [g.name for g in partly] == ["qkv", "gate_up", "down"]
    assert [is_whole(g) for g in partly] == [True, False, True]
    assert quantized_groups(1, ("model.layers.1",)) == []


def test_architecture_names_what_is_wrong(make_tiny):
    config = open_source(str(make_tiny("llama"))).config
    check_architecture(config, ("lm_head", "down_proj", "model.layers.1.self_attn"))
    with pytest.raises(InputError, match="--skip down_prj names no linear"):
        check_architecture(config, ("down_prj",))
    check_architecture(config, ("mlp", "model.layers.0.self_attn"))
    with pytest.raises(InputError, match="--skip mlp --skip self_attn leaves no linear to quant"):
        check_architecture(config, ("mlp", "self_attn"))
    config.hidden_size = 72
    with pytest.raises(InputError, match="hidden_size is 72; MXFP4 needs a multiple of 32"):
        check_architecture(config, ())


def test_head_dim_has_a_default(make_tiny):
    config = open_source(str(make_tiny("llama"))).config
    assert head_dim(config) == 16
    config.head_dim = None
    assert head_dim(config) == config.hidden_size // config.num_attention_heads
