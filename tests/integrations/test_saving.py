"""What is on disk after saving, and on its way to the hub: bytes, model card, guard."""

import copy
import io
import json

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM

import duqpp
from duqpp.checkpoint.card import CARD_MARK, GUARD, GUARD_FIELD, finish_folder, write_card
from duqpp.nn import MXFP4Linear
from tests import decoder, oracle
from tests.checkpoint import damage

PROMPT = torch.randint(0, 300, (2, 21), generator=torch.Generator().manual_seed(2))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("shard_size", ["50GB", "30KB"])
def test_saving_again_gives_the_same_bytes(shard_size, permuted, tmp_path):
    """Every file. The safetensors library alone would order metadata by chance: 3 copies."""
    saved = []
    for number in range(3):
        model = duqpp.from_pretrained(saved[-1] if saved else permuted)
        saved.append(tmp_path / str(number))
        model.save_pretrained(saved[-1], max_shard_size=shard_size)
    assert len(list(saved[0].glob("*.safetensors"))) > 2 or shard_size == "50GB"
    assert files(saved[0]) == files(saved[1]) == files(saved[2])


def test_each_shard_has_the_checksums_of_its_own_tensors(hadamard, tmp_path):
    duqpp.from_pretrained(hadamard).save_pretrained(tmp_path / "out", max_shard_size="30KB")
    for file in (tmp_path / "out").glob("*.safetensors"):
        entries, metadata, _ = decoder.read_shard(file)
        assert set(json.loads(metadata["duqpp.crc32"])) == set(entries)


def test_saving_over_a_checkpoint_leaves_nothing_of_it_to_be_found(hadamard, tmp_path):
    """Three shards, then one, then many: transformers itself leaves the index, then the one."""
    folder = damage.copy_of(hadamard, tmp_path / "out")
    for shard_size in ("50GB", "30KB"):
        model = duqpp.from_pretrained(folder)
        model.model.norm.weight.data *= 2
        model.save_pretrained(folder, max_shard_size=shard_size)
        for load in (duqpp.from_pretrained, AutoModelForCausalLM.from_pretrained):
            oracle.assert_same(logits(load(folder)), logits(model), "logits")


# The model card.


def test_card_of_a_quantization(permuted, tmp_path):
    card = ModelCard.load(permuted / "README.md")
    assert card.data.library_name == "duqpp" and card.data.pipeline_tag == "text-generation"
    assert {"duqpp", "mxfp4"} <= set(card.data.tags)
    config = json.loads((permuted / "config.json").read_text())["quantization_config"]
    assert card.data.base_model is None  # a folder's name is no name on the hub
    assert config["provenance"]["base_model"] in card.text
    for part in ("`duquant`", "per block", "weights `mse`, activations `even`", "`lm_head`"):
        assert part in card.text, part
    assert f"duqpp {duqpp.__version__}" in card.text
    assert "16 x 1024" not in card.text  # tokens were given, two sequences of 48
    report = json.loads((permuted / "quantization_report.json").read_text())["groups"]
    errors = [group["weight_error"] for group in report]
    assert f"| weights | {100 * sum(errors) / len(errors):.1f} % |" in card.text
    rows = ("inputs, without the rotation", "inputs, as rotated", "outputs")
    assert all(f"| {row} | " in card.text for row in rows)
    assert "### Mean relative rounding error over the linear groups" in card.text
    assert "refine" not in card.text
    stored = decoder.Checkpoint(permuted)
    kinds = ("weight_packed", "weight_scale", "rotation", "permutation")
    size = sum(len(data) for name, data in stored.data.items() if name.endswith(kinds))
    assert f"{size:,} bytes" in card.text
    duqpp.from_pretrained(permuted).save_pretrained(tmp_path / "again")
    assert ModelCard.load(tmp_path / "again" / "README.md").text == card.text


def test_loading_lines_of_the_card_run(hadamard, monkeypatch):
    lines = ModelCard.load(hadamard / "README.md").text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(hadamard)
    values = {}
    exec(lines, values)
    oracle.assert_same(logits(values["model"]), logits(duqpp.from_pretrained(hadamard)), "logits")
    assert values["tokenizer"]("The capital")["input_ids"]


def test_card_of_a_model_of_the_hub(hadamard, tmp_path):
    folder = damage.copy_of(hadamard, tmp_path / "out")

    def change(config):
        config["quantization_config"]["provenance"]["base_model"] = "someone/model"

    damage.edit_json(folder / "config.json", change)
    write_card(folder, "me/model-mxfp4")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/model"
    assert card.data.base_model_relation == "quantized"
    assert 'checkpoint = "me/model-mxfp4"' in card.text


def test_card_of_someone_else_stays(hadamard, tmp_path):
    folder = damage.copy_of(hadamard, tmp_path / "out")
    text = (folder / "README.md").read_text()
    edited = text.replace(CARD_MARK, "").replace("# ", "# My ")
    (folder / "README.md").write_text(edited)
    duqpp.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == edited
    (folder / "README.md").write_text(text.replace("- w4a4", "- w4a4\n- mine"))
    duqpp.from_pretrained(folder).save_pretrained(folder)
    assert "mine" in ModelCard.load(folder / "README.md").data.tags


def test_card_of_a_refined_model(hadamard, tmp_path):
    folder = damage.copy_of(hadamard, tmp_path / "out")
    options = {"refine": "distill", "samples": 16, "refine_samples": 72, "seq_len": 1024}

    def change(config):
        provenance = config["quantization_config"]["provenance"]
        provenance["configuration"] |= options
        provenance["calibration"] = "wiki.txt"

    damage.edit_json(folder / "config.json", change)
    write_card(folder)
    text = ModelCard.load(folder / "README.md").text
    assert ", then refined: `distill` |" in text
    assert "| calibration | wiki.txt, 72 x 1024 tokens |" in text
    assert "Measured before the refinement" in text
    damage.edit_json(
        folder / "config.json",
        lambda c: c["quantization_config"]["provenance"].pop("mean_errors"),
    )
    write_card(folder)
    text = ModelCard.load(folder / "README.md").text
    assert "Mean relative" not in text and "Measured before" not in text


def test_provenance_may_be_absent(hadamard, tmp_path):
    folder = damage.copy_of(hadamard, tmp_path / "out")
    damage.edit_json(folder / "config.json", lambda c: c["quantization_config"].pop("provenance"))
    write_card(folder)
    assert "# A model, quantized to MXFP4" in ModelCard.load(folder / "README.md").text


def test_folders_of_other_models_stay_as_they_are(make_tiny, tmp_path):
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "float")
    (tmp_path / "empty").mkdir()
    before = files(folder)
    finish_folder(folder)
    finish_folder(tmp_path / "empty")
    assert files(folder) == before and not files(tmp_path / "empty")
    for value in (5, "duqpp", [], {"quant_method": "fp8"}):
        config = folder / "config.json"
        damage.edit_json(config, lambda c, value=value: c.update(quantization_config=value))
        before = files(folder)
        finish_folder(folder)
        assert files(folder) == before


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


both_copies = pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickled], ids=["deepcopy", "torch.save"]
)


@both_copies
def test_a_copy_completes_its_own_folders(copied, hadamard, tmp_path):
    model = duqpp.from_pretrained(hadamard)
    other = copied(model)
    model.model.norm.weight.data *= 2
    other.save_pretrained(tmp_path / "out", is_main_process=True)
    assert (tmp_path / "out" / "README.md").exists()
    saved = duqpp.from_pretrained(tmp_path / "out")
    oracle.assert_same(logits(saved), logits(other), "logits")
    assert not torch.equal(logits(other), logits(model))


@both_copies
def test_a_copy_is_a_model_of_its_own(copied, hadamard):
    model = duqpp.from_pretrained(hadamard)
    expected, other = logits(model), copied(model)
    oracle.assert_same(logits(other), expected, "logits of the copy")
    for module in model.modules():
        if isinstance(
            module, MXFP4Linear
        ):  # also those that quantize for the others of their group
            module.rotation.data.zero_()
    oracle.assert_same(logits(other), expected, "logits of the copy of what is no more")
    assert not torch.equal(logits(model), expected)


# To the hub, up to the upload.


@pytest.fixture
def hub(monkeypatch):
    """A hub without a network. uploads: per commit, its files by their paths in the repository.

    card: the model card that the repository has, if any.
    """

    class Hub:
        def __init__(self):
            self.uploads, self.card = [], None

    hub = Hub()

    def create_repo(self, repo_id, **options):
        from huggingface_hub import RepoUrl

        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **options):
        contents = {}
        for operation in operations:
            with operation.as_file() as file:
                contents[operation.path_in_repo] = file.read()
        hub.uploads.append((repo_id, contents))

    def load(repo_id, **options):
        if hub.card is None:
            raise EntryNotFoundError("no README.md")
        return ModelCard(hub.card)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", staticmethod(load))
    return hub


def push(model, folder):
    model.push_to_hub("me/model-mxfp4", tags=["mine"])


def save_and_push(model, folder):
    model.add_model_tags(["mine"])
    model.save_pretrained(folder / "local", push_to_hub=True, repo_id="me/model-mxfp4")


@pytest.mark.parametrize("upload", [push, save_and_push], ids=lambda f: f.__name__)
def test_what_is_uploaded_is_a_whole_checkpoint(upload, hadamard, hub, tmp_path):
    model = duqpp.from_pretrained(hadamard)
    upload(model, tmp_path)
    ((repository, contents),) = hub.uploads
    assert repository == "me/model-mxfp4"
    assert set(contents) == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        "duqpp-manifest.json",
    }
    assert json.loads(contents["config.json"])[GUARD_FIELD] == GUARD
    card = ModelCard(contents["README.md"].decode())
    assert 'checkpoint = "me/model-mxfp4"' in card.text and "`hadamard`" in card.text
    assert "mine" in card.data.tags and card.data.library_name == "duqpp"
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in contents.items():
        (arrived / name).write_bytes(content)
    oracle.assert_same(logits(duqpp.from_pretrained(arrived)), logits(model), "logits")


def test_the_card_on_the_hub_stays(hadamard, hub):
    hub.card = "---\nlicense: apache-2.0\n---\n# Words of my own\n"
    duqpp.from_pretrained(hadamard).push_to_hub("me/model-mxfp4")
    card = ModelCard(hub.uploads[0][1]["README.md"].decode())
    assert "Words of my own" in card.text and card.data.license == "apache-2.0"
