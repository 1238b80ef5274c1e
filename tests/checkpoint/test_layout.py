"""The `quantization_config` of a checkpoint: read back as written, every bad field refused."""

import json

import pytest
import torch
from torch import nn

from duqpp.checkpoint.layout import FORMAT_VERSION, Layout, is_duqpp, quantization_of
from duqpp.errors import CheckpointError
from duqpp.format import ScaleRule

LAYOUT = Layout(
    method="duquant",
    rotation="per_block",
    permuted=True,
    weight_rule=ScaleRule.MSE,
    activation_rule=ScaleRule.CEIL,
    skip=("lm_head", "model.layers.0.mlp"),
    provenance={"calibration": "builtin"},
)
MISSING = object()


@pytest.mark.parametrize("value", [MISSING, None, 5, "duqpp", ["quant_method"], {}])
def test_what_is_no_quantization_is_no_duqpp_checkpoint(value):
    config = {} if value is MISSING else {"quantization_config": value}
    assert quantization_of(config) == {} and not is_duqpp(config)


def test_a_duqpp_checkpoint_is_told_by_its_method():
    assert is_duqpp({"quantization_config": LAYOUT.to_dict()})
    assert is_duqpp({"quantization_config": {"quant_method": "duqpp"}}), "a bad one is one, too"
    assert not is_duqpp({"quantization_config": {"quant_method": "fp8"}})


def changed(field: str, value: object) -> dict:
    """LAYOUT as a dictionary, with a field (such as "scale_rule.weights") changed or missing."""
    values = json.loads(json.dumps(LAYOUT.to_dict()))
    *parents, last = field.split(".")
    holder = values
    for parent in parents:
        holder = holder[parent]
    if value is MISSING:
        del holder[last]
    else:
        holder[last] = value
    return values


def test_reads_back_what_it_wrote():
    assert Layout.from_dict(json.loads(json.dumps(LAYOUT.to_dict()))) == LAYOUT


def test_provenance_is_optional_and_unknown_fields_are_ignored():
    assert Layout.from_dict(changed("provenance", MISSING)).provenance == {}
    assert Layout.from_dict(changed("new_remark", "of a later version")) == LAYOUT


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, 2**70])
def test_newer_format(version):
    with pytest.raises(CheckpointError, match=f"format_version {version} is newer .*upgrade duqpp"):
        Layout.from_dict(changed("format_version", version))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("quant_method", v) for v in (MISSING, None, "mxfp4", "DUQPP", ["duqpp"])],
        *[("format_version", v) for v in (MISSING, None, 0, -1, "1", 1.0, True, [1])],
        *[("method", v) for v in (MISSING, None, 5, ["rtn"])],
        *[("rotation", v) for v in (MISSING, None, "", "per-block", "Shared", True, ["shared"])],
        *[("permuted", v) for v in (MISSING, None, "false", 0, [])],
        *[("scale_rule", v) for v in (MISSING, None, "even", [], {})],
        *[("scale_rule.weights", v) for v in (MISSING, None, "nearest", "MSE", 3, ["mse"])],
        *[("scale_rule.activations", v) for v in (MISSING, None, "nearest", "", {})],
        *[("modules_to_not_convert", v) for v in (MISSING, None, "lm_head", [5], [["a"]], {})],
        *[("provenance", v) for v in (None, "text", [])],
    ],
    ids=lambda value: "missing" if value is MISSING else str(value),
)
def test_bad_field(field, value):
    with pytest.raises(CheckpointError, match=field.split(".")[-1]):
        Layout.from_dict(changed(field, value))


@pytest.mark.parametrize(
    ("rotation", "shape"), [("none", None), ("shared", [32, 32]), ("per_block", [3, 32, 32])]
)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_empty_linear(rotation, shape, permuted, bias):
    layout = Layout("any", rotation, permuted, ScaleRule.MSE, ScaleRule.FLOOR)
    linear = nn.Linear(96, 8, bias=bias, dtype=torch.float16, device="meta")
    quantized = layout.empty_linear(linear)
    shapes = {name: (list(t.shape), t.dtype) for name, t in quantized.state_dict().items()}
    expected = {"weight_packed": ([8, 48], torch.uint8), "weight_scale": ([8, 3], torch.uint8)}
    if shape:
        expected["rotation"] = (shape, torch.bfloat16)
    if permuted:
        expected["permutation"] = ([96], torch.int32)
        if shape:
            expected["pre_rotation"] = (shape, torch.bfloat16)
    if bias:
        expected["bias"] = ([8], torch.float16)
    assert shapes == expected
    assert quantized.rule == ScaleRule.FLOOR
    assert all(t.is_meta for t in quantized.state_dict().values())
    assert not layout.empty_linear(linear, device="cpu").weight_packed.is_meta
