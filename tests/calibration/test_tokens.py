"""Text to calibration sequences: seeded, spread, without overlap, and clear about bad text."""

import pydoc_data.topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from duqpp.calibration.tokens import builtin_text, read_text, sample_sequences, tokenize
from duqpp.errors import InputError
from tests import oracle


@given(
    samples=st.integers(1, 9),
    seq_len=st.integers(2, 40),
    extra=st.integers(0, 300),
    seed=st.integers(0, 2**40),
)
def test_sequences_are_pieces_of_the_text_without_overlap(samples, seq_len, extra, seed):
    tokens = torch.arange(1000, 1000 + samples * seq_len + extra)
    sequences = sample_sequences(tokens, samples=samples, seq_len=seq_len, seed=seed)
    assert sequences.shape == (samples, seq_len)
    assert sequences.dtype == torch.int64
    assert (sequences.diff(dim=1) == 1).all(), "consecutive tokens"
    assert sequences.unique().numel() == sequences.numel(), "overlap"
    assert 1000 <= sequences.min() <= sequences.max() < 1000 + len(tokens)
    again = sample_sequences(tokens, samples=samples, seq_len=seq_len, seed=seed)
    oracle.assert_same(again, sequences, "same seed")


def test_sequences_are_spread_and_every_place_can_come_up():
    tokens = torch.arange(100)
    starts = torch.stack(
        [sample_sequences(tokens, samples=2, seq_len=10, seed=s)[:, 0] for s in range(600)]
    )
    assert starts[:, 0].unique().tolist() == list(range(41))
    assert starts[:, 1].unique().tolist() == list(range(50, 91))


def test_exactly_enough_text_is_enough():
    sequences = sample_sequences(torch.arange(60), samples=3, seq_len=20, seed=9)
    oracle.assert_same(sequences, torch.arange(60).view(3, 20), "sequences")


@pytest.mark.parametrize("missing", [1, 59, 60])
def test_too_little_text_says_how_much_there_is_and_what_to_do(missing):
    with pytest.raises(InputError) as error:
        sample_sequences(torch.arange(60 - missing), samples=3, seq_len=20, seed=0)
    assert str(error.value) == (
        f"calibration text has {60 - missing} tokens, but 3 samples of 20 need 60: "
        "lower `samples` or `seq_len` (with `refine`: `refine_samples`), or give more text"
    )


def test_tokenize_is_one_call_without_special_tokens(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    text = "The capital of France is Paris. " * 400  # longer than the model's 512 positions
    tokens = tokenize(tokenizer, text)
    assert (tokens.dim(), tokens.dtype) == (1, torch.int64)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.bos_token_id not in tokens.tolist()
    assert tokenize(tokenizer, "").shape == (0,)


# Sources of text.


def test_builtin_parts_are_disjoint_and_together_everything(whole_builtin_text, monkeypatch):
    topics = whole_builtin_text
    monkeypatch.setattr(pydoc_data.topics, "topics", topics)
    calibration, evaluation = builtin_text("calibration"), builtin_text("evaluation")
    assert builtin_text() == read_text("builtin") == calibration
    assert read_text("builtin", part="evaluation") == evaluation
    assert min(len(calibration), len(evaluation)) > 100_000
    for name, page in topics.items():
        places = [page in calibration, page in evaluation]
        assert any(places), f"{name} is lost"
        if len(page) > 2000:  # short pages may be quoted in others
            assert not all(places), f"{name} is in both parts"
    separators = 2 * (len(topics) - 2)
    assert len(calibration) + len(evaluation) == sum(map(len, topics.values())) + separators


def test_builtin_text_has_two_parts():
    with pytest.raises(
        InputError, match=r"^built-in text has the parts calibration, evaluation, g"
    ):
        builtin_text("training")


def test_a_file_is_read_as_utf_8(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("Ünïcode, 北京\n".encode())
    assert read_text(str(file)) == "Ünïcode, 北京\n"


def test_a_missing_file(tmp_path):
    path = tmp_path / "no such.txt"
    with pytest.raises(InputError) as error:
        read_text(str(path))
    assert str(error.value) == f"cannot read text file {path}: No such file or directory"


def test_a_folder_is_not_text(tmp_path):
    with pytest.raises(InputError, match=r"^cannot read text file .*: Is a directory$"):
        read_text(str(tmp_path))


def test_bytes_that_are_not_utf_8(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_text(str(file))
    assert str(error.value) == f"{file} is not UTF-8 text: invalid continuation byte"


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_file(content, tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text(content)
    with pytest.raises(InputError) as error:
        read_text(str(file))
    assert str(error.value) == f"text file {file} is empty"


# Datasets, by a stand-in for the optional package.


class Rows(dict):
    column_names = property(lambda self: list(self))


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the datasets package; `datasets.calls` has what was asked for."""
    import sys
    from types import SimpleNamespace

    def load_dataset(name, config, split):
        fake.calls.append((name, config, split))
        if name == "missing":
            raise ValueError("no such dataset")
        return Rows(words=["a"]) if name == "columns" else Rows(text=["one", "two"])

    fake = SimpleNamespace(calls=[], load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_datasets_are_named_with_configuration_and_split(datasets):
    assert read_text("hf:owner/name") == "one\n\ntwo"
    read_text("hf:owner/name", part="evaluation")
    read_text("hf:owner/name:raw")
    read_text("hf:owner/name:raw:validation", part="evaluation")
    assert datasets.calls == [
        ("owner/name", None, "train"),
        ("owner/name", None, "test"),
        ("owner/name", "raw", "train"),
        ("owner/name", "raw", "validation"),
    ]


def test_dataset_errors(datasets, monkeypatch):
    import sys

    with pytest.raises(InputError, match=r"^cannot load dataset hf:missing: no such dataset$"):
        read_text("hf:missing")
    with pytest.raises(
        InputError, match=r"^dataset hf:columns has no 'text' column, only \['words'"
    ):
        read_text("hf:columns")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"^hf:x needs the datasets package: pip install"):
        read_text("hf:x")
