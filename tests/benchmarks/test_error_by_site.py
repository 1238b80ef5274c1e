"""A partly rounded model: with all of it the quantized model, with none of it the float one."""

import json
from pathlib import Path

import error_by_site
import pytest
from error_by_site import ROUNDED, cases

from duqpp.calibration.tokens import BUILTIN, read_text, tokenize
from duqpp.config import QuantizeConfig
from duqpp.evaluate import perplexity, perplexity_and_reference
from duqpp.integrations.transformers import load_model
from duqpp.quantize import quantize_model

WINDOW = {"seq_len": 64, "windows": 2}


def quantize(model: Path, out: Path, **settings: object) -> Path:
    quantize_model(str(model), out, QuantizeConfig(samples=2, seq_len=64, **settings))
    return out


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    return quantize(tiny_llama, tmp_path_factory.mktemp("q") / "out", method="duqpp")


@pytest.fixture
def rows(tiny_llama, quantized, capsys) -> dict[tuple[str, str, str], dict]:
    words = ["--windows", "2", "--seq-len", "64", "--json"]
    error_by_site.main([str(tiny_llama), str(quantized), *words])
    found = json.loads(capsys.readouterr().out)["rows"]
    return {(row["rounded"], row["linears"], row["blocks"]): row for row in found}


def test_all_that_is_rounded_is_the_quantized_model(rows, tiny_llama, quantized):
    model, tokenizer = load_model(str(tiny_llama))
    tokens = tokenize(tokenizer, read_text(BUILTIN, part="evaluation"))
    exact, reference = perplexity_and_reference(model, tokens, **WINDOW)
    own = perplexity(load_model(str(quantized))[0], tokens, **WINDOW, reference=reference)
    row = rows["both", "all", "0-1"]
    # In another order of sums, activations beside a rounding boundary take the other neighbour.
    assert row["kl"] == pytest.approx(own.divergence.kl, rel=0.02)
    assert row["ratio"] == pytest.approx(own.perplexity / exact.perplexity, rel=2e-3)


def test_each_part_has_an_error_of_its_own(rows):
    assert len(rows) == len(list(cases(2))) == 3 * (1 + 4 + 2)
    assert len({row["kl"] for row in rows.values()}) == len(rows)
    for (rounded, linears, blocks), row in rows.items():
        assert row["kl"] > 1e-5, (rounded, linears, blocks)  # a hundred times what is float noise
    whole = ("all", "0-1")
    for rounded in ROUNDED:
        parts = [row["kl"] for key, row in rows.items() if key[0] == rounded and key[1:] != whole]
        assert max(parts) < rows[rounded, *whole]["kl"]


def test_nothing_rounded_is_the_float_model(tiny_llama, quantized):
    model, tokenizer = load_model(str(tiny_llama))
    tokens = tokenize(tokenizer, read_text(BUILTIN, part="evaluation"))
    _, reference = perplexity_and_reference(model, tokens, **WINDOW)
    linears = error_by_site.partly_rounded(model, load_model(str(quantized))[0])
    assert len(linears) == 2 * 7
    assert perplexity(model, tokens, **WINDOW, reference=reference).divergence.kl < 1e-5


def test_a_smoothed_model_is_refused(tiny_llama, tmp_path):
    smoothed = quantize(tiny_llama, tmp_path / "out", method="duquant++", smooth_alpha=0.5)
    with pytest.raises(SystemExit, match=r"layernorm\.weight differs: the model is smoothed"):
        error_by_site.main([str(tiny_llama), str(smoothed)])
