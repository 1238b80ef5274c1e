"""Sources of float models: safetensors folders, and their fingerprint."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from duqpp.errors import InputError
from duqpp.models import weights as weights_module
from duqpp.models.source import fingerprint, open_source
from duqpp.models.stack import DecoderStack
from tests.checkpoint import damage

UP = "model.layers.1.mlp.up_proj.weight"


# Folders.


@pytest.mark.parametrize("shard_size", [None, "60KB"])
def test_tensors_are_those_that_transformers_loads(shard_size, make_tiny):
    folder = make_tiny("qwen2", shard_size, tie_word_embeddings=True)
    source = open_source(str(folder))
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected.pop("lm_head.weight")  # tied
    assert source.names == set(expected)
    for name, tensor in expected.items():
        assert source.tensor(name).dtype == tensor.dtype
        assert torch.equal(source.tensor(name), tensor), name
    assert source.config.model_type == "qwen2"
    assert source.tokenizer()("The capital")["input_ids"]


def test_home_folder_is_understood(tiny_llama, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_llama.parent))
    assert open_source(f"~/{tiny_llama.name}").names


def test_one_shard_is_open_at_a_time(make_tiny, monkeypatch):
    folder = make_tiny("llama", "60KB")
    source, opened = open_source(str(folder)), []
    original = weights_module._opened
    monkeypatch.setattr(
        weights_module, "_opened", lambda shard: opened.append(shard.name) or original(shard)
    )
    stack = DecoderStack(source)
    opened.clear()
    stack.block(0)
    index = json.loads((folder / damage.INDEX).read_text())["weight_map"]
    assert sorted(opened) == sorted({index[n] for n in source.names if "layers.0." in n})


def test_missing_tensor(tiny_llama):
    with pytest.raises(InputError, match=r"has no tensor model\.nothing"):
        open_source(str(tiny_llama)).tensor("model.nothing")


# Fingerprints.


@pytest.fixture
def model(make_tiny, tmp_path) -> Path:
    return damage.copy_of(make_tiny("llama"), tmp_path / "model")


def of(folder: Path) -> str:
    return fingerprint(open_source(str(folder)))


def test_fingerprint_does_not_depend_on_place_or_shards(make_tiny, model):
    expected = of(make_tiny("llama"))
    assert of(model) == expected
    assert of(make_tiny("llama", "60KB")) == expected


@pytest.mark.parametrize("position", [0, 1, 3000, 6143])
def test_fingerprint_sees_every_weight(position, model):
    before = of(model)
    weight = damage.get_tensor(model, UP)
    weight.view(torch.int32).view(-1)[position] ^= 1
    damage.set_tensor(model, UP, weight)
    assert of(model) != before


def test_fingerprint_sees_shape_dtype_and_name(tiny_llama):
    config, one = open_source(str(tiny_llama)).config, torch.ones(2, 6)
    tensors = [{"a": one}, {"b": one}, {"a": one.view(3, 4)}, {"a": one.view(torch.int32)}]
    assert len({fingerprint(Given(config, each)) for each in tensors}) == len(tensors)


class Given(SimpleNamespace):
    """A source that has the tensors it is given."""

    def __init__(self, config, tensors):
        super().__init__(config=config, names=frozenset(tensors), tensor=tensors.__getitem__)

    __hash__ = object.__hash__


def test_fingerprint_sees_the_configuration(model):
    before = of(model)
    damage.edit_json(model / "config.json", lambda c: c.update(transformers_version="4.0.0"))
    assert of(model) == before
    damage.edit_json(model / "config.json", lambda c: c["rope_parameters"].update(rope_theta=1e6))
    assert of(model) != before
