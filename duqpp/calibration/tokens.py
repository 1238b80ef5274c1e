"""Text to fixed-length token sequences, seeded.

Calibration text comes from a file, a Hugging Face dataset, or the text that every Python ships.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duqpp.errors import InputError
from duqpp.placement import HOST, host_generator

BUILTIN = "builtin"
# The built-in text is split so that calibrating and evaluating on it never share a topic.
_BUILTIN_CALIBRATION_SHARE = 0.6


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
    """Text from a UTF-8 file, from "builtin", or from a dataset named "hf:NAME[:CONFIG[:SPLIT]]".

    Args: part: which part of the built-in text, or which default split of a dataset.
    Raises: InputError when the file cannot be read, is not UTF-8 text, or is empty.
    """
    if source == BUILTIN:
        return builtin_text(part)
    if source.startswith("hf:"):
        return _dataset_text(source, part)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read text file {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text: {error.reason}") from error
    if not text.strip():
        raise InputError(f"text file {source} is empty")
    return text


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """One tokenizer call over the whole text, without special tokens of its own: int64 [tokens]."""
    # verbose=False: the length of the whole text exceeds any model's, which is no mistake here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64, device=HOST)


def sample_sequences(tokens: Tensor, *, samples: int, seq_len: int, seed: int) -> Tensor:
    """Seeded calibration sequences, spread over the text without overlap: int64 [samples, seq_len].

    The text is cut into `samples` equal stretches, and one sequence starts at random in each.

    Args: tokens: int64 [tokens].
    Raises: InputError when the text is shorter than samples * seq_len tokens.
    """
    stretch = tokens.numel() // samples
    if stretch < seq_len:
        raise InputError(
            f"calibration text has {tokens.numel()} tokens, but {samples} samples of {seq_len} "
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


def _dataset_text(source: str, part: str) -> str:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source} needs the datasets package: pip install datasets") from error
    name, config, split = [*source.removeprefix("hf:").split(":"), None, None][:3]
    split = split or ("train" if part == "calibration" else "test")
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load dataset {source}: {error}") from error
    if "text" not in rows.column_names:
        raise InputError(f"dataset {source} has no 'text' column, only {rows.column_names}")
    return "\n\n".join(rows["text"])
