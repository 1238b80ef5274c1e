"""Bad input to quantize_model: one clear error, and nothing half-written that cannot go on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import DuqppError, InputError
from tests.checkpoint import damage

TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
UP = "model.layers.1.mlp.up_proj.weight"
CONFIG = QuantizeConfig(max_steps=4)
RTN = QuantizeConfig(method="rtn")
DUQPP = QuantizeConfig(method="duqpp")
GPTQ = QuantizeConfig(method="hadamard", gptq=True)


@pytest.fixture
def model(make_tiny, tmp_path) -> Path:
    """A copy of the tiny Llama, in shards, that a test may damage."""
    return damage.copy_of(make_tiny("llama", shard_size="60KB"), tmp_path / "model")


def assert_refuses(
    model: Path | str,
    out: Path,
    message: str | None,
    config=CONFIG,
    *,
    finished: int = 0,
    **options,
):
    """Quantizing fails with a DuqppError of one line, and leaves neither output nor partial.

    Unless some blocks are finished: those stay, and the line says how to go on.
    """
    before, partial = _tree(out.parent), out.with_name(out.name + ".partial")
    with pytest.raises(DuqppError, match=message) as raised:
        duqpp.quantize_model(str(model), out, config, **({"calibration": TOKENS} | options))
    assert "\n" not in str(raised.value)
    if finished:
        assert str(raised.value).endswith(f"; continue with `resume=True`, or remove {partial}")
        assert len(list(partial.glob("*.safetensors"))) == 1 + finished
        shutil.rmtree(partial)
    assert _tree(out.parent) == before


def blocks_before(name: str) -> int:
    """How many of the model's two blocks are finished when a tensor of it is read."""
    return 1 if name.startswith("model.layers.1.") else 0


def _tree(folder: Path) -> dict[Path, bytes | None]:
    """Every path below a folder that exists, with the contents of files."""
    paths = folder.rglob("*") if folder.is_dir() else []
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


# What the model is.


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "mixtral"])
def test_unknown_architecture(model_type, model, out):
    damage.edit_json(model / "config.json", lambda c: c.update(model_type=model_type))
    assert_refuses(model, out, f"model_type '{model_type}' is not supported.*llama, mistral")


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", 48), ("intermediate_size", 80), ("head_dim", 12)]
)
def test_width_that_is_no_multiple_of_32(field, value, make_tiny, out):
    folder = make_tiny("llama", **{field: value})
    assert_refuses(folder, out, rf"{field}.* is {value if field != 'head_dim' else 48}.* 32")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("model_type", None), ("model_type", "no such model"), ("hidden_size", "sixty-four")],
        *[("num_hidden_layers", 0), ("num_hidden_layers", -1), ("num_key_value_heads", 0)],
        *[("num_attention_heads", 0), ("head_dim", 0), ("hidden_act", "no such function")],
        *[("vocab_size", -1), ("hidden_size", -64), ("pad_token_id", 10**6)],
    ],
)
def test_configuration_without_sense(field, value, model, out):
    damage.edit_json(model / "config.json", lambda c: c.update({field: value}))
    assert_refuses(model, out, None)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1}', "\x00\xff"])
def test_config_that_is_no_configuration(content, model, out):
    (model / "config.json").write_text(content)
    assert_refuses(model, out, "cannot (read|load the configuration of) .*model")


def test_missing_config(model, out):
    (model / "config.json").unlink()
    assert_refuses(model, out, "model has no config.json, so it is no model of transformers")


def test_missing_folder_is_asked_from_the_hub(out, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_refuses("nobody/no-such-model", out, "nobody/no-such-model is no local folder.*hub")
    assert_refuses("no folder: nor a hub name", out, "is no local folder.*hub")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model"])
def test_model_is_a_file(name, out, tmp_path):
    (tmp_path / name).write_bytes(b"PK")
    assert_refuses(tmp_path / name, out, f"{name} is neither a model folder nor a .gguf file")


def test_pickled_weights_are_refused_unread(model, out, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    for file in model.glob("*.safetensors*"):
        file.unlink()
    torch.save({"model.embed_tokens.weight": Trap()}, model / "pytorch_model.bin")
    assert_refuses(model, out, "has no model.safetensors.*pickled")
    assert not (tmp_path / "executed").exists()


def test_model_that_is_quantized_already(model, out, tmp_path):
    quantized = tmp_path / "quantized"
    duqpp.quantize_model(str(model), quantized, RTN)
    assert_refuses(quantized, out, r"is quantized already \(duqpp\); quantize the float model")
    damage.edit_json(
        model / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"})
    )
    assert_refuses(model, out, r"is quantized already \(fp8\)")


# Weights.


@pytest.mark.parametrize("config", [RTN, CONFIG, GPTQ], ids=["rtn", "duquant++", "gptq"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        *[UP, "model.layers.0.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"],
        *["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
    ],
)
def test_weight_that_is_not_finite(name, value, config, model, out):
    weight = damage.get_tensor(model, name)
    weight.flatten()[weight.numel() // 2] = value
    damage.set_tensor(model, name, weight)
    message = f"^{name} has NaN or infinite values"
    assert_refuses(model, out, message, config, finished=blocks_before(name))


@pytest.mark.parametrize("config", [CONFIG, GPTQ], ids=["duquant++", "gptq"])
def test_activations_that_overflow(config, make_tiny, model, out):
    """Each weight is finite, what they compute is not: the reader of the first inf is named."""
    damage.set_tensor(model, UP, damage.get_tensor(model, UP) * 1e38)
    message = r"the input of model\.layers\.1\.mlp\.down_proj has NaN or infinite"
    assert_refuses(model, out, message, config, finished=1)


@pytest.mark.parametrize("config", [CONFIG, GPTQ, DUQPP], ids=["duquant++", "gptq", "duqpp"])
def test_a_norm_that_overflows(config, model, out):
    name = "model.layers.1.input_layernorm.weight"
    damage.set_tensor(model, name, damage.get_tensor(model, name) * 4e37)
    message = r"the input of model\.layers\.1\.self_attn\.q_proj has NaN or infinite"
    assert_refuses(model, out, message, config, finished=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("post_attention_layernorm", "model.layers.0.gate_up: the squares of its input overflow"),
        ("mlp.up_proj", "model.layers.0.gate_up: the squares of its weights overflow"),
    ],
)
def test_squares_that_overflow(name, message, model, out):
    """Values are finite, and so is what they compute; the transform needs their squares."""
    name = f"model.layers.0.{name}.weight"
    damage.set_tensor(model, name, damage.get_tensor(model, name) * 1e25)
    assert_refuses(model, out, f"^{message} float32", DUQPP)


@pytest.mark.parametrize(
    "config",
    [DUQPP, CONFIG, QuantizeConfig(method="random")],
    ids=["duqpp", "duquant++", "no activations"],
)
def test_a_rotation_that_is_singular_names_its_group(config, model, out, monkeypatch):
    def refuse(matrix, name):
        raise InputError(f"{name} is singular")

    monkeypatch.setattr("duqpp.rotation.block_rotation.check_invertible", refuse)
    assert_refuses(model, out, r"^model\.layers\.0\.qkv: rotation is singular", config)


def test_activations_that_are_not_a_number(model, out):
    """inf - inf in attention: queries and keys are finite, their products are not."""
    for name in ("q_proj", "k_proj"):
        key = f"model.layers.0.self_attn.{name}.weight"
        damage.set_tensor(model, key, damage.get_tensor(model, key) * 1e24)
    assert_refuses(model, out, r"the input of model\.layers\.0\.self_attn\.o_proj has NaN")


@pytest.mark.parametrize(
    "name", [UP, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("config", [RTN, CONFIG], ids=["rtn", "duquant++"])
def test_missing_tensor(name, config, model, out):
    """Whether the index says so, or the shard lacks what the index names: before any block."""
    damage.edit_tensors(model, name, lambda tensors: tensors.pop(name))
    assert_refuses(model, out, f"has no tensor {name}", config)
    damage.edit_json(model / damage.INDEX, lambda index: index["weight_map"].pop(name))
    assert_refuses(model, out, f"has no tensor {name}", config)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *[(UP, (96, 32)), (UP, (64, 96)), (UP, (96 * 64,)), (UP, (95, 64)), (UP, (0, 64))],
        *[("model.layers.0.input_layernorm.weight", (32,)), ("model.norm.weight", (65,))],
        *[("model.embed_tokens.weight", (319, 64)), ("lm_head.weight", (320, 32))],
        ("model.embed_tokens.weight", (320, 32)),
    ],
)
@pytest.mark.parametrize("config", [RTN, CONFIG], ids=["rtn", "duquant++"])
def test_misshapen_tensor(name, shape, config, model, out):
    damage.set_tensor(model, name, torch.rand(shape))
    message = rf"{name} must be \[.*\], got \[{shape[0]}"
    assert_refuses(model, out, message, config)


@pytest.mark.parametrize(
    ("dtype", "called"),
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")],
)
def test_weights_of_another_kind(dtype, called, model, out):
    damage.set_tensor(model, UP, torch.ones(96, 64).to(dtype))
    assert_refuses(model, out, f"{UP} is {called}; duqpp quantizes float32", RTN)


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn"])
def test_dtype_that_no_model_is_quantized_in(dtype, model, out):
    damage.edit_json(model / "config.json", lambda c: c.update(dtype=dtype))
    assert_refuses(model, out, f"the model's dtype is torch.{dtype}; duqpp quantizes float32", RTN)


def test_tensors_that_the_model_does_not_need_are_left_out(model, out):
    """Old checkpoints hold buffers; in a result that is checked on load they would be errors."""
    extra = {
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.7.mlp.up_proj.weight": torch.ones(96, 64),
        "vision_tower.weight": torch.ones(3, 3),
    }
    file = damage.edit_tensors(model, UP, lambda tensors: tensors.update(extra))
    added = dict.fromkeys(extra, file.name)
    damage.edit_json(model / damage.INDEX, lambda index: index["weight_map"].update(added))
    duqpp.quantize_model(str(model), out, CONFIG, calibration=TOKENS)
    duqpp.from_pretrained(out)


def test_single_file_of_weights(make_tiny, out, tmp_path):
    model = damage.copy_of(make_tiny("llama"), tmp_path / "model")
    damage.edit_tensors(model, UP, lambda tensors: tensors.pop(UP))
    assert_refuses(model, out, f"no tensor {UP}")


@pytest.mark.parametrize("cut", [0, 4, 8, 100, 5000, -1])
@pytest.mark.parametrize("shard", [1, 4])
def test_truncated_shard(cut, shard, model, out):
    file = sorted(model.glob("*.safetensors"))[shard]
    content = file.read_bytes()
    file.write_bytes(content[:cut])
    assert_refuses(model, out, f"cannot read .*{file.name}")


def test_missing_shard(model, out):
    file = sorted(model.glob("*.safetensors"))[1]
    file.unlink()
    assert_refuses(model, out, f"cannot read .*{file.name}")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": null}'],
)
def test_index_that_is_no_index(content, model, out):
    (model / damage.INDEX).write_text(content)
    assert_refuses(model, out, f"{damage.INDEX} is not a safetensors index")


def test_index_that_names_a_file_outside_the_folder(model, out, tmp_path):
    save_file({UP: torch.zeros(96, 64)}, tmp_path / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        change = {UP: name}
        damage.edit_json(model / damage.INDEX, lambda i, c=change: i["weight_map"].update(c))
        assert_refuses(model, out, "names the shard .*elsewhere.safetensors', which is not in")


# Calibration.


def test_too_little_calibration_text(model, out, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    options = QuantizeConfig(samples=4, seq_len=128, max_steps=4)
    message = "calibration text has .* tokens, but 4 samples of 128 need 512: lower `samples`"
    assert_refuses(model, out, message, options, calibration=str(text))


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\xff\xfe\x00text"])
def test_calibration_file_without_text(content, model, out, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    assert_refuses(model, out, "text.txt is", calibration=str(tmp_path / "text.txt"))


def test_missing_calibration_file(model, out, tmp_path):
    assert_refuses(model, out, "cannot read text file", calibration=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    "tokens",
    [
        *[TOKENS.flatten(), TOKENS.int(), TOKENS + 300, TOKENS - 300],
        *[TOKENS[:0], TOKENS[:, :0], TOKENS.float()],
    ],
    ids=["1-d", "int32", "beyond the vocabulary", "negative", "none", "empty", "float"],
)
def test_calibration_tokens(tokens, model, out):
    assert_refuses(model, out, "calibration tokens must be", calibration=tokens)


def test_missing_tokenizer(model, out):
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert_refuses(model, out, "cannot load the tokenizer of", RTN)
    assert_refuses(model, out, "cannot load the tokenizer of")
    assert_refuses(model, out, "cannot load the tokenizer of", calibration="builtin")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"max_length": '])
def test_generation_config_that_is_none(content, model, out):
    """It is read before any work, though it is written last."""
    (model / "generation_config.json").write_text(content)
    stages = []
    message = "cannot load the generation configuration of .*model"
    assert_refuses(model, out, message, RTN, progress=lambda *stage: stages.append(stage))
    assert stages == []


def test_a_backend_that_is_not_there(model, out, monkeypatch):
    monkeypatch.setenv("DUQPP_BACKEND", "cpuu")
    stages = []
    message = "backend 'cpuu' cannot run mxfp4_gemm on cpu here: no such backend"
    assert_refuses(model, out, message, RTN, progress=lambda *stage: stages.append(stage))
    assert stages == []


@pytest.mark.parametrize("skip", ["model.layers.2", "o_projection", "model.norm", ""])
def test_skip_that_names_nothing(skip, model, out):
    assert_refuses(model, out, f"`skip`: {skip} names no linear", QuantizeConfig(skip=(skip,)))


@pytest.mark.parametrize("skip", [("mlp", "self_attn"), ("model.layers.0", "model.layers.1")])
def test_skip_that_leaves_nothing(skip, model, out):
    message = "^`skip`: .*, .* leaves no linear to quantize; skip fewer$"
    assert_refuses(model, out, message, QuantizeConfig(skip=skip))


# Output.


def test_output_that_is_not_empty(model, out):
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert_refuses(model, out, "output .*out exists and is not an empty folder")
    assert (out / "mine.txt").read_text() == "precious"


def test_output_that_is_a_file(model, out):
    out.write_text("precious")
    assert_refuses(model, out, "output .*out exists and is not an empty folder")


def test_output_that_is_the_model(model):
    assert_refuses(model, model, "exists and is not an empty folder")


def test_output_below_a_file(model, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refuses(model, tmp_path / "file" / "out", "cannot write to .*Not a directory")


def test_output_that_is_a_dangling_link(model, out, tmp_path):
    out.symlink_to(tmp_path / "nowhere")
    assert_refuses(model, out, "output .*out exists and is not an empty folder")


def test_output_that_is_empty_is_used(model, out):
    out.mkdir()
    duqpp.quantize_model(str(model), out, RTN)
    duqpp.from_pretrained(out)
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_partial_output_that_is_a_file(model, out):
    partial = out.with_name("out.partial")
    partial.write_text("precious")
    assert_refuses(model, out, "out.partial")
    assert_refuses(model, out, "out.partial", resume=True)


def test_folders_made_for_the_output_go_with_it(model, tmp_path):
    name = UP.replace("layers.1", "layers.0")
    damage.set_tensor(model, name, torch.full((96, 64), math.nan))
    with pytest.raises(InputError, match=name):
        duqpp.quantize_model(str(model), tmp_path / "a" / "b" / "out", RTN)
    assert not (tmp_path / "a" / "b" / "out").exists()
    assert not (tmp_path / "a" / "b" / "out.partial").exists()


def test_a_good_model_still_works(model, out):
    """What the tests above start from is not itself bad input."""
    duqpp.quantize_model(str(model), out, CONFIG, calibration=TOKENS)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    shutil.rmtree(out)
