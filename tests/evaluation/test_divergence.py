"""KL divergence and top-1 agreement against their definitions, in float64 on full logits."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.evaluation import perplexity as evaluate
from duqpp.evaluation.divergence import Divergence
from duqpp.evaluation.perplexity import perplexity, perplexity_and_reference
from duqpp.models.logits import kl_and_agreement

TOKENS = torch.randint(0, 320, (1000,), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("divergence") / "out"
    duqpp.quantize_model(str(tiny_llama), out, QuantizeConfig(method="hadamard"))
    return duqpp.from_pretrained(out)


def kl_by_definition(p_logits: torch.Tensor, q_logits: torch.Tensor) -> np.ndarray:
    """sum_v p_v ln(p_v / q_v) of each row, in float64."""
    p_logits, q_logits = p_logits.numpy().astype(np.float64), q_logits.numpy().astype(np.float64)
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (p_logits, q_logits))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return (p * np.log(p / q)).sum(1)


def gaussian(tokens: int, vocabulary: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, vocabulary, generator=generator)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 2), (7, 5), (33, 1000)])
def test_kl_by_definition(tokens, vocabulary):
    p, q = gaussian(tokens, vocabulary, 0), gaussian(tokens, vocabulary, 1)
    expected = math.fsum(kl_by_definition(p, q))
    kl, _ = kl_and_agreement(p, q)
    # float32 log-softmax: some 2**-23 of logits of up to 15, a few times over, for each token.
    assert kl == pytest.approx(expected, rel=1e-6, abs=tokens * 6e-6)
    other, _ = kl_and_agreement(q, p)
    assert abs(other - kl) > 0.01 * kl, "KL is not symmetric: which is p matters"


def test_kl_of_two_known_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    kl, agreeing = kl_and_agreement(p.log() + 7, q.log() - 2)  # a constant changes no distribution
    assert kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)
    assert agreeing == 0


def test_kl_of_a_known_perturbation():
    """Adding e to one logit of p: KL = ln(1 + p_v (exp(e) - 1)) - p_v e."""
    p = gaussian(1, 50, 2, scale=1.0)
    for e in (-1.0, 0.01, 0.5, 4.0):
        q = p.clone()
        q[0, 9] += e
        share = float(p.double().softmax(-1)[0, 9])
        expected = math.log1p(share * math.expm1(e)) - share * e
        assert kl_and_agreement(p, q)[0] == pytest.approx(expected, abs=1e-6)


def test_kl_of_logits_far_apart():
    p, q = torch.tensor([[0.0, 1000.0]]), torch.tensor([[1000.0, 0.0]])
    assert kl_and_agreement(p, q) == (1000.0, 0)
    assert kl_and_agreement(p, p) == (0.0, 1)


def test_terms_are_summed_in_float64():
    """2**14 tokens of equal KL: a float32 running sum would lose their last bits."""
    p, q = gaussian(1, 64, 5), gaussian(1, 64, 6)
    one, _ = kl_and_agreement(p, q)
    many, _ = kl_and_agreement(p.expand(2**14, -1), q.expand(2**14, -1))
    assert many == pytest.approx(2**14 * one, rel=1e-12)


def test_agreement_on_planted_maxima():
    p, q = gaussian(100, 40, 3), gaussian(100, 40, 4)
    places = torch.arange(100) % 40
    p[torch.arange(100), places] = 99.0
    same = torch.arange(100) % 4 != 0  # 75 of them
    q[torch.arange(100), torch.where(same, places, (places + 1) % 40)] = 50.0
    assert kl_and_agreement(p, q)[1] == 75
    assert kl_and_agreement(q, p)[1] == 75


def test_a_model_does_not_diverge_from_itself(model, quantized):
    for one in (model, quantized):
        _, reference = perplexity_and_reference(one, TOKENS, seq_len=300)
        found = perplexity(one, TOKENS, seq_len=300, reference=reference).divergence
        assert found == Divergence(0.0, 1.0, [0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("seq_len", [2, 7, 100, 333, 512])
def test_a_model_by_definition(seq_len, model, quantized):
    """On the positions of the NLL: all but each window's last."""
    tokens = TOKENS[: 50 * seq_len]
    _, reference = perplexity_and_reference(model, tokens, seq_len=seq_len)
    found = perplexity(quantized, tokens, seq_len=seq_len, reference=reference).divergence
    count = len(tokens) // seq_len
    kl, agreement = [], []
    for window in tokens[: count * seq_len].view(count, seq_len):
        with torch.no_grad():
            p, q = (m(input_ids=window[None]).logits[0, :-1] for m in (model, quantized))
        kl.append(float(np.mean(kl_by_definition(p, q))))
        agreement.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert len(found.window_kl) == len(found.window_agreement) == count
    assert found.window_kl == pytest.approx(kl, rel=1e-5, abs=1e-6)
    assert found.window_agreement == agreement
    assert found.kl == pytest.approx(math.fsum(found.window_kl) / count, rel=1e-12)
    assert found.agreement == pytest.approx(math.fsum(found.window_agreement) / count, rel=1e-12)
    if seq_len >= 100:
        assert found.kl > 1e-3 and 0 < found.agreement < 1


@pytest.mark.parametrize("chunk", [1, 7, 99, 100, 4096])
def test_chunks_of_logits_do_not_matter(chunk, model, quantized, monkeypatch):
    _, reference = perplexity_and_reference(model, TOKENS, seq_len=100)
    expected = perplexity(quantized, TOKENS, seq_len=100, reference=reference).divergence
    monkeypatch.setattr(evaluate, "LOGIT_TOKENS", chunk)
    found = perplexity(quantized, TOKENS, seq_len=100, reference=reference).divergence
    assert found.window_kl == pytest.approx(expected.window_kl, abs=2e-6)
    assert found.window_agreement == expected.window_agreement


def test_perplexity_is_the_same_to_the_last_bit(model, quantized):
    plain = perplexity(model, TOKENS, seq_len=100)
    result, reference = perplexity_and_reference(model, TOKENS, seq_len=100)
    assert result.window_nll == plain.window_nll and result.perplexity == plain.perplexity
    assert plain.divergence is None and result.divergence is None
    alone = perplexity(quantized, TOKENS, seq_len=100)
    beside = perplexity(quantized, TOKENS, seq_len=100, reference=reference)
    assert beside.window_nll == alone.window_nll and beside.perplexity == alone.perplexity


def test_a_reference_is_hidden_states_and_a_head(model, monkeypatch):
    """No logits: they are computed again, at most a chunk at a time."""
    _, reference = perplexity_and_reference(model, TOKENS, seq_len=300, windows=2)
    assert [tuple(hidden.shape) for hidden in reference.hidden] == [(299, 64)] * 2
    assert reference.head.lm_head is model.lm_head
    sizes = []
    monkeypatch.setattr(evaluate, "LOGIT_TOKENS", 64)
    handle = model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(out.shape[-2]))
    perplexity(model, TOKENS, seq_len=300, windows=2, reference=reference)
    handle.remove()
    assert max(sizes) <= 64 and sum(sizes) == 2 * 2 * 299


def test_bfloat16_hidden_states_are_kept_as_they_are(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    _, reference = perplexity_and_reference(model, TOKENS, seq_len=200)
    assert {hidden.dtype for hidden in reference.hidden} == {torch.bfloat16}
    found = perplexity(model, TOKENS, seq_len=200, reference=reference).divergence
    assert (found.kl, found.agreement) == (0.0, 1.0)


def test_nan_is_not_hidden(tiny_llama, model):
    _, reference = perplexity_and_reference(model, TOKENS, seq_len=100)
    broken = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    broken.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    found = perplexity(broken, TOKENS, seq_len=100, reference=reference).divergence
    assert math.isnan(found.kl)


def test_another_vocabulary(make_tiny, model):
    other = AutoModelForCausalLM.from_pretrained(make_tiny("llama", vocab_size=330)).eval()
    _, reference = perplexity_and_reference(other, TOKENS, seq_len=100)
    message = r"reference's vocabulary has 330 tokens, the model's 320: a reference is the float"
    with pytest.raises(InputError, match=message):
        perplexity(model, TOKENS, seq_len=100, reference=reference)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda tokens: tokens.flip(0), {"seq_len": 100}),
        (lambda tokens: tokens, {"seq_len": 200}),
        (lambda tokens: tokens, {"seq_len": 100, "windows": 3}),
    ],
    ids=["tokens", "seq_len", "windows"],
)
def test_other_windows(change, options, model):
    _, reference = perplexity_and_reference(model, TOKENS, seq_len=100)
    with pytest.raises(InputError, match="reference was evaluated on other tokens"):
        perplexity(model, change(TOKENS), reference=reference, **options)


def test_json(model, quantized):
    _, reference = perplexity_and_reference(model, TOKENS, seq_len=400)
    values = perplexity(quantized, TOKENS, seq_len=400, reference=reference).to_dict()
    assert set(values["divergence"]) == {"kl", "agreement", "window_kl", "window_agreement"}
    assert perplexity(quantized, TOKENS, seq_len=400).to_dict()["divergence"] is None
