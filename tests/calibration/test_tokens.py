"""Text to calibration sequences: seeded, spread, without overlap, and clear about bad text."""

import contextlib
import os
import pydoc_data.topics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

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


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32-le", b"\xff\xfe\x00\x00"),
        ("utf-32-be", b"\x00\x00\xfe\xff"),
        ("utf-8", b""),
    ],
)
@pytest.mark.parametrize("chunk", [5, 2**20])
def test_a_byte_order_mark_names_the_encoding_and_is_no_text(
    encoding, mark, chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr("duqpp.calibration.tokens._CHUNK", chunk)
    file = tmp_path / "text.txt"
    file.write_bytes(mark + "one\r\ntwo\rthree 北京🦙\n".encode(encoding))
    assert read_text(str(file)) == "one\ntwo\nthree 北京🦙\n"


@pytest.mark.parametrize("content", [b"\xff\xfea", b"\xff\xfe\0\xd8a\0", b"\xff\xfe\0\0\1\0"])
def test_a_byte_order_mark_before_something_else(content, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"text.txt is not UTF-(16|32) text: "):
        read_text(str(tmp_path / "text.txt"))


@pytest.mark.parametrize(
    "name", ["/dev/zero", "/dev/urandom", "sparse of 1 TB", "sparse of 1 GiB", "two bytes"]
)
def test_what_is_no_text_is_refused_at_its_first_bytes(name, tmp_path):
    file = Path(name if name.startswith("/") else tmp_path / name)
    if name == "two bytes":
        file.write_bytes(b"words\0")
    elif not file.exists():
        with open(file, "wb") as sparse:
            sparse.truncate(2**40 if "TB" in name else 2**30)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"has NUL|more than 1 GiB|is not UTF-"):
        read_text(str(file))
    assert time.monotonic() - started < 10


def test_a_text_that_does_not_end_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("duqpp.calibration.tokens._MOST", 2**20)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), open(pipe, "wb") as file:
            while True:
                file.write(b"words " * 1000)

    with written(write), pytest.raises(InputError, match="has more than 1 GiB: give a part of it"):
        read_text(str(pipe))


@contextlib.contextmanager
def written(write) -> Iterator[None]:
    """A thread that writes, and ends by itself."""
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    yield
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_a_pipe_is_read_to_its_end_however_slowly_it_comes(delay, tmp_path):
    """As `<(zcat text.gz)` has it; with a writer that comes late, pauses, and cuts characters."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        time.sleep(delay)
        with open(pipe, "wb", buffering=0) as file:
            for part in (b"one \xe5\x8c", b"\x97\r", b"\ntwo"):
                file.write(part)
                time.sleep(delay)

    with written(write):
        assert read_text(str(pipe)) == "one 北\ntwo"


def test_a_pipe_of_a_shell(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"words")
    os.close(writing)
    try:
        assert read_text(f"/dev/fd/{reading}") == "words"
    finally:
        os.close(reading)


def test_a_pipe_into_which_nobody_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("duqpp.calibration.tokens.PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"^text file .*pipe is empty$"):
        read_text(str(tmp_path / "pipe"))


@pytest.mark.parametrize("name", ["~nobody-of-that-name/text", "nul\0", "x" * 300, ""])
def test_names_that_can_be_no_file(name):
    with pytest.raises(InputError, match=r"^no such folder or file: "):
        read_text(name)


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "one", "id": 1}\n\n{"text": null}\r\n{"id": 2}\n{"text": "two\\n"}\n',
        '[{"text": "one"}, {"text": null}, {},\n {"text": "two\\n"}]',
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
def test_rows_of_json_are_read_by_their_field(content, name, tmp_path):
    (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
    assert read_text(str(tmp_path / name)) == "one\n\ntwo\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("plain words", "a.jsonl, line 1, is not valid JSON: Expecting value"),
        ('{"text": "a"}\n{"text"', "a.jsonl, line 2, is not valid JSON"),
        ("[" * 10**5, "a.jsonl is not valid JSON: maximum recursion depth"),
        ('"a"', "must hold JSON objects with a field 'text', got 'a'"),
        ('[{"text": "a"}, 5]', "must hold JSON objects with a field 'text', got 5"),
        ('{"prompt": "a", "answer": "b"}', r"has no field 'text', only \['prompt', 'answer'\]"),
        ('{"text": 5}\n{"text": ["a"]}', "its 'text' must be text, got int, list"),
        ('{"text": null}', "a.jsonl is empty"),
        ("[]", "a.jsonl is empty"),
    ],
)
def test_json_that_holds_no_rows_of_text(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_text(str(tmp_path / "a.jsonl"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("c4.json.gz", "unpack it first"), ("a.PARQUET", "as hf:FOLDER"), ("a.pdf", "plain text")],
)
def test_files_of_other_kinds_get_a_hint(name, hint, tmp_path):
    (tmp_path / name).write_text("words")
    with pytest.raises(InputError, match=f"is no plain text: .*{hint}"):
        read_text(str(tmp_path / name))


@pytest.mark.parametrize("text", ["\ud800 words", "words \udcff"])
def test_text_that_the_tokenizer_refuses(text, tiny_llama):
    with pytest.raises(InputError, match=r"^the model's tokenizer cannot read the text: "):
        tokenize(AutoTokenizer.from_pretrained(tiny_llama), text)


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
        assert fake.hidden, "stderr is no terminal"
        if name == "missing":
            raise ValueError("no such dataset")
        if name == "error":
            raise fake.error
        if name == "columns":
            return Rows(words=["a"])
        return Rows(text=fake.texts)

    fake = SimpleNamespace(calls=[], load_dataset=load_dataset, texts=["one", "two"], error=None)
    fake.are_progress_bars_disabled = lambda: fake.hidden
    fake.disable_progress_bars = lambda: setattr(fake, "hidden", True)
    fake.enable_progress_bars = lambda: setattr(fake, "hidden", False)
    fake.hidden = False
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


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hf:o/n::train[:2]", ("o/n", None, "train[:2]")),
        ("hf:o/n:raw:train[10%:20%]", ("o/n", "raw", "train[10%:20%]")),
        ("hf:o/n:raw:train[:1]+test[-1:]", ("o/n", "raw", "train[:1]+test[-1:]")),
        ("hf:o/n::", ("o/n", None, "train")),
        ("hf:/data/my texts", ("/data/my texts", None, "train")),
        ("hf:./data::validation", ("./data", None, "validation")),
        (r"hf:C:\data:raw:train[:2]", (r"C:\data", "raw", "train[:2]")),
        ("hf:C:/data", ("C:/data", None, "train")),
    ],
)
def test_splits_may_be_slices_and_names_folders(source, call, datasets):
    read_text(source)
    assert datasets.calls == [call]


@pytest.mark.parametrize("source", ["hf:", "hf::", "hf::raw:train"])
def test_datasets_without_a_name(source, datasets):
    with pytest.raises(InputError, match=r"^a dataset is named hf:NAME\[:CONFIG\[:SPLIT"):
        read_text(source)


def test_bars_are_as_they_were_afterwards(datasets):
    datasets.error = RuntimeError()
    for source in ("hf:o/n", "hf:error"):
        with contextlib.suppress(InputError):
            read_text(source)
        assert not datasets.hidden


def test_rows_that_are_null_are_left_out(datasets):
    datasets.texts = ["one", None, "two", None]
    assert read_text("hf:o/n") == "one\n\ntwo"


@pytest.mark.parametrize("texts", [[], [None, None], ["", " "]])
def test_a_dataset_without_text(texts, datasets):
    datasets.texts = texts
    with pytest.raises(InputError, match=r"^hf:o/n is empty$"):
        read_text("hf:o/n")


def test_a_column_that_is_no_text(datasets):
    datasets.texts = ["one", 2, ["three"]]
    with pytest.raises(InputError, match=r"^hf:o/n: its 'text' must be text, got int, list$"):
        read_text("hf:o/n")


@pytest.mark.parametrize(
    "error", [KeyError("train"), RuntimeError("a\nb"), FileNotFoundError(2, "none"), TypeError()]
)
def test_whatever_datasets_raises_is_one_line(error, datasets):
    """DatasetGenerationError, ArrowInvalid and others are of no common kind."""
    datasets.error = error
    with pytest.raises(InputError, match=r"^cannot load dataset hf:error: ") as raised:
        read_text("hf:error")
    assert "\n" not in str(raised.value)


def test_datasets_themselves(tmp_path, monkeypatch):
    """Where the package is installed: a folder, its slices, a null, and errors of its own."""
    pytest.importorskip("datasets", reason="the datasets package is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        '{"text": "one"}\n{"text": null}\n{"text": "two"}\n{"text": "three"}\n'
    )
    assert read_text(f"hf:{folder}") == "one\n\ntwo\n\nthree"
    assert read_text(f"hf:{folder}::train[:3]") == "one\n\ntwo"
    assert read_text(f"hf:{folder}::train[-50%:]", part="evaluation") == "two\n\nthree"
    for spec in ("", "::none", ":none", "::train[", "::train[:x]"):
        with pytest.raises(InputError, match=r"^cannot load dataset hf:"):
            read_text(f"hf:{folder}{spec}", part="evaluation")
