"""inspect: reports of checkpoints and of float models, and the plot."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, InputError
from duqpp.job.finish import REPORT_FILE
from duqpp.job.quantize import quantize_model
from duqpp.methods.reports import GroupReport
from duqpp.tools.inspection import inspect_model, layer_and_kind, mean_errors
from tests.checkpoint import damage

SMALL = {"samples": 2, "seq_len": 64, "max_steps": 16}
NAMES = [
    f"model.layers.{index}.{kind}" for index in range(2) for kind in ("qkv", "o", "gate_up", "down")
]


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("inspection") / "out"
    quantize_model(str(tiny_llama), out, QuantizeConfig(next_inputs="float", **SMALL))
    return out


def test_a_checkpoint_says_what_its_report_says(quantized, tiny_llama):
    found = inspect_model(str(quantized))
    report = json.loads((quantized / REPORT_FILE).read_text())["groups"]
    assert found.to_dict()["groups"] == report
    assert [group.name for group in found.groups] == NAMES
    assert found.model == tiny_llama.name
    assert found.method == "duquant++, one rotation per group, smoothing 0.6, RTN"


@pytest.mark.parametrize("gptq", [False, True])
def test_a_float_model_says_what_quantizing_it_says(gptq, tiny_llama, tmp_path):
    """Its blocks are fed by float blocks, whatever the options say."""
    config = QuantizeConfig(gptq=gptq, **SMALL)
    before = {file.name: file.read_bytes() for file in tiny_llama.iterdir()}
    steps = []
    found = inspect_model(str(tiny_llama), config, progress=lambda *step: steps.append(step))
    assert {file.name: file.read_bytes() for file in tiny_llama.iterdir()} == before
    assert steps == [("inspect", 0, 2), ("inspect", 1, 2), ("inspect", 2, 2)]
    fed_by_float = replace(config, next_inputs="float")
    assert found.groups == quantize_model(str(tiny_llama), tmp_path / "out", fed_by_float).groups
    assert found.method.endswith("GPTQ" if gptq else "RTN")


@pytest.mark.parametrize("method", ["rtn", "hadamard"])
def test_methods_without_calibration_are_inspected_with_activations(method, tiny_llama):
    config = QuantizeConfig(method=method, **SMALL)
    groups = inspect_model(str(tiny_llama), config).groups
    assert len(groups) == 8
    for group in groups:
        assert (group.block_amax == group.block_amax_before) == (method == "rtn")
        assert (group.activation_error == group.activation_error_before) == (method == "rtn")


def test_layers_limit_both_kinds_of_model(quantized, tiny_llama):
    whole = inspect_model(str(tiny_llama), QuantizeConfig(**SMALL))
    first = inspect_model(str(tiny_llama), QuantizeConfig(**SMALL), layers=1)
    assert first.groups == whole.groups[:4]
    assert inspect_model(str(tiny_llama), QuantizeConfig(**SMALL), layers=9).groups == whole.groups
    assert [g.name for g in inspect_model(str(quantized), layers=1).groups] == NAMES[:4]


def test_skipped_groups_are_left_out(tiny_llama):
    config = QuantizeConfig(skip=("o_proj", "model.layers.1.mlp"), **SMALL)
    names = [group.name for group in inspect_model(str(tiny_llama), config).groups]
    assert names == [n for n in NAMES if not n.endswith(".o") and n not in (NAMES[6], NAMES[7])]


def test_mean_errors_skip_what_is_not_there():
    groups = [GroupReport("a", 0.1), GroupReport("b", 0.3, activation_error=0.5)]
    means = mean_errors(groups)
    assert means["weight_error"] == pytest.approx(0.2)
    assert means["activation_error"] == 0.5
    assert means["output_error"] is None
    assert layer_and_kind(GroupReport("model.layers.12.gate_up", 0.1)) == (12, "gate_up")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), f"has no {REPORT_FILE}; inspect the float model instead"),
        (lambda file: file.write_text("{"), "not valid JSON"),
        (lambda file: file.write_text("{}"), "not a report of duqpp quantize: 'groups'"),
        (lambda file: file.write_text('{"groups": [{"name": "model.layers.0.qkv"}]}'), "missing"),
        (
            lambda file: file.write_text('{"groups": [{"name": "x", "weight_error": 1}]}'),
            "not a report of duqpp quantize",
        ),
    ],
)
def test_a_report_that_is_missing_or_wrong(change, message, quantized, tmp_path):
    folder = tmp_path / "damaged"
    damage.copy_of(quantized, folder)
    change(folder / REPORT_FILE)
    with pytest.raises(CheckpointError, match=message):
        inspect_model(str(folder))


@pytest.mark.parametrize("provenance", [{}, {"configuration": {"method": "later"}}])
def test_a_checkpoint_without_its_options_is_still_inspected(provenance, quantized, tmp_path):
    folder = tmp_path / "other"
    damage.copy_of(quantized, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"] = provenance
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect_model(str(folder))
    assert (found.model, found.method) == ("other", "duquant++")
    assert found.groups == inspect_model(str(quantized)).groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "`layers` must be at least 1"),
        ({"calibration": "none.txt"}, "cannot read text file none.txt"),
        ({"config": QuantizeConfig(samples=9999)}, "lower `samples` or `seq_len`"),
        ({"config": QuantizeConfig(skip=("z_proj",))}, "`skip`: z_proj names no linear"),
    ],
)
def test_bad_options(options, message, tiny_llama):
    with pytest.raises(InputError, match=message):
        inspect_model(str(tiny_llama), **options)
