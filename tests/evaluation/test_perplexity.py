"""Perplexity against its definition, computed in float64 on full logits."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.evaluation import perplexity as evaluate
from duqpp.evaluation.perplexity import perplexity, perplexity_and_reference

TOKENS = torch.randint(0, 320, (1000,), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def direct(model, tokens: torch.Tensor, seq_len: int) -> list[float]:
    """Each window's mean NLL: for every token but its first, from the logits at the one before."""
    means = []
    for start in range(0, len(tokens) - seq_len + 1, seq_len):
        window = tokens[start : start + seq_len]
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        nll = []
        for position in range(1, seq_len):
            row = logits[position - 1]
            nll.append(float(torch.logsumexp(row, 0) - row[window[position]]))
        means.append(math.fsum(nll) / len(nll))
    return means


@pytest.mark.parametrize("seq_len", [2, 7, 100, 333, 512])
def test_perplexity_by_definition(seq_len, model):
    result = perplexity(model, TOKENS, seq_len=seq_len)
    expected = direct(model, TOKENS, seq_len)
    assert result.windows == len(expected) == 1000 // seq_len
    assert result.seq_len == seq_len
    # float32 logits, log-softmax and a sum: relative 2**-23 each, a few times over.
    assert result.window_nll == pytest.approx(expected, rel=2e-6)
    mean = math.fsum(expected) / len(expected)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)


SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# What a model does to its states and logits besides the product with lm_head, or in another place.
OTHERS = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "gpt2": {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_perplexity_of_any_family_by_definition(kind):
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind, **SIZES, **OTHERS[kind], pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0)  # so that logits are of a size that scales and caps change
    result, reference = perplexity_and_reference(model, TOKENS, seq_len=100)
    assert result.window_nll == pytest.approx(direct(model, TOKENS, 100), rel=2e-6)
    again = perplexity(model, TOKENS, seq_len=100, reference=reference)
    assert (again.divergence.kl, again.divergence.agreement) == (0.0, 1.0)


def test_tail_is_dropped_and_windows_do_not_overlap(model):
    whole = perplexity(model, TOKENS[:900], seq_len=300)
    tail = perplexity(model, TOKENS[:999], seq_len=300)
    assert whole.window_nll == tail.window_nll
    apart = [perplexity(model, TOKENS[i : i + 300], seq_len=300) for i in (0, 300, 600)]
    assert whole.window_nll == [result.window_nll[0] for result in apart]


def test_windows_are_taken_from_the_beginning(model):
    every = perplexity(model, TOKENS, seq_len=100)
    few = perplexity(model, TOKENS, seq_len=100, windows=3)
    assert few.windows == 3 and few.window_nll == every.window_nll[:3]
    assert perplexity(model, TOKENS, seq_len=100, windows=99).windows == 10


@pytest.mark.parametrize("chunk", [1, 7, 99, 100, 4096])
def test_chunks_of_logits_do_not_matter(chunk, model, monkeypatch):
    expected = perplexity(model, TOKENS, seq_len=100)
    monkeypatch.setattr(evaluate, "LOGIT_TOKENS", chunk)
    result = perplexity(model, TOKENS, seq_len=100)
    assert result.window_nll == pytest.approx(expected.window_nll, rel=1e-6)


def test_logits_are_never_whole(model, monkeypatch):
    """A long window over a large vocabulary would not fit in memory."""
    sizes = []
    monkeypatch.setattr(evaluate, "LOGIT_TOKENS", 64)
    handle = model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(out.shape[-2]))
    perplexity(model, TOKENS, seq_len=500, windows=1)
    handle.remove()
    assert max(sizes) <= 64 and sum(sizes) == 499


def test_uniform_model_has_the_vocabulary_as_perplexity(model):
    head = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.zero_()
    result = perplexity(model, TOKENS, seq_len=50)
    model.lm_head.weight.data.copy_(head)
    assert result.perplexity == pytest.approx(320, rel=1e-6)


def test_bfloat16_model_sums_in_float32(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    result = perplexity(model, TOKENS, seq_len=200)
    assert result.window_nll == pytest.approx(direct(model, TOKENS, 200), rel=2e-6)


def test_quantized_model(tiny_llama, tmp_path):
    config = QuantizeConfig(method="hadamard")
    duqpp.quantize_model(str(tiny_llama), tmp_path / "out", config)
    model = duqpp.from_pretrained(tmp_path / "out")
    result = perplexity(model, TOKENS, seq_len=100)
    assert result.window_nll == pytest.approx(direct(model, TOKENS, 100), rel=2e-6)
    assert result.window_nll == perplexity(model, TOKENS, seq_len=100).window_nll


@pytest.mark.parametrize(
    ("tokens", "seq_len", "windows", "message"),
    [
        (99, 100, None, "has 99 tokens, fewer than one window of 100: lower `seq_len`"),
        (0, 2, None, "has 0 tokens"),
        (50, 1, None, "`seq_len` must be at least 2, got 1"),
        (50, 0, None, "`seq_len` must be at least 2, got 0"),
        (900, 513, None, "windows of 513 tokens exceed the model's 512 positions: lower `seq_len`"),
        (50, 10, 0, "`windows` must be at least 1, got 0"),
        (50, 10, -3, "`windows` must be at least 1, got -3"),
    ],
)
def test_what_cannot_be_evaluated(tokens, seq_len, windows, message, model):
    with pytest.raises(InputError, match=message):
        perplexity(model, TOKENS[:tokens], seq_len=seq_len, windows=windows)


@pytest.mark.parametrize("token", [-1, 320])
def test_tokens_are_of_the_vocabulary(token, model):
    tokens = TOKENS[:100].clone()
    tokens[70], tokens[71] = 0, 319
    assert math.isfinite(perplexity(model, tokens, seq_len=100).perplexity)
    tokens[70] = token
    with pytest.raises(InputError, match=r"tokens must be in \[0, 320\)"):
        perplexity(model, tokens, seq_len=100)


def test_nan_is_not_hidden(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    assert math.isnan(perplexity(model, TOKENS, seq_len=100).perplexity)


def test_progress_and_json(model):
    calls = []
    result = perplexity(model, TOKENS, seq_len=400, progress=lambda *call: calls.append(call))
    assert calls == [("evaluate", i, 2) for i in range(3)]
    values = result.to_dict()
    assert values["perplexity"] == result.perplexity and values["windows"] == 2
    assert values["window_nll"] == result.window_nll and values["seconds"] > 0
    assert "non-overlapping windows" in values["convention"]


def test_model_is_left_as_it_was(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).train()
    perplexity(model, TOKENS, seq_len=400)
    assert model.training and all(p.grad is None for p in model.parameters())
