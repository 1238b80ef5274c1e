"""Without `import duqpp`, transformers refuses a checkpoint; it does not make its linears up."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import duqpp
from duqpp.checkpoint.card import GUARD, GUARD_FIELD
from duqpp.integrations.transformers import DuqppConfig
from tests.checkpoint import damage

LOADERS = [duqpp.from_pretrained, AutoModelForCausalLM.from_pretrained]
both_loaders = pytest.mark.parametrize("load", LOADERS, ids=["duqpp", "AutoModel"])

# Loads each folder in every way that reads weights; prints what came of it. Other libraries that
# import duqpp on their own, such as a plugin, must not be what makes the test pass.
SCRIPT = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline

def configured(folder, **options):
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **options)

ways = {
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "its class": LlamaForCausalLM.from_pretrained,
    "a configuration": configured,
    "remote code": lambda f: AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True),
    "any sizes": lambda f: AutoModelForCausalLM.from_pretrained(f, ignore_mismatched_sizes=True),
    "device map": lambda f: AutoModelForCausalLM.from_pretrained(f, device_map="auto"),
    "a pipeline": lambda f: pipeline("text-generation", model=f),
}
results = {}
for folder in sys.argv[1:]:
    for way, load in list(ways.items())[: 1 if "unguarded" in folder else None]:
        try:
            load(folder)
            results[f"{folder}: {way}"] = "loaded"
        except Exception as error:
            results[f"{folder}: {way}"] = f"{type(error).__name__}: {error}"
assert not any(name.startswith("duqpp") for name in sys.modules)
print(json.dumps(results))
"""


def without_duqpp(*folders) -> dict[str, str]:
    """What transformers says of each folder, way by way, in a process without duqpp."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_stock_transformers_refuses_a_checkpoint(make_tiny, tmp_path):
    """As `quantize_model` writes it, and as it is when loaded and saved. With the field gone, the
    same script loads the same checkpoint: the refusal is the guard's doing."""
    written, saved = tmp_path / "written", tmp_path / "saved"
    config = duqpp.QuantizeConfig(method="hadamard")
    duqpp.quantize_model(str(make_tiny("llama")), written, config)
    duqpp.from_pretrained(written).save_pretrained(saved)
    unguarded = damage.copy_of(written, tmp_path / "unguarded")
    damage.edit_json(unguarded / "config.json", lambda c: c.pop(GUARD_FIELD))
    results = without_duqpp(written, saved, unguarded)
    assert len(results) == 2 * 8 + 1
    for case, result in results.items():
        if case.startswith(str(unguarded)):
            assert result == "loaded", case
        else:
            assert result.startswith("ValueError: ") and "import duqpp" in result, (case, result)


def test_guard_leaves_the_configuration_readable(hadamard):
    config = AutoConfig.from_pretrained(hadamard)
    assert config.quantization_config["quant_method"] == "duqpp"
    assert getattr(config, GUARD_FIELD) == GUARD


@both_loaders
@pytest.mark.parametrize("text", [None, "the text of another version"])
def test_checkpoints_with_another_guard_or_none_load(load, text, hadamard, tmp_path):
    """Those of the first version of the format have none."""
    folder = damage.copy_of(hadamard, tmp_path / "other")
    damage.edit_json(folder / "config.json", lambda c: c.pop(GUARD_FIELD))
    if text is not None:
        damage.edit_json(folder / "config.json", lambda c: c.update({GUARD_FIELD: text}))
    model = load(folder)
    assert not hasattr(model.config, GUARD_FIELD)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())[GUARD_FIELD] == GUARD


def test_a_real_file_name_is_obeyed(make_tiny, tmp_path):
    """The field has a use: a float model may name its weights' file in it."""
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "named")
    (folder / "model.safetensors").rename(folder / "others.safetensors")
    damage.edit_json(
        folder / "config.json", lambda c: c.update({GUARD_FIELD: "others.safetensors"})
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=DuqppConfig())
    embedding = safetensors.torch.load_file(folder / "others.safetensors")
    assert torch.equal(model.get_input_embeddings().weight, embedding["model.embed_tokens.weight"])
