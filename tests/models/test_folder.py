"""Folders that are no model, and files that no reader comes to the end of: one line says which."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from duqpp.errors import DuqppError, InputError
from duqpp.integrations.transformers import load_model
from duqpp.models.quiet import quiet_libraries
from duqpp.models.source import fingerprint, open_source
from tests.checkpoint import damage

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD = "model-00002-of-00007.safetensors"
OTHERS = ("generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja")
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
READERS = {"open": lambda folder: open_source(folder).tokenizer(), "load": load_model}


@pytest.fixture
def model(make_tiny, tmp_path) -> Path:
    """A copy of the tiny Llama, in shards."""
    folder = damage.copy_of(make_tiny("llama", shard_size="60KB"), tmp_path / "model")
    assert (folder / SHARD).exists()
    return folder


def refusal(reader: str, folder: Path) -> str:
    """The error of a reader: one line, that says nothing twice and not all of a file."""
    with quiet_libraries(), pytest.raises(DuqppError) as raised:
        READERS[reader](str(folder))
    message = str(raised.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


def replaced(file: Path, make: Callable[[Path], object]) -> None:
    if file.is_symlink() or file.exists():
        file.unlink()
    make(file)


ENDLESS = {
    "a pipe": os.mkfifo,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a terabyte": lambda file: (file.touch(), os.truncate(file, 2**40)),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("name", [CONFIG, INDEX, SHARD, *OTHERS])
def test_a_file_without_end(name, kind, reader, model):
    replaced(model / name, ENDLESS[kind])
    assert str(model / name) in refusal(reader, model)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ENDLESS)
def test_a_single_file_without_end(kind, reader, make_tiny, tmp_path):
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "model")
    replaced(folder / SINGLE, ENDLESS[kind])
    assert str(folder / SINGLE) in refusal(reader, folder)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [CONFIG, INDEX])
@pytest.mark.parametrize(
    "content",
    [
        *[b"", b"{", b"[]", b"null", b"5", b'"' + b"x" * 9999 + b'"', DEEP, b"[" * 100_000],
        *[
            b"\xff\xfe" + b"x" * 5000,
            '{"a": 1}'.encode("utf-16"),
            b"\xef\xbb\xbf{}",
            b"\x80" * 9999,
        ],
    ],
    ids=lambda content: repr(content[:9]),
)
def test_json_that_is_none(content, name, reader, model):
    (model / name).write_bytes(content)
    assert str(model / name) in refusal(reader, model)


@pytest.mark.parametrize("content", [b"[]", b"\xff", DEEP])
def test_an_index_that_is_not_read(content, make_tiny, tmp_path):
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "model")
    (folder / INDEX).write_bytes(content)
    assert open_source(str(folder)).names
    assert load_model(str(folder))


@pytest.mark.parametrize(
    "shard",
    [
        *["sub/absent.safetensors", "absent.safetensors", "absent.bin", CONFIG, "", ".", "x/.."],
        *["../model.safetensors", "/etc/passwd", "a\0.safetensors", "a\nb.safetensors", "\ud800"],
        *["a" * 300 + ".safetensors", 5, None, ["x"]],
    ],
    ids=lambda shard: repr(shard)[:20],
)
def test_a_shard_that_is_none(shard, model):
    damage.edit_json(model / INDEX, lambda index: index["weight_map"].update(x=shard))
    message = refusal("open", model)
    assert str(model) in message
    assert "cannot read" in message or "which is not in" in message


HEADER = {"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}
HEADERS = {
    "numbers in the metadata": json.dumps({"__metadata__": {"more": 5}, **HEADER}).encode(),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(HEADER).encode(),
    "UTF-16": json.dumps(HEADER).encode("utf-16"),
    "offsets beyond the file": json.dumps(HEADER).replace("256", "99999").encode(),
    "offsets below 0": json.dumps(HEADER).replace("[0", "[-4").encode(),
    "another dtype": json.dumps(HEADER).replace("F32", "F99").encode(),
    "a list": b"[]",
    "too many levels": DEEP,
    "nothing": b"",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("header", HEADERS)
def test_header_that_is_none(header, reader, model):
    content = HEADERS[header]
    (model / SHARD).write_bytes(len(content).to_bytes(8, "little") + content + bytes(256))
    assert str(model / SHARD) in refusal(reader, model)


def test_a_shard_by_the_name_of_a_single_file(model):
    """transformers takes it for the whole model, and so finds tensors missing."""
    (model / SHARD).rename(model / SINGLE)
    index = (model / INDEX).read_text().replace(SHARD, SINGLE)
    (model / INDEX).write_text(index)
    for reader in READERS:
        assert f"{model} has no tensor " in refusal(reader, model)


def test_a_shard_in_a_folder_below(model):
    expected = fingerprint(open_source(str(model)))
    (model / "weights").mkdir()
    shutil.move(model / SHARD, model / "weights" / SHARD)
    index = (model / INDEX).read_text().replace(SHARD, f"weights/{SHARD}")
    (model / INDEX).write_text(index)
    assert fingerprint(open_source(str(model))) == expected


def test_a_part_of_a_distributed_checkpoint(model):
    (model / "shard-00000-model-00000-of-00001.safetensors").touch()
    assert "is part of a distributed checkpoint" in refusal("open", model)


def test_a_link_to_nothing_is_no_file(model):
    (model / "notes.txt").symlink_to(model / "lost.txt")
    assert open_source(str(model)).names
    assert load_model(str(model))


# What a folder holds instead of a model.


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kept", [(), (CONFIG, SHARD, INDEX)])
def test_an_adapter(kept, reader, model):
    for file in model.iterdir():
        if file.name not in kept:
            file.unlink()
    (model / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(reader, model)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("has_config", [True, False])
def test_gguf_files(has_config, reader, model):
    for file in model.iterdir():
        if file.name != CONFIG or not has_config:
            file.unlink()
    for name in ("b.gguf", "a.gguf"):
        (model / name).touch()
    message = refusal(reader, model)
    assert message.endswith(f"of GGUF files, give the path of one: {model / 'a.gguf'}")


def test_pickled_weights(model):
    for file in model.glob("*.safetensors*"):
        file.unlink()
    assert "and save by save_pretrained" not in refusal("open", model)
    (model / "pytorch_model.bin").touch()
    assert refusal("open", model).endswith("and save by save_pretrained")


# A whole float model, of any architecture that transformers has.


@pytest.fixture
def gpt2(make_tiny, tmp_path) -> Path:
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "gpt2")
    config = AutoConfig.for_model("gpt2", vocab_size=320, n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_an_architecture_that_is_not_quantized_loads(gpt2):
    with pytest.raises(InputError, match="model_type 'gpt2' is not supported"):
        open_source(str(gpt2))
    assert load_model(str(gpt2))[0].config.model_type == "gpt2"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_float_model_that_is_not_whole(kind, gpt2, make_tiny, tmp_path):
    folder = gpt2 if kind == "gpt2" else damage.copy_of(make_tiny(kind), tmp_path / kind)
    name = {"gpt2": "transformer.h.0.mlp.c_proj.weight", "llama": "model.norm.weight"}[kind]
    damage.set_tensor(folder, name, torch.ones(3))
    assert f"{name} must be [" in refusal("load", folder)
    damage.edit_tensors(folder, name, lambda tensors: tensors.pop(name))
    assert refusal("load", folder) == f"{folder} has no tensor {name}"
