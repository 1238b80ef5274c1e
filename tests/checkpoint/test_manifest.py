"""The manifest: every file of a checkpoint that decides something is what it was when saved."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import duqpp
from duqpp.checkpoint.manifest import MANIFEST_FILE, MODEL_FILES, verify_manifest, write_manifest
from duqpp.errors import CheckpointError
from tests.checkpoint import damage


@pytest.fixture(scope="module")
def made(make_tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("manifest") / "out"
    return duqpp.quantize_model(
        str(make_tiny("llama")), out, duqpp.QuantizeConfig(method="hadamard")
    ).folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        verify_manifest(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_was_saved_passes(folder, caplog):
    verify_manifest(folder)
    assert not caplog.records
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    assert set(files) == {p.name for p in folder.iterdir()} - {MANIFEST_FILE, "README.md"}


def test_a_checkpoint_without_one_gets_a_warning_of_what_is_not_verified(folder, caplog):
    (folder / MANIFEST_FILE).unlink()
    duqpp.from_pretrained(folder)
    assert "not its configuration and its tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(rms_norm_eps=float("nan")), "the field rms_norm_eps differs"),
        (lambda c: c["rope_parameters"].update(rope_theta=10001.0), "rope_parameters.rope_theta "),
        (lambda c: c.pop("hidden_act"), "the field hidden_act is missing"),
        (lambda c: c.update(sliding_window=16), "the field sliding_window was added"),
        (
            lambda c: c["quantization_config"]["scale_rule"].update(activations="mse"),
            "the field quantization_config.scale_rule.activations differs",
        ),
        (lambda c: None, "its values are the same, but it is written in another way"),
    ],
)
def test_a_field_that_differs_is_named(change, message, folder):
    damage.edit_json(folder / "config.json", change)
    said = refusal(folder)
    assert f"{folder / 'config.json'} is not as it was saved: " in said and message in said


def test_a_token_of_the_vocabulary_is_covered(folder):
    damage.edit_json(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update(zz=1))
    assert "the field model.vocab differs" in refusal(folder)


def test_a_truncated_file_is_named(folder):
    file = folder / "generation_config.json"
    file.write_bytes(file.read_bytes()[:-30])
    assert "generation_config.json is not as it was saved: it is not valid JSON" in refusal(folder)


def test_a_missing_file_is_named_outside_of_the_hub_s_cache(folder, tmp_path):
    (folder / "generation_config.json").unlink()
    assert "generation_config.json is not as it was saved: it is missing" in refusal(folder)
    cached = tmp_path / "models--me--model" / "snapshots" / "0123"
    cached.parent.mkdir(parents=True)
    verify_manifest(Path(shutil.move(folder, cached)))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_a_file_that_loaders_would_read_is_not_added(name, folder):
    (folder / name).write_text("{}")
    assert f"{name} is not as it was saved: it was not there" in refusal(folder)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "notes.txt", ".git/config"])
def test_a_file_that_decides_nothing_may_be_added_or_changed(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    verify_manifest(folder)


def test_a_shard_of_another_run_is_found(made, folder, make_tiny, tmp_path):
    """Whole, and of the same model: only its seed differs."""
    shards = []
    for seed in (0, 7):
        config = duqpp.QuantizeConfig(method="random", seed=seed)
        out = duqpp.quantize_model(str(make_tiny("llama")), tmp_path / f"{seed}", config).folder
        shards.append(sorted(out.glob("*.safetensors"))[1])
    shutil.copy(shards[1], shards[0])
    with pytest.raises(CheckpointError, match="it is the shard of another run"):
        duqpp.from_pretrained(shards[0].parent)


def test_a_tokenizer_may_be_saved_beside_a_saved_model(folder, tmp_path):
    """In either order; the manifest of a model says nothing of it."""
    saved = tmp_path / "saved"
    duqpp.from_pretrained(folder).save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, saved / name)
    duqpp.from_pretrained(saved)
    duqpp.from_pretrained(folder).save_pretrained(saved)
    (saved / "tokenizer.json").write_text("{}")
    duqpp.from_pretrained(saved)


def test_leftovers_are_no_part(folder):
    (folder / "model-00002-of-00003.json").write_text("{}")
    write_manifest(folder, leftovers=["model-00002-of-00003.json"])
    (folder / "model-00002-of-00003.json").unlink()
    verify_manifest(folder)


def test_a_newer_manifest_asks_for_a_newer_duqpp(folder, monkeypatch):
    monkeypatch.setattr("duqpp.checkpoint.manifest.FORMAT_VERSION", 2)
    write_manifest(folder, MODEL_FILES)
    monkeypatch.undo()
    assert "upgrade duqpp" in refusal(folder)


def test_every_bit_of_the_manifest_counts(folder):
    file = folder / MANIFEST_FILE
    content = file.read_bytes()
    for bit in range(3, 8 * len(content), 61):
        damage.flip_bit(file, bit)
        assert "duqpp-manifest.json" in refusal(folder), bit
        file.write_bytes(content)
    verify_manifest(folder)


@pytest.mark.parametrize("is_altered", [False, True])
def test_a_model_of_the_hub_s_cache_is_compared_with_its_manifest(
    is_altered, folder, tmp_path, monkeypatch, caplog
):
    """transformers fetches what it reads, and the manifest is none of that."""
    cache, commit = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "models--me--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        shutil.copy(file, snapshot)
    shutil.copy(folder / "config.json", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    if is_altered:
        damage.edit_json(snapshot / "config.json", lambda c: c.update(rms_norm_eps=0.5))

    def download(repository, name, *, revision, cache_dir):
        assert (repository, name) == ("me/model", MANIFEST_FILE)
        assert (revision, cache_dir) == (commit, cache)
        shutil.copy(folder / name, snapshot)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    options = {"cache_dir": cache, "local_files_only": True}
    if is_altered:
        with pytest.raises(CheckpointError, match="the field rms_norm_eps differs"):
            AutoModelForCausalLM.from_pretrained("me/model", **options)
    else:
        AutoModelForCausalLM.from_pretrained("me/model", **options)
        assert not caplog.records
