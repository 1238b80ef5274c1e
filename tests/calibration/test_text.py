"""Calibration text from several sources: names, weights, and how many sequences each gives."""

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from duqpp.calibration.text import CalibrationText, CalibrationTokens, WeightedText, parse_sources
from duqpp.calibration.tokens import builtin_text, sample_sequences, tokenize
from duqpp.errors import InputError
from tests import oracle


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("builtin", [("builtin", 1)]),
        ("wiki.txt*2,builtin", [("wiki.txt", 2), ("builtin", 1)]),
        (
            "a*0.5,hf:owner/name:cfg:train[:10%]*3",
            [("a", 0.5), ("hf:owner/name:cfg:train[:10%]", 3)],
        ),
        ("wiki*", [("wiki*", 1)]),
        ("*2", [("*2", 1)]),
        ("a*b*4", [("a*b", 4)]),
        ("", [("", 1)]),
    ],
)
def test_names_and_weights(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_sources(text) == tuple(WeightedText(*source) for source in expected)


def test_a_file_is_one_source_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "a*2"):
        Path(name).write_text(name)
        assert CalibrationText.read(name).contents == (name,)
    assert parse_sources("a*2,builtin") == (WeightedText("a*2"), WeightedText("builtin"))
    assert parse_sources("a*2*3,builtin") == (WeightedText("a*2", 3), WeightedText("builtin"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "calibration text 'a,,b' has an empty name between commas"),
        ("a,", "calibration text 'a,' has an empty name between commas"),
        ("a*0,b", "the weight of calibration text a must be positive, got 0"),
        ("a*-1,b", "the weight of calibration text a must be positive, got -1"),
        ("a*inf,b", "the weight of calibration text a must be positive, got inf"),
        ("a*nan,b", "the weight of calibration text a must be positive, got nan"),
        ("a,b,a*2", "calibration text a is named twice: give it a weight, a*2"),
        ("builtin,none.txt", "cannot read text file none.txt: No such file or directory"),
    ],
)
def test_what_is_no_mixture(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        CalibrationText.read(text)
    assert str(error.value) == message


def mixture(lengths: list[int], weights: list[float]) -> CalibrationTokens:
    """Tokens of source i count up from 10**6 * i."""
    sources = tuple(WeightedText(f"text{i}", weight) for i, weight in enumerate(weights))
    tokens = tuple(torch.arange(length) + 10**6 * i for i, length in enumerate(lengths))
    return CalibrationTokens(sources, tokens)


@given(
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 7.0]), min_size=1, max_size=4),
    samples=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_each_source_has_its_share_spread_over_all(weights, samples, seed):
    exact = [samples * weight / sum(weights) for weight in weights]
    assume(min(exact) >= 1)
    text = mixture([40 * 8] * len(weights), weights)
    sequences = text.sequences(samples=samples, seq_len=8, seed=seed)
    assert sequences.shape == (samples, 8)
    assert sequences.unique().numel() == sequences.numel(), "overlap"
    source = sequences[:, 0] // 10**6
    for i, share in enumerate(exact):
        own = source == i
        assert abs(int(own.sum()) - share) < 1
        # Of any run of sequences each source has its share, to within what rounding leaves.
        even = own.sum() / samples * torch.arange(1, samples + 1)
        assert (own.cumsum(0) - even).abs().max() < len(weights)


def test_one_source_is_sampled_as_it_was():
    sequences = mixture([1000], [3.0]).sequences(samples=7, seq_len=20, seed=5)
    expected = sample_sequences(torch.arange(1000), samples=7, seq_len=20, seed=5)
    oracle.assert_same(sequences, expected, "sequences")


@pytest.mark.parametrize(
    ("lengths", "weights", "expected"),
    [
        ([1000], [1.0], 100),
        ([99], [1.0], 9),
        ([9], [1.0], 0),
        ([1000, 100], [1.0, 1.0], 21),  # of 21 the first one has 11, the second 10
        ([1000, 100], [2.0, 1.0], 31),
        ([1000, 9], [9.0, 1.0], 5),  # of which the second has none
    ],
)
def test_as_many_as_the_shortest_source_allows(lengths, weights, expected):
    assert mixture(lengths, weights).most(10) == expected


def test_a_source_that_is_too_short_or_has_no_sequence_is_named():
    with pytest.raises(InputError, match=r"^calibration text text1 has 30 tokens, but 4 samples "):
        mixture([1000, 30], [1.0, 1.0]).sequences(samples=8, seq_len=10, seed=0)
    with pytest.raises(InputError) as error:
        mixture([1000, 1000], [30.0, 1.0]).sequences(samples=8, seq_len=10, seed=0)
    assert str(error.value) == (
        "8 calibration sequences leave none to text1: raise `samples`, or its weight"
    )


def test_texts_are_tokenized_one_by_one(tiny_llama, tmp_path):
    (tmp_path / "own.txt").write_text("One and two. " * 500)
    text = CalibrationText.read(f"{tmp_path / 'own.txt'}*3,builtin")
    assert text.name == "own.txt*3,builtin"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    own, builtin = text.tokenized(tokenizer).tokens
    oracle.assert_same(own, tokenize(tokenizer, "One and two. " * 500), "own")
    oracle.assert_same(builtin, tokenize(tokenizer, builtin_text()), "builtin")


def test_identity_is_that_of_texts_and_proportions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        Path(name).write_text(text)
    names = ("a", "c", "a*2", "a,b", "c,b", "a*2,b*2", "a*2,b", "b,a")
    found = [CalibrationText.read(name).identity for name in names]
    assert found[0] == found[1] == found[2] == "one"
    assert found[3] == found[4] == found[5]
    assert len(set(found)) == 4
