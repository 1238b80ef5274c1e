"""GGUF files: the same model as a folder, and damaged ones."""

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.models.source import open_source


@pytest.fixture(scope="module")
def gguf_file(tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama in float32, as llama.cpp stores it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    source = open_source(str(tiny_llama))
    config = source.config
    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {
        t["content"]: t["id"] for t in tokenizer["added_tokens"]
    }
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name in sorted(source.names):
        tensor = source.tensor(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp's order of rotary pairs
            heads = tensor.shape[0] // config.head_dim
            tensor = (
                tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            )
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_holds_the_same_model(gguf_file, tiny_llama):
    source, folder = open_source(str(gguf_file)), open_source(str(tiny_llama))
    assert source.names == folder.names
    for name in folder.names:
        assert torch.equal(source.tensor(name), folder.tensor(name)), name
    with pytest.raises(InputError, match=r"tiny.gguf has no tensor model.nothing"):
        source.tensor("model.nothing")
    text = "The capital of France is"
    assert source.tokenizer()(text)["input_ids"] == folder.tokenizer()(text)["input_ids"]


def test_gguf_quantizes_to_the_same_shards(gguf_file, tiny_llama, tmp_path):
    config = QuantizeConfig(samples=2, seq_len=32, max_steps=4)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    for name, model in (("folder", tiny_llama), ("gguf", gguf_file)):
        duqpp.quantize_model(str(model), tmp_path / name, config, calibration=str(text))
    for shard in (tmp_path / "folder").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "gguf" / shard.name).read_bytes()
    provenance = json.loads((tmp_path / "gguf" / "config.json").read_text())
    assert provenance["quantization_config"]["provenance"]["base_model"] == "tiny.gguf"
    duqpp.from_pretrained(tmp_path / "gguf")


def test_missing_gguf():
    with pytest.raises(InputError, match="no such file"):
        open_source("nowhere/model.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"PK" * 99])
def test_gguf_that_is_none(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot load the .* of") as raised:
        open_source(str(tmp_path / "model.gguf"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", [b"blk.1.ffn_up.weight", b"token_embd.weight", b"output_norm.weight"]
)
def test_gguf_without_a_tensor(name, gguf_file, tmp_path):
    """A tensor of another name is no reason to make one up."""
    content = gguf_file.read_bytes()
    assert content.count(name) == 1
    (tmp_path / "model.gguf").write_bytes(content.replace(name, b"x" * len(name)))
    with pytest.raises(InputError, match=r"has no tensor|cannot load"):
        open_source(str(tmp_path / "model.gguf"))


def test_damaged_gguf(gguf_file, tmp_path):
    """GGUF has no checksums: values may change unseen, but an error is always an InputError."""
    rng, content = random.Random(0), gguf_file.read_bytes()
    header = 12_000  # bytes of metadata and tensor information, about
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        try:
            open_source(str(path))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 5


def test_a_file_is_parsed_once_and_from_plain_arrays(gguf_file, monkeypatch):
    import gguf

    parsed = []
    build = gguf.GGUFReader._build_fields
    monkeypatch.setattr(
        gguf.GGUFReader,
        "_build_fields",
        lambda self, *arguments: parsed.append(self.data) or build(self, *arguments),
    )
    open_source(str(gguf_file))
    assert [type(data) for data in parsed] == [np.ndarray]
    assert not parsed[0].flags.owndata, "the file is mapped, not read"


def test_gguf_parsing_leaves_the_parser_as_it_was(gguf_file, tmp_path):
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    open_source(str(gguf_file))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    with pytest.raises(InputError):
        open_source(str(bad))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
