"""Loading through transformers: what comes back, and that nothing damaged or foreign does."""

import importlib
import json
import os
import pickle
import random
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, DuqppError, InputError
from duqpp.integrations.transformers import load_model
from duqpp.nn import MXFP4Linear
from tests import decoder, oracle
from tests.checkpoint import damage

TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
PROMPT = torch.randint(0, 300, (2, 21), generator=torch.Generator().manual_seed(2))
LINEAR = "model.layers.1.mlp.down_proj"
LOADERS = [duqpp.from_pretrained, AutoModelForCausalLM.from_pretrained]
both_loaders = pytest.mark.parametrize("load", LOADERS, ids=["duqpp", "AutoModel"])


def quantize(model: Path, out: Path, **options) -> Path:
    config = QuantizeConfig(**({"max_steps": 4} | options))
    duqpp.quantize_model(str(model), out, config, calibration=TOKENS)
    return out


@pytest.fixture(scope="session")
def checkpoint(make_tiny, tmp_path_factory) -> Path:
    """A checkpoint with tensors of every kind: biases, two rotations, a permutation."""
    return quantize(
        make_tiny("qwen2"),
        tmp_path_factory.mktemp("checkpoint") / "out",
        method="duquant",
        rotation="per-block",
    )


@pytest.fixture(scope="session")
def bf16_checkpoint(make_tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    source = make_tiny("qwen2", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    return quantize(folder / "model", folder / "out")


@pytest.fixture
def damaged(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return damage.copy_of(checkpoint, tmp_path / "damaged")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT).logits


def assert_same_tensors(model, folder: Path) -> None:
    """Every tensor of the model is that of the checkpoint, bit for bit and in dtype."""
    saved = {n: t for f in folder.glob("*.safetensors") for n, t in damage.read_shard(f)[0].items()}
    state = model.state_dict()
    assert set(state) - set(saved) <= {"lm_head.weight"}
    for name, tensor in saved.items():
        assert state[name].dtype == tensor.dtype, name
        oracle.assert_same(state[name], tensor, name)


# What comes back.


@both_loaders
def test_tensors_are_those_of_the_checkpoint(load, checkpoint, bf16_checkpoint):
    for folder in (checkpoint, bf16_checkpoint):
        model = load(folder)
        assert_same_tensors(model, folder)
        assert not any(t.is_meta for t in model.state_dict().values())
        assert not any(m.training for m in model.modules())
        linears = [m for m in model.modules() if isinstance(m, MXFP4Linear)]
        assert len(linears) == 14
        assert not any(p.requires_grad for m in linears for p in m.parameters())


@both_loaders
@pytest.mark.parametrize(
    "options",
    [
        {"device_map": {"": "cpu"}},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"dtype": "auto"},
        {"low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_ways_to_load(load, options, checkpoint, bf16_checkpoint):
    for folder in (checkpoint, bf16_checkpoint):
        model = load(folder, **options)
        assert_same_tensors(model, folder)
        oracle.assert_same(logits(model), logits(duqpp.from_pretrained(folder)), "logits")


@both_loaders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
def test_dtype_is_that_of_the_float_tensors_alone(
    load, dtype, device_map, checkpoint, bf16_checkpoint
):
    for folder in (checkpoint, bf16_checkpoint):
        model = load(folder, dtype=dtype, device_map=device_map)
        for name, tensor in model.state_dict().items():
            kind = name.rpartition(".")[2]
            kept = {"weight_packed": torch.uint8, "weight_scale": torch.uint8}
            kept |= {"permutation": torch.int32}
            kept |= {"rotation": torch.bfloat16, "pre_rotation": torch.bfloat16}
            assert tensor.dtype == kept.get(kind, dtype), name
        for name in decoder.Checkpoint(folder).data:
            if name.endswith("rotation"):
                stored = decoder.Checkpoint(folder).floats(name)
                oracle.assert_same(model.get_buffer(name).double(), stored, name)
        assert logits(model).dtype == dtype and torch.isfinite(logits(model)).all()


def test_moving_a_loaded_model_changes_no_quantized_tensor(checkpoint):
    model = duqpp.from_pretrained(checkpoint)
    before = {n: t.clone() for n, t in model.get_submodule(LINEAR).state_dict().items()}
    for move in (lambda: model.to(torch.bfloat16), model.half, model.float, model.double):
        try:
            move()
        except ValueError:  # transformers refuses some casts of a quantized model
            continue
        for name, tensor in model.get_submodule(LINEAR).state_dict().items():
            assert tensor.dtype == before[name].dtype, name
            oracle.assert_same(tensor, before[name], name)


@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_load_save_load(shard_size, checkpoint, bf16_checkpoint, tmp_path):
    for number, folder in enumerate((checkpoint, bf16_checkpoint)):
        first = duqpp.from_pretrained(folder)
        again = tmp_path / str(number)
        first.save_pretrained(again, **({"max_shard_size": shard_size} if shard_size else {}))
        assert len(list(again.glob("*.safetensors"))) > 1 or shard_size is None
        for file in again.glob("*.safetensors"):
            assert "duqpp.crc32" in decoder.read_shard(file)[1]
        configs = [json.loads((f / "config.json").read_text()) for f in (folder, again)]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
        for load in LOADERS:
            second = load(again)
            assert_same_tensors(second, again)
            oracle.assert_same(logits(second), logits(first), "logits")
        file = max(again.glob("*.safetensors"))
        damage.flip_bit(file, 8 * file.stat().st_size - 3)
        with pytest.raises(CheckpointError, match="is altered"):
            duqpp.from_pretrained(again)


def test_saved_in_another_dtype(bf16_checkpoint, tmp_path):
    model = duqpp.from_pretrained(bf16_checkpoint, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    oracle.assert_same(logits(duqpp.from_pretrained(tmp_path / "again")), logits(model), "logits")


def test_generate(checkpoint, bf16_checkpoint):
    for folder in (checkpoint, bf16_checkpoint):
        model = duqpp.from_pretrained(folder)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 1}
        greedy = model.generate(PROMPT, do_sample=False, **options)
        assert greedy.shape == (2, PROMPT.shape[1] + 6)
        assert torch.equal(greedy[:, : PROMPT.shape[1]], PROMPT)
        again = duqpp.from_pretrained(folder).generate(PROMPT, do_sample=False, **options)
        assert torch.equal(greedy, again)
        sampled = []
        for _ in range(2):
            torch.manual_seed(3)
            sampled.append(model.generate(PROMPT, do_sample=True, **options))
        assert torch.equal(*sampled)


def test_cached_generation_is_that_of_the_whole_sequence(checkpoint):
    """One token at a time through the cache, and all tokens at once: the same greedy choices."""
    model = duqpp.from_pretrained(checkpoint)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    cached = model.generate(PROMPT[:1], **options)
    whole = model.generate(PROMPT[:1], use_cache=False, **options)
    assert torch.equal(cached, whole)


def test_load_model(checkpoint, tiny_llama):
    quantized, tokenizer = load_model(str(checkpoint))
    oracle.assert_same(logits(quantized), logits(duqpp.from_pretrained(checkpoint)), "logits")
    assert tokenizer("The capital")["input_ids"]
    floating, _ = load_model(str(tiny_llama))
    assert not any(isinstance(m, MXFP4Linear) for m in floating.modules())
    assert not floating.training and floating.dtype == torch.float32


def test_load_model_on_a_device(checkpoint, tiny_llama, monkeypatch):
    for folder in (checkpoint, tiny_llama):
        model, _ = load_model(str(folder), device="meta")
        tensors = [*model.parameters(), *model.buffers()]
        assert tensors and all(tensor.is_meta for tensor in tensors)
        assert model.device.type == "meta" and not model.training

    def full(model, device):
        raise torch.OutOfMemoryError(f"{device} is full\nmuch more")

    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    with pytest.raises(InputError, match=r"does not fit into the memory of meta: meta is full \("):
        load_model(str(tiny_llama), device="meta")


def test_a_gguf_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=f"cannot load the GGUF model of {tmp_path}"):
        load_model("~/bad.gguf")


def test_progress(checkpoint):
    calls = []
    duqpp.from_pretrained(checkpoint, progress=lambda *call: calls.append(call))
    assert calls == [("verify", i, 3) for i in range(4)]


def test_the_original_need_not_be_there(make_tiny, tmp_path):
    """A checkpoint stands alone, wherever it is moved."""
    source = damage.copy_of(make_tiny("llama"), tmp_path / "model")
    out = quantize(source, tmp_path / "out")
    expected = logits(duqpp.from_pretrained(out))
    for file in source.iterdir():
        file.unlink()
    moved = out.rename(tmp_path / "moved here")
    oracle.assert_same(logits(duqpp.from_pretrained(moved)), expected, "logits")


# Damage.


@both_loaders
@pytest.mark.parametrize("region", ["length", "header", "data"])
def test_flipped_bits_never_load(load, region, damaged):
    """In each shard: any bit of the header's length, some of its text, some of each tensor."""
    rng = random.Random(region)
    for file in sorted(damaged.glob("*.safetensors")):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        if region == "length":
            bits = range(0, 64, 3)
        elif region == "header":
            bits = [rng.randrange(64, 8 * start) for _ in range(30)]
        else:
            entries = decoder.read_shard(file)[0].values()
            bits = [
                8 * start + rng.randrange(*(8 * offset for offset in entry["data_offsets"]))
                for entry in rng.sample(sorted(entries, key=str), min(20, len(entries)))
            ]
        for bit in bits:
            damage.flip_bit(file, bit)
            with pytest.raises(CheckpointError, match=file.name if region != "header" else None):
                load(damaged)
            file.write_bytes(content)
    load(damaged)


@both_loaders
def test_truncated_shards_never_load(load, damaged):
    rng = random.Random(0)
    for file in sorted(damaged.glob("*.safetensors")):
        content = file.read_bytes()
        for cut in (
            0,
            7,
            8,
            9,
            len(content) - 1,
            *(rng.randrange(len(content)) for _ in range(15)),
        ):
            file.write_bytes(content[:cut])
            with pytest.raises(CheckpointError, match=file.name):
                load(damaged)
        file.write_bytes(content)


def missing_tensor(folder):
    damage.edit_tensors(folder, f"{LINEAR}.weight_scale", lambda t: t.pop(f"{LINEAR}.weight_scale"))


def missing_norm(folder):
    damage.edit_tensors(folder, "model.norm.weight", lambda t: t.pop("model.norm.weight"))


def missing_head(folder):
    damage.edit_tensors(folder, "lm_head.weight", lambda t: t.pop("lm_head.weight"))


def extra_tensor(folder):
    damage.edit_tensors(folder, "lm_head.weight", lambda t: t.update({"more": torch.ones(2)}))


def float_weight_beside_the_packed(folder):
    added = {f"{LINEAR}.weight": torch.zeros(64, 96)}
    damage.edit_tensors(folder, f"{LINEAR}.rotation", lambda t: t.update(added))


def wrong_dtype(folder):
    packed = damage.get_tensor(folder, f"{LINEAR}.weight_packed")
    damage.set_tensor(folder, f"{LINEAR}.weight_packed", packed.to(torch.bfloat16))


def wrong_rotation_dtype(folder):
    rotation = damage.get_tensor(folder, f"{LINEAR}.rotation")
    damage.set_tensor(folder, f"{LINEAR}.rotation", rotation.float())


def wrong_shape(folder):
    packed = damage.get_tensor(folder, f"{LINEAR}.weight_packed")
    damage.set_tensor(folder, f"{LINEAR}.weight_packed", packed.T)


def shared_for_per_block(folder):
    rotation = damage.get_tensor(folder, f"{LINEAR}.rotation")
    damage.set_tensor(folder, f"{LINEAR}.rotation", rotation[0])


def scale_of_255(folder):
    scales = damage.get_tensor(folder, f"{LINEAR}.weight_scale")
    scales[5, 1] = 255
    damage.set_tensor(folder, f"{LINEAR}.weight_scale", scales)


def singular_rotation(folder):
    rotation = damage.get_tensor(folder, f"{LINEAR}.rotation")
    rotation[1, :, 3] = rotation[1, :, 4]
    damage.set_tensor(folder, f"{LINEAR}.rotation", rotation)


def rotation_of_nan(folder):
    rotation = damage.get_tensor(folder, f"{LINEAR}.pre_rotation")
    rotation[2, 3, 3] = float("nan")
    damage.set_tensor(folder, f"{LINEAR}.pre_rotation", rotation)


def channel_named_twice(folder):
    permutation = damage.get_tensor(folder, f"{LINEAR}.permutation")
    permutation[0] = permutation[1]
    damage.set_tensor(folder, f"{LINEAR}.permutation", permutation)


def missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def path_outside(folder):
    shard = folder / "model-00002-of-00003.safetensors"
    shard.rename(folder.parent / shard.name)

    def change(index):
        for name, file in index["weight_map"].items():
            if file == shard.name:
                index["weight_map"][name] = f"../{file}"

    damage.edit_json(folder / damage.INDEX, change)


def without_checksums(folder):
    file = folder / "model-00003-of-00003.safetensors"
    tensors, _ = damage.read_shard(file)
    file.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


def index_without_a_shard(folder):
    def change(index):
        kept = {n: f for n, f in index["weight_map"].items() if not f.startswith("model-00003")}
        index["weight_map"] = kept

    damage.edit_json(folder / damage.INDEX, change)


def shard_of_another_block(folder):
    second, third = (folder / f"model-0000{i}-of-00003.safetensors" for i in (2, 3))
    third.write_bytes(second.read_bytes())


DAMAGE = {
    missing_tensor: f"lacks {LINEAR}.weight_scale",
    missing_norm: "lacks model.norm.weight",
    missing_head: "lacks lm_head.weight",
    extra_tensor: "more does not belong to this model",
    float_weight_beside_the_packed: f"{LINEAR}.weight does not belong to this model",
    wrong_dtype: f"{LINEAR}.weight_packed must be torch.uint8",
    wrong_rotation_dtype: f"{LINEAR}.rotation must be torch.bfloat16",
    wrong_shape: f"{LINEAR}.weight_packed must be",
    shared_for_per_block: f"{LINEAR}.rotation must be",
    scale_of_255: f"{LINEAR}.weight_scale has a scale byte of 255",
    singular_rotation: f"{LINEAR}.rotation is singular",
    rotation_of_nan: f"{LINEAR}.pre_rotation contains NaN",
    channel_named_twice: f"{LINEAR}.permutation does not name every channel once",
    without_checksums: "model-00003-of-00003.safetensors has no checksums",
    index_without_a_shard: "lacks model.layers.1",
    shard_of_another_block: "is in both",
}


@both_loaders
@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_damage_with_right_checksums(load, change, damaged):
    change(damaged)
    with pytest.raises(CheckpointError, match=DAMAGE[change]) as raised:
        load(damaged)
    assert "\n" not in str(raised.value)


@both_loaders
def test_missing_shard(load, damaged):
    missing_shard(damaged)
    with pytest.raises((CheckpointError, OSError), match="model-00002-of-00003"):
        load(damaged)


@both_loaders
def test_index_that_leads_outside(load, damaged):
    path_outside(damaged)
    with pytest.raises(CheckpointError, match=r"index.* names .*shard .* which is not|that is not"):
        load(damaged)


@both_loaders
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("format_version", 2), ("format_version", None), ("rotation", "shared")],
        *[("rotation", "none"), ("rotation", "diagonal"), ("permuted", False), ("permuted", 1)],
        *[("method", None), ("scale_rule", {}), ("scale_rule", {"weights": "mse"})],
        *[("modules_to_not_convert", "lm_head"), ("modules_to_not_convert", ["down_proj"])],
        *[("modules_to_not_convert", ["model.layers.0"]), ("provenance", [])],
    ],
    ids=str,
)
def test_bad_quantization_config(load, field, value, damaged):
    """Also after the same shards were loaded with their own configuration."""
    load(damaged)
    damage.edit_json(
        damaged / "config.json", lambda c: c["quantization_config"].update({field: value})
    )
    with pytest.raises(CheckpointError):
        load(damaged)


def test_damage_after_a_first_load_is_found(damaged):
    """Even where size and time of change of the file stay as they were."""
    duqpp.from_pretrained(damaged)
    file = damaged / "model-00002-of-00003.safetensors"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    damage.flip_bit(file, 8 * file.stat().st_size - 3)
    os.utime(file, ns=times)
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="is altered"):
            load(damaged)


def test_not_a_duqpp_checkpoint(damaged, tiny_llama):
    with pytest.raises(CheckpointError, match="is not quantized: no quantization_config"):
        duqpp.from_pretrained(tiny_llama)
    for method in ("mxfp4", None, 5):
        damage.edit_json(
            damaged / "config.json",
            lambda c, method=method: c["quantization_config"].update(quant_method=method),
        )
        with pytest.raises(CheckpointError, match="quant_method is"):
            duqpp.from_pretrained(damaged)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"quantization_config": 5}', "\x00", "[" * 9999]
)
def test_malformed_config(content, damaged):
    (damaged / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json|is not quantized"):
        duqpp.from_pretrained(damaged)
    with pytest.raises(DuqppError) as raised:
        load_model(str(damaged))
    assert "object has no attribute 'get'" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 5}', '{"weight_map": {}}'])
def test_malformed_index(content, damaged):
    (damaged / damage.INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        duqpp.from_pretrained(damaged)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("model_type", "gpt2"), ("model_type", None), ("hidden_size", 96), ("hidden_size", "x")],
        *[("hidden_size", -64), ("num_hidden_layers", 1), ("num_hidden_layers", 3)],
        *[("num_hidden_layers", 0), ("num_key_value_heads", 4), ("num_key_value_heads", 0)],
        *[("vocab_size", 319), ("intermediate_size", 128), ("tie_word_embeddings", True)],
        *[("hidden_act", "no such"), ("num_attention_heads", None), ("dtype", "int8")],
    ],
    ids=str,
)
def test_config_of_another_model(field, value, damaged):
    damage.edit_json(damaged / "config.json", lambda c: c.update({field: value}))
    with pytest.raises(DuqppError) as raised:
        duqpp.from_pretrained(damaged)
    assert "\n" not in str(raised.value)


def test_missing_files(damaged, tmp_path):
    (damaged / damage.INDEX).unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        duqpp.from_pretrained(damaged)
    (damaged / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        duqpp.from_pretrained(damaged)


def test_hub_name_that_does_not_exist(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="nobody/nothing is no local folder"):
        duqpp.from_pretrained("nobody/nothing")
    with pytest.raises(InputError, match="nobody/nothing is no local folder"):
        load_model("nobody/nothing")


def test_revision_of_a_hub_name(checkpoint, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns=(), **options):
        asked.append((name, options))
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    duqpp.from_pretrained("someone/out", revision="v2", cache_dir="c", dtype=torch.bfloat16)
    assert asked == [("someone/out", {"revision": "v2", "cache_dir": "c"})] * 2


def test_a_model_that_is_not_quantized_is_not_downloaded(tiny_llama, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append(options)
        return str(tiny_llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="is not quantized"):
        duqpp.from_pretrained("someone/float")
    assert asked == [{"allow_patterns": ["config.json"]}]


def test_configuration_of_a_checkpoint_for_a_float_model(tiny_llama):
    from duqpp.integrations.transformers import DuqppConfig

    config = DuqppConfig(
        **duqpp.checkpoint.layout.Layout("rtn", "none", False, "mse", "even").to_dict()
    )
    with pytest.raises(InputError, match="describes a quantized checkpoint"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)


# A checkpoint is data: nothing in it is executed.


@both_loaders
@pytest.mark.parametrize("kind", ["auto_map", "unknown model_type", "tokenizer", "plain"])
def test_code_in_a_checkpoint_is_not_imported(load, kind, damaged, tmp_path):
    marker = tmp_path / "executed"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "__init__"):
        (damaged / f"{name}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\nEvilConfig = Evil\n"
        )
    auto_map = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    if kind == "auto_map":
        damage.edit_json(damaged / "config.json", lambda c: c.update(auto_map=auto_map))
    if kind == "unknown model_type":
        damage.edit_json(
            damaged / "config.json", lambda c: c.update(auto_map=auto_map, model_type="evil")
        )
    if kind == "tokenizer":
        damage.edit_json(damaged / "tokenizer_config.json", lambda c: c.update(auto_map=auto_map))
    if kind == "unknown model_type":
        with pytest.raises(ValueError, match=r"trust_remote_code|config\.json"):
            load(damaged)
        with pytest.raises(DuqppError):
            load_model(str(damaged))
    else:
        load(damaged)
        load_model(str(damaged))
    assert not marker.exists()
    assert not any(name.endswith("_evil") for name in sys.modules)


@both_loaders
def test_pickles_are_refused_unread(load, damaged, tmp_path):
    marker = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return Path.touch, (marker,)

    for file in [*damaged.glob("*.safetensors"), damaged / damage.INDEX]:
        file.unlink()
    (damaged / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Trap()}))
    with pytest.raises(CheckpointError):
        load(damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "pytorch_model.bin").read_bytes())
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load(damaged)
    assert not marker.exists()


def test_pickles_beside_the_shards_are_ignored(damaged, tmp_path):
    marker = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return Path.touch, (marker,)

    (damaged / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Trap()}))
    with pytest.raises(CheckpointError):
        duqpp.from_pretrained(damaged, use_safetensors=False)
    duqpp.from_pretrained(damaged)
    assert not marker.exists()


@both_loaders
def test_a_single_file_beside_the_shards_is_checked_too(load, damaged):
    """transformers prefers it to the index: what it loads is what must be verified."""
    tensors = {}
    for file in damaged.glob("*.safetensors"):
        tensors |= damage.read_shard(file)[0]
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    content = safetensors.torch.save(tensors, {"format": "pt", "duqpp.crc32": "{}"})
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* is altered"):
        load(damaged)


def test_registers_again_when_imported_again(checkpoint):
    """As when a notebook reloads the package, or an installed and an editable copy meet."""
    importlib.reload(duqpp.integrations.transformers)
    oracle.assert_same(
        logits(AutoModelForCausalLM.from_pretrained(checkpoint)),
        logits(duqpp.from_pretrained(checkpoint)),
        "logits",
    )
