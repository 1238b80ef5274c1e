"""Quantizing a float checkpoint while transformers loads it: as `duqpp quantize` would."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
)

import duqpp
from duqpp.errors import CheckpointError, InputError
from duqpp.integrations.transformers import DuqppConfig
from duqpp.methods.fixed import Hadamard
from duqpp.nn import MXFP4Linear
from tests import oracle
from tests.checkpoint import damage

PROMPT = torch.randint(0, 300, (2, 21), generator=torch.Generator().manual_seed(2))
UP = "model.layers.1.mlp.up_proj"


def on_load(folder, config: DuqppConfig, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


def assert_same_state(model, expected) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert set(state) == set(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        oracle.assert_same(state[name], tensor, name)


CASES = {
    "rtn, biases": ("qwen2", {}, {"method": "rtn"}),
    "hadamard, tied, several shards": (
        *("llama", {"tie_word_embeddings": True, "shard_size": "60KB"}),
        {"method": "hadamard"},
    ),
    "hadamard per block, head norms": (
        *("qwen3", {}),
        {"method": "hadamard", "rotation": "per-block", "weight_rule": "even"},
    ),
    "random, skipping": (
        *("mistral", {}),
        {"method": "random", "seed": 3, "skip": ("down_proj", "model.layers.0.self_attn.q_proj")},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_quantize(case, make_tiny, tmp_path):
    """Tensors, modules, logits, and after saving the files' configuration."""
    kind, fields, options = case
    source = make_tiny(kind, **fields)
    duqpp.quantize_model(str(source), tmp_path / "out", duqpp.QuantizeConfig(**options))
    expected = duqpp.from_pretrained(tmp_path / "out")
    model, info = on_load(source, DuqppConfig(**options), output_loading_info=True)
    assert not any(info.values()), info
    assert_same_state(model, expected)
    names = [n for n, m in model.named_modules() if isinstance(m, MXFP4Linear)]
    assert names == [n for n, m in expected.named_modules() if isinstance(m, MXFP4Linear)]
    owners = [n for n, m in model.named_modules() if hasattr(m, "shared_input_hooks")]
    assert owners == [n for n, m in expected.named_modules() if hasattr(m, "shared_input_hooks")]
    assert not any(p.requires_grad for n in names for p in model.get_submodule(n).parameters())
    oracle.assert_same(logits(model), logits(expected), "logits")

    model.save_pretrained(tmp_path / "saved")
    oracle.assert_same(
        logits(duqpp.from_pretrained(tmp_path / "saved")), logits(expected), "logits once saved"
    )
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "saved")]
    for field in ("mean_errors", "job"):  # measured with the whole group at hand; no job here
        configs[0]["quantization_config"]["provenance"].pop(field)
    assert configs[0] == configs[1]


def test_equals_quantize_in_bfloat16(make_tiny, tmp_path):
    source = make_tiny("qwen2")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "float")
    duqpp.quantize_model(
        str(tmp_path / "float"), tmp_path / "out", duqpp.QuantizeConfig(method="hadamard")
    )
    for options in ({}, {"dtype": torch.bfloat16}, {"device_map": "auto"}):
        loaded = on_load(tmp_path / "float", DuqppConfig(), **options)
        assert_same_state(loaded, duqpp.from_pretrained(tmp_path / "out"))
    # Widening is exact: the codes are the same, and what is not quantized is float32.
    wide = on_load(tmp_path / "float", DuqppConfig(), dtype=torch.float32)
    assert_same_state(wide, duqpp.from_pretrained(tmp_path / "out", dtype=torch.float32))


def test_weights_are_let_go_one_at_a_time(make_tiny, monkeypatch):
    """While one weight is quantized, those before it are packed and those after it not yet read."""
    from duqpp.integrations import on_load as module

    present = []

    def counted(method, *arguments):
        linears = [m for m in model_of[0].modules() if isinstance(m, nn.Linear)]
        present.append(sum(not m.weight.is_meta for m in linears if m.in_features < 300))
        return quantize(method, *arguments)

    model_of, quantize, convert = [], Hadamard.quantize_linear, module.QuantizeOnLoad.convert

    def converted(self, *args, model, **kwargs):
        model_of[:] = [model]
        return convert(self, *args, model=model, **kwargs)

    monkeypatch.setattr(Hadamard, "quantize_linear", counted)
    monkeypatch.setattr(module.QuantizeOnLoad, "convert", converted)
    on_load(make_tiny("llama"), DuqppConfig())
    assert len(present) == 14
    assert max(present) <= 1, "lm_head alone may be there"


def test_one_configuration_for_two_models(make_tiny):
    config = DuqppConfig(method="rtn", modules_to_not_convert=["down_proj"])
    before = copy.deepcopy(config.to_dict())
    # By their classes: the Auto classes would copy the configuration themselves.
    first = LlamaForCausalLM.from_pretrained(make_tiny("llama"), quantization_config=config)
    second = Qwen3ForCausalLM.from_pretrained(make_tiny("qwen3"), quantization_config=config)
    assert config.to_dict() == before
    bases = [m.config.quantization_config.layout.provenance["base_model"] for m in (first, second)]
    assert bases == [make_tiny("llama").name, make_tiny("qwen3").name]
    assert isinstance(first.model.layers[0].mlp.down_proj, nn.Linear)
    assert first.config.quantization_config.to_dict()["modules_to_not_convert"] == [
        *("lm_head", "down_proj")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "duquant++"}, "`duqpp quantize MODEL OUT --method duquant\\+\\+` first"),
        ({"method": "duqpp"}, "these options need calibration"),
        ({"method": "rtn", "gptq": True}, "these options need calibration"),
        ({"smooth_alpha": 0.5}, "these options need calibration"),
        ({"method": "awq"}, "`method` must be one of"),
        ({"bits": 4}, "bits"),
        ({"skip": ["down_proj"], "modules_to_not_convert": []}, "are the same: give one"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        DuqppConfig(**options)


def test_bad_models(make_tiny, tmp_path):
    with pytest.raises(InputError, match="no_such names no linear"):
        on_load(make_tiny("llama"), DuqppConfig(skip=["no_such"]))
    with pytest.raises(InputError, match="intermediate_size is 80; MXFP4 needs a multiple of 32"):
        on_load(make_tiny("llama", intermediate_size=80), DuqppConfig())
    nan = damage.copy_of(make_tiny("llama"), tmp_path / "nan")
    weight = damage.get_tensor(nan, f"{UP}.weight")
    weight[3, 4] = float("nan")
    damage.set_tensor(nan, f"{UP}.weight", weight)
    with pytest.raises(InputError, match=f"{UP}.weight has NaN or infinite values"):
        on_load(nan, DuqppConfig())
    lacking = damage.copy_of(make_tiny("llama"), tmp_path / "lacking")
    damage.edit_tensors(lacking, f"{UP}.weight", lambda t: t.pop(f"{UP}.weight"))
    with pytest.raises(InputError, match=f"has no tensor {UP}.weight"):
        on_load(lacking, DuqppConfig())


def test_a_quantized_checkpoint_keeps_its_own_configuration(hadamard):
    with pytest.warns(UserWarning, match="quantization_config"):
        model = on_load(hadamard, DuqppConfig(method="rtn"))
    assert model.config.quantization_config.layout.method == "hadamard"


def test_fields_of_a_checkpoint_are_checked():
    with pytest.raises(CheckpointError, match="format_version"):
        DuqppConfig(quant_method="duqpp", method="rtn")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_tensor_that_is_missing_is_not_made_up(name, make_tiny, tmp_path):
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "model")
    damage.edit_tensors(folder, name, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=f"has no tensor {name}"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=DuqppConfig())


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("kept", ["lm_head.weight", EMBEDDING])
def test_one_of_two_tied_tensors_is_enough(kept, make_tiny, tmp_path):
    folder = damage.copy_of(make_tiny("llama", tie_word_embeddings=True), tmp_path / "model")
    damage.edit_tensors(
        folder, EMBEDDING, lambda tensors: tensors.update({kept: tensors.pop(EMBEDDING)})
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=DuqppConfig())
    assert torch.equal(model.lm_head.weight, damage.get_tensor(folder, kept))
