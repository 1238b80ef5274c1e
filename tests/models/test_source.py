"""Sources of float models: safetensors folders, GGUF files, the hub, and their fingerprint."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.models import source as source_module
from duqpp.models.source import SafetensorsSource, fingerprint, open_source
from duqpp.models.stack import DecoderStack
from duqpp.tools.inspection import inspect_model
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


# The hub.


@pytest.fixture
def hub(monkeypatch):
    """A hub that has one repository. files: of it; asked: name and options of each download."""
    hub = SimpleNamespace(files=None, asked=[])

    def snapshot_download(name, **options):
        hub.asked.append((name, options))
        return str(hub.files)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return hub


def test_hub_name(tiny_llama, hub):
    hub.files = tiny_llama
    assert open_source("someone/some-model").names
    assert [name for name, _ in hub.asked] == ["someone/some-model"] * 2
    assert hub.asked[0][1] == {"allow_patterns": ["config.json"]}
    options = hub.asked[1][1]
    fetched = set(filter_repo_objects([*WANTED, *UNWANTED], **options))
    assert fetched == set(WANTED)


WANTED = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat.jinja"]
WANTED += ["model.safetensors.index.json", "tokenizer.json", "merges.txt"]
UNWANTED = ["pytorch_model.bin", "modeling.py", "consolidated.safetensors", "consolidated.00.pth"]
UNWANTED += ["consolidated.safetensors.index.json", "original/params.json", "onnx/config.json"]
UNWANTED += ["original/consolidated.00.safetensors"]


@pytest.mark.parametrize("open_it", [open_source, inspect_model], ids=["open", "inspect"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantized already \(fp8\)"),
        (None, "someone/some-model has no config.json on the hub"),
    ],
)
def test_what_cannot_be_quantized_is_not_downloaded(change, message, open_it, model, hub):
    hub.files = model
    if change is None:
        (model / "config.json").unlink()
    else:
        damage.edit_json(model / "config.json", lambda c: c.update(change))
    with pytest.raises(InputError, match=message):
        open_it("someone/some-model")
    assert [options["allow_patterns"] for _, options in hub.asked] == [["config.json"]]


@pytest.mark.parametrize("name", ["/no/model", "./model", "../model", "~/model", "a/b/c", "out/"])
def test_a_path_is_not_asked_from_the_hub(name, hub):
    with pytest.raises(InputError, match=f"^no such folder or file: {name}$"):
        open_source(name)
    assert not hub.asked


def test_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="someone/some-model is no local folder") as raised:
        open_source("someone/some-model")
    assert "\n" not in str(raised.value)


# GGUF files.


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
    with pytest.raises(InputError, match=r"lacks the tensor|cannot load"):
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


def test_gguf_parsing_leaves_the_parser_as_it_was(gguf_file, tmp_path):
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    open_source(str(gguf_file))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    with pytest.raises(InputError):
        open_source(str(bad))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
