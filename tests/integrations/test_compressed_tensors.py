"""The compressed-tensors export: the same model in another format, or a clear refusal.

`tests/vllm/` loads an export into vLLM; here it is read by hand, and by compressed-tensors itself.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import duqpp
from duqpp.checkpoint.card import GUARD_FIELD
from duqpp.cli.main import main
from duqpp.errors import CheckpointError, InputError
from duqpp.integrations.compressed_tensors import export_compressed_tensors
from duqpp.job.lock import locked
from tests import decoder
from tests.checkpoint import damage

TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
LINEAR = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def quantized(make_tiny, tmp_path_factory):
    """Factory: a tiny model, quantized with options of QuantizeConfig; made once for each."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **options) -> Path:
        key = repr((model_type, sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "out"
            config = duqpp.QuantizeConfig(**({"method": "duquant++", "max_steps": 4} | options))
            model = str(make_tiny(model_type))
            duqpp.quantize_model(model, made[key], config, calibration=TOKENS)
        return made[key]

    return make


@pytest.fixture(scope="module")
def exported(quantized, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    report = export_compressed_tensors(quantized(), out)
    rotations = {d for n, d in decoder.Checkpoint(quantized()).data.items() if "rotation" in n}
    assert report.folder == out and report.transforms == len(rotations) > 4
    return out


def transforms(folder: Path) -> dict[str, list[str]]:
    """Linears by the transform in front of them, from config.json."""
    config = decoder.Checkpoint(folder).config["quantization_config"]
    groups = config.get("transform_config", {"config_groups": {}})["config_groups"]
    for group in groups.values():
        (apply,) = group["apply"]
        assert (group["type"], group["head_dim"]) == ("random-hadamard", 32)
        assert apply["location"] == "input"
    return {name: group["apply"][0]["targets"] for name, group in groups.items()}


def test_every_linear_computes_what_it_did(quantized, exported):
    """x goes through the transform, its matrix divided by sqrt(32), then to the packed weight."""
    before, after = decoder.Checkpoint(quantized()), decoder.Checkpoint(exported)
    seen = []
    for scheme, linears in transforms(exported).items():
        for linear in linears:
            matrix = after.floats(f"{linear}.{scheme}_input.weight") / math.sqrt(32)
            rotated = after.rotated_weight(linear)
            effective = decoder._times_transpose(rotated, matrix)
            expected = before.effective_weight(linear)
            # The matrix is multiplied by sqrt(32) in float32, and divided by it again.
            assert np.abs(effective - expected).max() <= 2**-22 * np.abs(expected).max(), linear
            assert np.abs(expected).max() > 0
            seen.append(linear)
    assert sorted(seen) == sorted(before.linears) == sorted(after.linears)


def test_everything_else_is_as_it_was(quantized, exported):
    before, after = decoder.Checkpoint(quantized()), decoder.Checkpoint(exported)
    kept = {name for name in before.data if not name.endswith(".rotation")}
    assert {name for name in after.data if not name.endswith("_input.weight")} == kept
    for name in kept:
        assert before.data[name] == after.data[name], name
    assert {"config.json", "README.md"} <= {file.name for file in exported.iterdir()}
    own = {"quantization_config", GUARD_FIELD}
    same = {k: v for k, v in before.config.items() if k not in own}
    assert same == {k: v for k, v in after.config.items() if k not in own}
    assert AutoTokenizer.from_pretrained(exported)("The capital").input_ids


def test_linears_that_share_an_input_share_a_transform(exported):
    sets = {
        frozenset(n.rpartition(".")[2] for n in names) for names in transforms(exported).values()
    }
    assert sets == {
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"o_proj"}),
        frozenset({"gate_proj", "up_proj"}),
        frozenset({"down_proj"}),
    }


def test_equal_rotations_are_one_transform(quantized, tmp_path):
    export_compressed_tensors(quantized(method="hadamard"), tmp_path / "out")
    (linears,) = transforms(tmp_path / "out").values()
    assert len(linears) == 14


def test_no_rotation_is_no_transform(quantized, tmp_path):
    """Biases then stand in nobody's way."""
    folder = quantized("qwen2", method="rtn")
    report = export_compressed_tensors(folder, tmp_path / "out")
    after = decoder.Checkpoint(tmp_path / "out")
    assert report.transforms == 0 and transforms(tmp_path / "out") == {}
    assert after.data == decoder.Checkpoint(folder).data
    assert any(name.endswith("q_proj.bias") for name in after.data)
    assert not any("tensor parallel" in remark for remark in report.remarks)


def test_what_is_skipped_is_ignored_by_its_full_name(quantized, tmp_path):
    skip = ("lm_head", "model.layers.0", "down_proj")
    export_compressed_tensors(quantized(skip=skip), tmp_path / "out")
    after = decoder.Checkpoint(tmp_path / "out")
    ignored = after.config["quantization_config"]["ignore"]
    everything = {n.removesuffix(".weight") for n in after.data if n.endswith("_proj.weight")}
    assert set(ignored) == everything | {"lm_head"} and len(ignored) == 9
    assert not set(ignored) & set(after.linears)


def test_transformers_is_told_what_an_export_is(exported, tmp_path):
    """Its error quotes the guard, duqpp imported or not: that guards itself no export."""
    folder = damage.copy_of(exported, tmp_path / "copy")
    # So that transformers looks for the weights even where compressed-tensors is not installed.
    damage.edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(ValueError, match="an export of duqpp for vLLM, whose rotations"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_without_a_rotation_there_is_nothing_to_guard(quantized, tmp_path):
    folder = quantized(method="rtn")
    report = export_compressed_tensors(folder, tmp_path / "out")
    assert GUARD_FIELD in decoder.Checkpoint(folder).config
    assert GUARD_FIELD not in decoder.Checkpoint(tmp_path / "out").config
    assert "transformers with the package compressed-tensors reads it" in report.remarks[0]


# Prints what transformers says of each folder: its error, or the sum of a quantized weight's bytes.
LOAD = """
import json, sys
from transformers import AutoModelForCausalLM
answers = []
for folder in sys.argv[1:]:
    try:
        tensors = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").state_dict()
        answers.append(int(tensors["model.layers.1.mlp.down_proj.weight_packed"].int().sum()))
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
assert not any(name.startswith("duqpp") for name in sys.modules)
print(json.dumps(answers))
"""


@pytest.mark.crosscheck
def test_transformers_with_compressed_tensors_reads_what_has_no_rotation(
    exported, quantized, tmp_path
):
    crosscheck()
    plain = tmp_path / "plain"
    export_compressed_tensors(quantized(method="rtn"), plain)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(exported), str(plain)],
        env=os.environ | {"PYTHONPATH": os.environ["DUQPP_CROSSCHECK"], "HF_HUB_OFFLINE": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    refused, loaded = json.loads(done.stdout.splitlines()[-1])
    assert refused.startswith("ValueError") and "an export of duqpp for vLLM" in refused
    assert loaded == sum(decoder.Checkpoint(plain).data[f"{LINEAR}.weight_packed"])


@pytest.mark.crosscheck
def test_compressed_tensors_reads_it(exported):
    loaded = crosscheck()
    config = decoder.Checkpoint(exported).config["quantization_config"]
    parsed = loaded.QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    assert scheme.weights.num_bits == scheme.input_activations.num_bits == 4
    assert scheme.input_activations.dynamic is True
    found = loaded.TransformConfig.model_validate(config["transform_config"])
    assert set(found.config_groups) == set(transforms(exported))


def crosscheck() -> SimpleNamespace:
    """compressed-tensors, from where `make test` installs it."""
    folder = os.environ.get("DUQPP_CROSSCHECK")
    if not folder:
        pytest.skip("DUQPP_CROSSCHECK names no folder: `make test` installs one")
    sys.path.append(folder)
    try:
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.transform import TransformConfig
    finally:
        sys.path.remove(folder)
    return SimpleNamespace(QuantizationConfig=QuantizationConfig, TransformConfig=TransformConfig)


# Refusals, which leave nothing behind.


def refuse(error: type[Exception], match: str, model: Path, out: Path) -> None:
    with pytest.raises(error, match=match):
        export_compressed_tensors(model, out)
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()


def test_a_rotation_per_block(quantized, tmp_path):
    folder = quantized(rotation="per-block")
    refuse(InputError, "`rotation=shared`, or .* vLLM plugin", folder, tmp_path / "out")


def test_a_permutation(quantized, tmp_path):
    folder = quantized(method="duquant")
    refuse(InputError, "permutes channels", folder, tmp_path / "out")


def test_a_bias_behind_a_rotation(quantized, tmp_path):
    folder = quantized("qwen2")
    refuse(InputError, r"self_attn\.[qkv]_proj has a bias", folder, tmp_path / "out")


def test_a_fused_linear_that_is_quantized_in_part(quantized, tmp_path):
    folder = quantized(skip=("lm_head", "up_proj"))
    refuse(InputError, "are one linear here", folder, tmp_path / "out")


def test_a_float_model(tiny_llama, tmp_path):
    refuse(InputError, "is not quantized; run `duqpp quantize` first", tiny_llama, tmp_path / "out")


def test_a_damaged_checkpoint(quantized, tmp_path):
    folder = damage.copy_of(quantized(), tmp_path / "copy")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    damage.flip_bit(shard, 8 * shard.stat().st_size - 3)
    refuse(CheckpointError, f"{shard.name}: .* is altered", folder, tmp_path / "out")


def test_a_rotation_that_differs_within_a_group(quantized, tmp_path):
    folder = damage.copy_of(quantized(), tmp_path / "copy")
    name = "model.layers.0.self_attn.k_proj.rotation"
    damage.set_tensor(folder, name, damage.get_tensor(folder, name).neg())
    refuse(CheckpointError, "share one input but not one rotation", folder, tmp_path / "out")


def test_a_tensor_that_is_missing(quantized, tmp_path):
    folder = damage.copy_of(quantized(), tmp_path / "copy")
    name = f"{LINEAR}.weight_scale"
    damage.edit_tensors(folder, name, lambda tensors: tensors.pop(name))
    refuse(CheckpointError, f"{name} should be in", folder, tmp_path / "out")


def test_an_output_that_is_in_use(quantized, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        export_compressed_tensors(quantized(), tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["file"]


def test_what_an_interrupted_export_has_left(quantized, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    with pytest.raises(InputError, match=r"out\.partial is in the way: .*remove it"):
        export_compressed_tensors(quantized(), tmp_path / "out")
    with locked(left), pytest.raises(InputError, match="another process is working in"):
        export_compressed_tensors(quantized(), tmp_path / "out")
    assert left.exists() and not (tmp_path / "out").exists()


# The command.


def test_the_command_says_what_is_approximate(quantized, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(quantized()), str(out), "--format", "compressed-tensors"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: ") and " transforms\n" in printed
    card = (out / "README.md").read_text()
    for remark in (
        "Activations are approximate",
        "not by even",
        "transformers ignores the transforms",
        "only without tensor parallelism",
    ):
        assert remark in printed and remark in card
    assert main(arguments) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--format", "gguf"]])
def test_a_format_that_the_command_does_not_know(arguments, quantized, tmp_path, capsys):
    assert main(["export", str(quantized()), str(tmp_path / "out"), *arguments]) == 2
    assert "--format" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
