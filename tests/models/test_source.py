"""Sources of float models: safetensors folders, and their fingerprint."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from duqpp.errors import InputError
from duqpp.models import source as source_module
from duqpp.models.source import SafetensorsSource, fingerprint, open_source
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
    source = SafetensorsSource(make_tiny("llama", "60KB"))
    opened = []
    original = source_module._open_shard
    monkeypatch.setattr(
        source_module, "_open_shard", lambda shard: opened.append(shard.name) or original(shard)
    )
    stack = DecoderStack(source)
    opened.clear()
    stack.block(0)
    shards_of_block = {source._shard_of[n].name for n in source.names if "layers.0." in n}
    assert sorted(opened) == sorted(shards_of_block), "each once"
    assert source._open[0].name == opened[-1]


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


def test_fingerprint_sees_shape_dtype_and_name(model):
    seen = {of(model)}
    weight = damage.get_tensor(model, UP)
    damage.set_tensor(model, UP, weight.view(64, 96))
    seen.add(of(model))
    damage.set_tensor(model, UP, weight.view(torch.bfloat16))
    seen.add(of(model))
    damage.set_tensor(model, UP, weight)
    assert of(model) in seen
    damage.edit_tensors(model, UP, lambda t: t.update({"model.layers.1.other": t.pop(UP)}))
    seen.add(of(model))
    assert len(seen) == 4


def test_fingerprint_sees_the_configuration(model):
    before = of(model)
    damage.edit_json(model / "config.json", lambda c: c.update(transformers_version="4.0.0"))
    assert of(model) == before
    damage.edit_json(model / "config.json", lambda c: c["rope_parameters"].update(rope_theta=1e6))
    assert of(model) != before
