"""Text to fixed-length token sequences, seeded.

Calibration text comes from a file, a Hugging Face dataset, or the text that every Python ships.
"""

import codecs
import json
import os
import re
import select
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duqpp.errors import InputError, refusing
from duqpp.files import local_path
from duqpp.placement import HOST, host_generator

BUILTIN = "builtin"
# The built-in text is split so that calibrating and evaluating on it never share a topic.
_BUILTIN_CALIBRATION_SHARE = 0.6
PATIENCE = 10.0  # seconds for somebody to open a pipe whose other end is not open
_CHUNK = 2**20  # bytes
_MOST = 2**30  # bytes: a text is tokenized whole, which takes a hundred times its size

# hf:NAME[:CONFIG[:SPLIT]], where NAME may be a folder of Windows, and SPLIT a slice: train[:2].
_DATASET = re.compile(r"hf:((?:[A-Za-z]:(?=[\\/]))?[^:]+)(?::([^:]*)(?::(.*))?)?")
# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HINTS = dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"), "unpack it first")
_HINTS |= dict.fromkeys((".parquet", ".arrow", ".csv"), "give its folder, as hf:FOLDER")
_HINTS |= dict.fromkeys((".pdf", ".docx", ".html"), "give plain text")


def builtin_text(part: str = "calibration") -> str:
    """English prose from `pydoc_data.topics`, the help pages inside every Python.

    Args: part: "calibration" or "evaluation", which have no topic in common.
    """
    from pydoc_data.topics import topics

    pages = [topics[name] for name in sorted(topics)]
    boundary = round(len(pages) * _BUILTIN_CALIBRATION_SHARE)
    parts = {"calibration": pages[:boundary], "evaluation": pages[boundary:]}
    if part not in parts:
        raise InputError(f"built-in text has the parts {', '.join(parts)}, got {part!r}")
    return "\n\n".join(parts[part])


def read_text(source: str, *, part: str = "calibration") -> str:
    """Text from a file, from "builtin", or from a dataset named "hf:NAME[:CONFIG[:SPLIT]]".

    A file is UTF-8, or what its byte order mark says; it may be a pipe, which gives its text once.
    Of .json and .jsonl files, and of a dataset, it is the field "text" of each row: rows where that
    is null are left out, and blank lines go between the others.

    Args: part: which part of the built-in text, or which default split of a dataset.
    Raises: InputError when it cannot be read, is no text, is empty, or exceeds 1 GiB.
    """
    if source == BUILTIN:
        return builtin_text(part)
    if source.startswith("hf:"):
        return _dataset_text(source, part)
    path = local_path(source)
    hint = _HINTS.get(path.suffix.lower())
    if hint is not None and path.is_file():
        raise InputError(f"{source} is no plain text: {hint}")
    try:
        text = _decoded(source, _chunks(source, path))
    except OSError as error:
        raise InputError(f"cannot read text file {source}: {error.strerror}") from error
    if path.suffix.lower() in (".json", ".jsonl"):
        text = _joined(_json_texts(source, text), source)
    if not text.strip():
        raise InputError(f"text file {source} is empty")
    return text


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """One tokenizer call over the whole text, without special tokens of its own: int64 [tokens].

    No sequence that is cut from it begins with a beginning-of-text token, unless the text has it:
    docs/experiments.md has what that does.

    Raises: InputError for what the tokenizer refuses.
    """
    with refusing("the model's tokenizer cannot read the text"):
        # verbose=False: the length of the whole text exceeds any model's, which is no mistake here.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64, device=HOST)


def sample_sequences(
    tokens: Tensor, *, samples: int, seq_len: int, seed: int, what: str = "calibration text"
) -> Tensor:
    """Seeded calibration sequences, spread over the text without overlap: int64 [samples, seq_len].

    The text is cut into `samples` equal stretches, and one sequence starts at random in each.

    Args: tokens: int64 [tokens]. what: they are, in an error.
    Raises: InputError when the text is shorter than samples * seq_len tokens.
    """
    stretch = tokens.numel() // samples
    if stretch < seq_len:
        raise InputError(
            f"{what} has {tokens.numel()} tokens, but {samples} samples of {seq_len} "
            f"need {samples * seq_len}: lower `samples` or `seq_len` (with `refine`: "
            "`refine_samples`), or give more text"
        )
    generator = host_generator(seed)
    slack = torch.randint(
        stretch - seq_len + 1, (samples,), generator=generator, device=generator.device
    )
    starts = torch.arange(samples, device=slack.device) * stretch + slack
    places = starts[:, None] + torch.arange(seq_len, device=slack.device)
    return tokens[places.to(tokens.device)]


def _chunks(source: str, path: Path) -> Iterator[bytes]:
    """The bytes of a file, a pipe or a device. Raises: OSError; InputError past 1 GiB.

    Opened without waiting, since a named pipe into which nobody writes would be waited for without
    end; a pipe that is written to is waited for as by any other program.
    """
    too_long = InputError(f"text file {source} has more than 1 GiB: give a part of it")
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if status.st_size > _MOST:
            raise too_long
        read = 0
        until = time.monotonic() + (PATIENCE if stat.S_ISFIFO(status.st_mode) else 0.0)
        while True:
            chunk = file.read(_CHUNK)
            if chunk is None:  # the other end is open, and silent
                select.select([file], [], [])
                until = 0.0
            elif chunk:
                yield chunk
                read, until = read + len(chunk), 0.0
                if read > _MOST:
                    raise too_long
            elif time.monotonic() < until:  # nobody has opened the other end
                time.sleep(0.02)
            else:
                return


def _open_at_once(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # which Windows has not


def _decoded(source: str, chunks: Iterator[bytes]) -> str:
    """Text as its byte order mark says, or UTF-8, with line ends as \\n.

    The first bytes that are no text end it: a device or a sparse file is not read to its end.
    """
    first = next(chunks, b"")
    encoding = next((name for mark, name in _MARKS.items() if first.startswith(mark)), "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    parts: list[str] = []
    try:
        for chunk in chain([first], chunks):
            parts.append(decoder.decode(chunk))
            if "\0" in parts[-1]:
                raise InputError(f"{source} is no text: it has NUL characters")
        parts.append(decoder.decode(b"", final=True))
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        raise InputError(f"{source} is not {name} text: {error.reason}") from error
    return "".join(parts).replace("\r\n", "\n").replace("\r", "\n")


def _json_texts(source: str, text: str) -> list[Any]:
    """The field "text" of each row: of one JSON array, or of a JSON object in each line."""
    if text.lstrip().startswith("["):
        with refusing(f"{source} is not valid JSON"):
            rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            with refusing(f"{source}, line {number}, is not valid JSON"):
                rows += [json.loads(line)] if line.strip() else []
    for row in rows:
        if not isinstance(row, dict):
            raise InputError(
                f"{source} must hold JSON objects with a field 'text', got {row!r:.80}"
            )
    if rows and not any("text" in row for row in rows):
        raise InputError(f"{source} has no field 'text', only {list(rows[0])}")
    return [row.get("text") for row in rows]


def _dataset_text(source: str, part: str) -> str:
    parts = _DATASET.fullmatch(source)
    if parts is None:
        raise InputError(f"a dataset is named hf:NAME[:CONFIG[:SPLIT]], got {source}")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source} needs the datasets package: pip install datasets") from error
    name, config, split = parts.groups()
    split = split or ("train" if part == "calibration" else "test")
    with refusing(f"cannot load dataset {source}"), _without_bars(datasets):
        rows = datasets.load_dataset(name, config or None, split=split)
        columns = list(rows.column_names)
        texts = list(rows["text"]) if "text" in columns else []
    if "text" not in columns:
        raise InputError(f"dataset {source} has no 'text' column, only {columns}")
    return _joined(texts, source)


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    """The bars of data sets are for a terminal alone: a log, and a script, want lines."""
    hidden = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if hidden:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            datasets.enable_progress_bars()


def _joined(texts: Iterable[Any], source: str) -> str:
    """Rows as one text, without those that are null."""
    rows = [text for text in texts if text is not None]
    others = sorted({type(row).__name__ for row in rows if not isinstance(row, str)})
    if others:
        raise InputError(f"{source}: its 'text' must be text, got {', '.join(others)}")
    text = "\n\n".join(rows)
    if not text.strip():
        raise InputError(f"{source} is empty")
    return text
