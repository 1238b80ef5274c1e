"""A stack gives what the whole model gives, from one decoder block at a time."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import duqpp
from duqpp.checkpoint.stack import QuantizedStack
from duqpp.evaluation.models import open_model
from duqpp.evaluation.perplexity import perplexity, perplexity_and_reference
from duqpp.models.stack import DecoderStack
from tests.families import FAMILIES

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


def same(one, other) -> bool:
    return (one.window_nll, one.divergence) == (other.window_nll, other.divergence)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_results_are_those_of_the_whole_model(family, dtype, make_tiny, tmp_path):
    """Bit by bit: perplexity, KL divergence and agreement."""
    options = {"tie_word_embeddings": family == "qwen2", "dtype": dtype, "num_hidden_layers": 3}
    folder = make_tiny(family, **options)
    out = quantized(folder, tmp_path / "out")
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    expected, reference = perplexity_and_reference(float_model, TOKENS, **WINDOWS)
    stack, tokenizer = open_model(str(folder))
    assert type(stack) is DecoderStack and tokenizer("Rome")["input_ids"]
    found, streamed = perplexity_and_reference(stack, TOKENS, **WINDOWS)
    assert same(found, expected) and found.perplexity == expected.perplexity
    assert all(map(torch.equal, streamed.hidden, reference.hidden))
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
