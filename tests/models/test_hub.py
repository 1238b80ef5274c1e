"""Models of the hub: what is downloaded, and what is refused before that."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import filter_repo_objects

from duqpp.errors import InputError
from duqpp.models.source import open_source
from duqpp.tools.inspection import inspect_model
from tests.checkpoint import damage


@pytest.fixture
def model(make_tiny, tmp_path) -> Path:
    return damage.copy_of(make_tiny("llama"), tmp_path / "model")


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


@pytest.mark.parametrize("error", [RuntimeError("no route\nto host"), KeyError("etag"), OSError(5)])
def test_whatever_the_hub_raises_is_one_line(error, monkeypatch):
    """httpx's errors, such as that of a proxy, are of no common kind."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        InputError, match=r"someone/model is no local folder.*, and the hub"
    ) as found:
        open_source("someone/model")
    assert "\n" not in str(found.value)


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
