"""A partly rounded model: with all of it the quantized model, with none of it the float one."""

import json
from collections.abc import Callable
from pathlib import Path

import error_by_site
import pytest
from error_by_site import ROUNDED, cases
from harness import INCOMPLETE

from duqpp.calibration.tokens import BUILTIN, read_text, tokenize
from duqpp.config import QuantizeConfig
from duqpp.evaluation.perplexity import perplexity, perplexity_and_reference
from duqpp.integrations.transformers import load_model
from duqpp.job.quantize import quantize_model
from duqpp.models.family import family_of
from duqpp.models.source import open_source

WINDOW = {"seq_len": 64, "windows": 2}


def quantize(model: Path, out: Path, **settings: object) -> Path:
    quantize_model(str(model), out, QuantizeConfig(samples=2, seq_len=64, **settings))
    return out


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    return quantize(tiny_llama, tmp_path_factory.mktemp("q") / "out", method="duqpp")


@pytest.fixture
def run(tiny_llama, capsys) -> Callable[..., list[dict]]:
    """The benchmark's rows for a quantized model."""

    def rows_of(quantized: Path, *more: str) -> list[dict]:
        capsys.readouterr()
        words = ["--windows", "2", "--seq-len", "64", "--json", *more]
        error_by_site.main([str(tiny_llama), str(quantized), *words])
        return json.loads(capsys.readouterr().out)["rows"]

    return rows_of


@pytest.fixture
def rows(run, quantized) -> dict[tuple[str, str, str], dict]:
    return {(row["rounded"], row["linears"], row["blocks"]): row for row in run(quantized)}


def test_all_that_is_rounded_is_the_quantized_model(rows, tiny_llama, quantized):
    model, tokenizer = load_model(str(tiny_llama))
    tokens = tokenize(tokenizer, read_text(BUILTIN, part="evaluation"))
    exact, reference = perplexity_and_reference(model, tokens, **WINDOW)
    own = perplexity(load_model(str(quantized))[0], tokens, **WINDOW, reference=reference)
    row = rows["both", "all", "0-1"]
    # In another order of sums, activations beside a rounding boundary take the other neighbour.
    assert row["kl"] == pytest.approx(own.divergence.kl, rel=0.02)
    assert row["ratio"] == pytest.approx(own.perplexity / exact.perplexity, rel=2e-3)


def test_each_part_has_an_error_of_its_own(rows, tiny_llama):
    family = family_of(open_source(str(tiny_llama)).config)
    assert len(rows) == len(list(cases(family))) == 3 * (1 + 4 + 2)
    assert len({row["kl"] for row in rows.values()}) == len(rows)
    for part, row in rows.items():
        assert row["kl"] > 1e-5, part  # a hundred times what is float noise
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


def test_what_was_measured_is_kept_for_the_same_model_alone(run, quantized, tiny_llama, tmp_path):
    words = ["--out", str(tmp_path / "rows.json"), "--resume"]
    with pytest.raises(SystemExit) as left:
        run(quantized, *words, "--budget", "0")
    assert left.value.code == INCOMPLETE
    first = run(quantized, *words)
    assert {row["run"] for row in first} == {1}
    assert run(quantized, *words) == first
    about = json.loads((tmp_path / "rows.json").read_text())["runs"][1]["quantized"]
    assert about["configuration"]["method"] == "duqpp"
    other = quantize(tiny_llama, tmp_path / "out", method="rtn")
    both = run(other, *words)
    assert both[: len(first)] == first
    assert len(both) == 2 * len(first)


def test_two_texts_of_one_name_are_refused(run, quantized, tmp_path):
    texts = [tmp_path / "a" / "text.txt", tmp_path / "b" / "text.txt"]
    for text in texts:
        text.parent.mkdir()
        text.write_text(read_text(BUILTIN), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"two texts have the name text\.txt"):
        run(quantized, "--texts", *map(str, texts))


def test_a_smoothed_model_is_refused(tiny_llama, tmp_path):
    smoothed = quantize(tiny_llama, tmp_path / "out", method="duquant++", smooth_alpha=0.5)
    with pytest.raises(SystemExit, match=r"layernorm\.weight differs: the model is smoothed"):
        error_by_site.main([str(tiny_llama), str(smoothed)])
