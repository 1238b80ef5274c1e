"""A stack gives what the whole model gives, from one decoder block at a time."""

import math
import shutil
from pathlib import Path

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import duqpp
from duqpp.checkpoint.stack import CheckpointSource, QuantizedStack
from duqpp.errors import CheckpointError, InputError
from duqpp.evaluation import models
from duqpp.evaluation.models import open_model
from duqpp.evaluation.perplexity import perplexity, perplexity_and_reference
from duqpp.models.source import open_source
from duqpp.models.stack import BlockInputs, DecoderStack
from duqpp.placement import HOST, Placement
from tests.checkpoint import damage
from tests.families import FAMILIES
from tests.memory import peak_growth
from tests.second_device import second_device

TOKENS = torch.randint(0, 300, (700,), generator=torch.Generator().manual_seed(5))
WINDOWS = {"seq_len": 100, "windows": 5}


def quantized(model: Path, out: Path, **options) -> Path:
    config = duqpp.QuantizeConfig(**{"method": "hadamard"} | options)
    return duqpp.quantize_model(str(model), out, config, device="cpu").folder


def saved_again(folder: Path, out: Path, shard_size: str) -> Path:
    """A checkpoint with its shards cut elsewhere: blocks in several, or several in one."""
    duqpp.from_pretrained(folder).save_pretrained(out, max_shard_size=shard_size)
    for file in folder.glob("*token*"):
        shutil.copy(file, out)
    return out


def in_bfloat16(folder: Path, out: Path) -> Path:
    """A copy of a float32 model."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(out)
    for file in folder.glob("*token*"):
        shutil.copy(file, out)
    return out


def same(one, other) -> bool:
    return (one.window_nll, one.divergence) == (other.window_nll, other.divergence)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_results_are_those_of_the_whole_model(family, dtype, make_tiny, tmp_path):
    """Bit by bit: perplexity, KL divergence and agreement."""
    folder = make_tiny(family, tie_word_embeddings=family == "qwen2", num_hidden_layers=3)
    folder = folder if dtype == "float32" else in_bfloat16(folder, tmp_path / "model")
    out = quantized(folder, tmp_path / "out")
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    expected, reference = perplexity_and_reference(float_model, TOKENS, **WINDOWS)
    stack, tokenizer = open_model(str(folder))
    assert type(stack) is DecoderStack and tokenizer("Rome")["input_ids"]
    found, streamed = perplexity_and_reference(stack, TOKENS, **WINDOWS)
    assert same(found, expected) and found.perplexity == expected.perplexity
    assert all(map(torch.equal, streamed.hidden, reference.hidden))
    assert streamed.hidden[0].dtype == getattr(torch, dtype)
    whole = duqpp.from_pretrained(out).eval()
    expected = perplexity(whole, TOKENS, **WINDOWS, reference=reference)
    stack, _ = open_model(str(out))
    assert type(stack) is QuantizedStack
    for _ in range(2):  # a stack can be evaluated again
        assert same(perplexity(stack, TOKENS, **WINDOWS, reference=streamed), expected)
    assert expected.divergence.kl > 0 and expected.window_nll != found.window_nll


@pytest.mark.parametrize("shard_size", ["20KB", "10GB"])
@pytest.mark.parametrize("method", ["duquant", "rtn"])
def test_shards_may_be_cut_anywhere(method, shard_size, make_tiny, tmp_path):
    model = make_tiny("qwen3", num_hidden_layers=3)
    out = quantized(model, tmp_path / "out", method=method, skip=("mlp",), samples=2, seq_len=64)
    again = saved_again(out, tmp_path / "again", shard_size)
    assert len(list(again.glob("*.safetensors"))) != len(list(out.glob("*.safetensors")))
    expected = perplexity(open_model(str(out))[0], TOKENS, **WINDOWS)
    assert same(perplexity(open_model(str(again))[0], TOKENS, **WINDOWS), expected)
    assert same(perplexity(duqpp.from_pretrained(again), TOKENS, **WINDOWS), expected)


@pytest.mark.parametrize("rests", ["host", "device"])
def test_a_stack_computes_where_its_placement_says(rests, make_tiny, tmp_path, monkeypatch):
    """On a device that any machine simulates, to the numbers that the CPU gives; and keeps states
    there if it has room."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    folder = make_tiny("llama", hidden_size=32, intermediate_size=64, **heads)
    out = quantized(folder, tmp_path / "out")

    def evaluated(placement: Placement) -> list:
        source = open_source(str(folder))
        result, reference = perplexity_and_reference(
            DecoderStack(source, placement=placement), TOKENS, **WINDOWS
        )
        assert {hidden.device for hidden in reference.hidden} == {HOST}
        stack = QuantizedStack(CheckpointSource(out), placement)
        beside = perplexity(stack, TOKENS, **WINDOWS, reference=reference)
        return [result.window_nll, beside.window_nll, beside.divergence]

    expected = evaluated(Placement())
    with second_device() as device:
        free, placed, first_inputs = 0.0 if rests == "host" else 1e15, [], DecoderStack.first_inputs

        def watched(*args, **options):
            placed.extend(p.storage for p in [options.get("placement")] if p is not None)
            return first_inputs(*args, **options)

        monkeypatch.setattr("duqpp.placement.devices.free_memory", lambda device: free)
        monkeypatch.setattr(DecoderStack, "first_inputs", watched)
        assert evaluated(Placement(device)) == expected
    assert placed == [HOST if rests == "host" else device] * 2


def test_memory_does_not_grow_with_the_number_of_blocks(make_tiny, tmp_path):
    """Of a float model, cast so that its weights are copies, and of a checkpoint beside it."""

    def grown(blocks: int) -> tuple[int, int]:
        folder = make_tiny("llama", num_hidden_layers=blocks, intermediate_size=256)
        out = quantized(folder, tmp_path / str(blocks))
        stack, kept = DecoderStack(open_source(str(folder)), torch.bfloat16), []
        own = peak_growth(lambda: kept.extend(perplexity_and_reference(stack, TOKENS, **WINDOWS)))
        beside = {**WINDOWS, "reference": kept[1]}
        return own, peak_growth(lambda: perplexity(open_model(str(out))[0], TOKENS, **beside))

    block = DecoderStack(open_source(str(make_tiny("llama", intermediate_size=256)))).block(0)
    weights = sum(parameter.numel() for parameter in block.parameters())
    for few, many, size in zip(grown(2), grown(6), (2 * weights, weights / 2), strict=True):
        assert many - few < size / 4
        assert few > size, "a block is among what was counted"


def test_a_shard_that_is_damaged_is_found_when_it_is_read(make_tiny, tmp_path):
    out = quantized(make_tiny("llama"), tmp_path / "out")
    shard = sorted(out.glob("*.safetensors"))[-1]
    content = shard.read_bytes()
    stack = open_model(str(out))[0]
    shard.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(CheckpointError, match=r"layers\.1\..* is altered \(its checksum differs\)"):
        perplexity(stack, TOKENS, **WINDOWS)
    shard.write_bytes(content)
    assert math.isfinite(perplexity(stack, TOKENS, **WINDOWS).perplexity)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_checkpoint_is_opened_by_its_headers(manifest, make_tiny, tmp_path):
    """What is wrong with a shard as a whole is known before any window is read."""
    out = quantized(make_tiny("llama"), tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    damage.edit_tensors(out, name, lambda tensors: tensors.pop(name))
    message = "is the shard of another run, or altered"
    if not manifest:
        (out / "duqpp-manifest.json").unlink()
        message = f"lacks {name}"
    with pytest.raises(CheckpointError, match=message):
        open_model(str(out))


def test_transforms_of_a_group_are_compared(make_tiny, tmp_path):
    out = quantized(make_tiny("llama"), tmp_path / "out")
    (out / "duqpp-manifest.json").unlink()
    name = "model.layers.1.mlp.up_proj.rotation"
    damage.set_tensor(out, name, torch.eye(32).bfloat16())
    with pytest.raises(CheckpointError, match=f"{name} is not model.layers.1.mlp.gate_proj.rot"):
        perplexity(open_model(str(out))[0], TOKENS, **WINDOWS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_float_weights_that_are_no_numbers_are_named(value, make_tiny, tmp_path):
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    damage.set_tensor(folder, name, torch.full((96, 64), value))
    with pytest.raises(InputError, match=f"{name} has NaN or infinite values"):
        perplexity(open_model(str(folder))[0], TOKENS, **WINDOWS)


def test_norms_in_another_dtype_are_cast_as_transformers_does(make_tiny, tmp_path):
    out = quantized(in_bfloat16(make_tiny("llama"), tmp_path / "model"), tmp_path / "out")
    (out / "duqpp-manifest.json").unlink()
    damage.set_tensor(out, "model.layers.0.input_layernorm.weight", torch.rand(64))
    expected = perplexity(duqpp.from_pretrained(out), TOKENS, **WINDOWS)
    assert same(perplexity(open_model(str(out))[0], TOKENS, **WINDOWS), expected)


def quantized_by_others(folder: Path) -> None:
    damage.edit_json(
        folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"})
    )


def of_an_unknown_family(folder: Path) -> None:
    damage.edit_json(folder / "config.json", lambda c: c.update(model_type="gpt2"))


def without_safetensors(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


@pytest.mark.parametrize("change", [quantized_by_others, of_an_unknown_family, without_safetensors])
def test_what_cannot_stream_is_loaded_whole(change, make_tiny, tmp_path, monkeypatch):
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "model")
    monkeypatch.setattr(models, "load_model", lambda model, **options: (model, options))
    assert isinstance(open_model(str(folder))[0], DecoderStack)
    change(folder)
    options = {"device": HOST, "device_map": None, "progress": None}
    assert open_model(str(folder)) == (str(folder), options)


def test_a_device_map_loads_the_whole_model(make_tiny, tmp_path, monkeypatch):
    """On this machine's devices: the CPU, as if it had no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = make_tiny("llama")
    for path in (folder, quantized(folder, tmp_path / "out")):
        model, _ = open_model(str(path), device_map="auto")
        assert isinstance(model, PreTrainedModel)
        expected = perplexity(open_model(str(path))[0], TOKENS, **WINDOWS)
        assert same(perplexity(model, TOKENS, **WINDOWS), expected)


def test_a_head_that_accelerate_has_offloaded(make_tiny):
    model = AutoModelForCausalLM.from_pretrained(make_tiny("llama")).eval()
    accelerate.cpu_offload(model.lm_head, execution_device=HOST)
    assert model.lm_head.weight.is_meta
    _, reference = perplexity_and_reference(model, TOKENS, **WINDOWS)
    found = perplexity(model, TOKENS, **WINDOWS, reference=reference)
    assert (found.divergence.kl, found.divergence.agreement) == (0.0, 1.0)


def test_a_device_map_without_accelerate(make_tiny, monkeypatch):
    monkeypatch.setattr("duqpp.integrations.transformers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^`device_map` needs accelerate: pip install "):
        open_model(str(make_tiny("llama")), device_map="auto")


def test_progress_counts_windows_in_every_block_and_the_head(make_tiny):
    stack, calls = open_model(str(make_tiny("llama")))[0], []
    perplexity(stack, TOKENS, **WINDOWS, progress=lambda *call: calls.append(call))
    assert calls == [("evaluate", done, 5 * (2 + 1)) for done in range(5 * (2 + 1) + 1)]


@pytest.mark.parametrize("where", ["forward", "block", "head"])
def test_a_gpu_that_is_too_small_is_one_line(where, make_tiny, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    stack = open_model(str(make_tiny("llama")))[0]
    place = (BlockInputs, "run") if where == "forward" else (DecoderStack, where)
    monkeypatch.setattr(*place, full)
    message = (
        r"^the model with one window of `seq_len` tokens does not fit into the memory of cpu: "
    )
    with pytest.raises(InputError, match=message + "CUDA out of memory.*needs no GPU"):
        perplexity(stack, TOKENS, **WINDOWS)
