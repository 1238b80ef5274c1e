"""A checkpoint with any file altered in any way: refused in one line, never loaded, never stuck.

And a checkpoint whose manifest is gone, so that any JSON value may be what it is: loaded or refused
in one line.
"""

import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import duqpp
from duqpp.checkpoint.manifest import MANIFEST_FILE
from duqpp.checkpoint.shard import INDEX_FILE
from duqpp.errors import DuqppError
from duqpp.evaluation.models import open_model
from duqpp.evaluation.perplexity import perplexity
from duqpp.integrations.compressed_tensors import export_compressed_tensors
from duqpp.integrations.serving import verify_folder
from duqpp.integrations.transformers import load_model
from duqpp.tools.inspection import inspect_model
from tests.checkpoint import alterations

SECONDS = 20  # for one load; each takes far less


@contextmanager
def limited() -> Iterator[None]:
    """An error where the loading of a folder waits for ever, as for the writer of a pipe."""

    def stop(*_):
        raise AssertionError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def made(make_tiny, tmp_path_factory) -> Path:
    """A small checkpoint with a file of every kind."""
    source = make_tiny("qwen2", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    source = Path(shutil.copytree(source, tmp_path_factory.mktemp("altered") / "model"))
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\n")
    out = source.with_name("out")
    return duqpp.quantize_model(str(source), out, duqpp.QuantizeConfig(method="hadamard")).folder


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "README.md")


def alterations_of(file: Path) -> Iterator[tuple[str, alterations.Change]]:
    """All that this module tries on a file, seeded by its name."""
    random_ = random.Random(file.name)
    yield from alterations.of_kind()
    yield from alterations.of_bytes(file.read_bytes(), 25, random_)
    if file.suffix == ".json":
        text = file.read_text()
        yield from alterations.of_fields(text, 2 if len(text) < 2**14 else 1, random_)


@contextmanager
def altered(made: Path, file: Path, change: alterations.Change) -> Iterator[None]:
    """The copy of a file of `made`, altered meanwhile."""
    content = file.read_bytes()
    change(file)
    try:
        yield
    finally:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.write_bytes(content)


def fault(load, what: str) -> str | None:
    """What is wrong with how `load` takes an altered folder; None where it refuses in one line."""
    try:
        with limited():
            load()
    except DuqppError as error:
        return f"{what}: {error}" if "\n" in str(error) or len(str(error)) > 700 else None
    except Exception as error:
        return f"{what}: {type(error).__name__}: {str(error)[:200]}"
    return f"{what}: loaded"


def evaluated(folder: Path) -> None:
    """A model goes through a few tokens, block by block."""
    model, _ = open_model(str(folder))
    perplexity(model, torch.arange(6), seq_len=3)


FILES = [
    *("chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    *(INDEX_FILE, "quantization_report.json", "tokenizer_config.json"),
    MANIFEST_FILE,
]


def test_every_file_is_altered_in_thousands_of_ways(made):
    assert files(made) == sorted(FILES)
    assert sum(1 for name in FILES for _ in alterations_of(made / name)) > 3000


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_refused(name, made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "out"))
    faults = []
    for what, change in alterations_of(made / name):
        if (name, what) == (MANIFEST_FILE, "absent"):
            continue  # as in a checkpoint of an older duqpp
        with altered(made, folder / name, change):
            faults.append(fault(lambda: duqpp.from_pretrained(folder), what))
    assert not [f for f in faults if f], name
    duqpp.from_pretrained(folder)


@pytest.mark.parametrize("name", FILES)
def test_every_loader_refuses_an_altered_file(name, made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "out"))
    loaders = {
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "generate": lambda: load_model(str(folder)),
        "eval": lambda: evaluated(folder),
        "inspect": lambda: inspect_model(str(folder)),
        "export": lambda: export_compressed_tensors(folder, tmp_path / "exported"),
        "vLLM": lambda: verify_folder(folder),
    }
    content = (made / name).read_bytes()
    middle = len(content) // 2  # of a shard, a value of a tensor
    changes = {"a byte": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]}
    changes |= {"cut": content[:-30]}
    for what, new in changes.items():
        with altered(made, folder / name, lambda path, new=new: path.write_bytes(new)):
            for loader, load in loaders.items():
                if loader == "inspect" and name.endswith(".safetensors"):
                    continue  # it reads no tensor
                found = fault(load, f"{what}, {loader}")
                # transformers parses these two before it asks duqpp, and its error is as it is.
                is_outside = loader == "AutoModel" and name in ("config.json", INDEX_FILE)
                assert found is None or (is_outside and not found.endswith("loaded")), found


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_without_a_manifest_no_value_is_more_than_one_line(name, made, tmp_path):
    """A value that the manifest does not vouch for may load, or is refused; nothing else."""
    if name == MANIFEST_FILE:
        pytest.skip("the manifest is what is left out")
    folder = Path(shutil.copytree(made, tmp_path / "out"))
    (folder / MANIFEST_FILE).unlink()
    faults = []
    random_ = random.Random(name)
    changes = list(alterations.of_fields((made / name).read_text(), 1, random_))
    changes = random_.sample(changes, min(len(changes), 60)) + list(alterations.of_kind())[1:]
    for what, change in changes:
        with altered(made, folder / name, change):
            for load in (lambda: load_model(str(folder)), lambda: evaluated(folder)):
                found = fault(load, what)
                faults += [found] if found and not found.endswith(": loaded") else []
    assert not faults, name
