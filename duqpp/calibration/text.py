"""Calibration text from one source or several, each with its share of the sequences."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from duqpp.calibration.tokens import read_text, sample_sequences, tokenize
from duqpp.errors import InputError
from duqpp.files import local_path

_WEIGHTED = re.compile(r"(.+)\*([^*]*)", re.DOTALL)


class WeightedText(NamedTuple):
    """A text as `read_text` names it, and how much of it there is to be, in proportion."""

    name: str
    weight: float = 1.0


def parse_sources(calibration: str) -> tuple[WeightedText, ...]:
    """From "wiki.txt*2,builtin" to sources: names at commas, each with its weight, else 1.

    The name of a file that is there is one source, whatever is in it.

    Raises: InputError for an empty name, a weight that is not positive, or a name given twice.
    """
    if _is_there(calibration):
        return (WeightedText(calibration),)
    sources = tuple(map(_weighted, calibration.split(",")))
    names = [source.name for source in sources]
    if "" in names and len(names) > 1:
        raise InputError(f"calibration text {calibration!r} has an empty name between commas")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"calibration text {twice} is named twice: give it a weight, {twice}*2")
    return sources


def _weighted(text: str) -> WeightedText:
    weighted = None if _is_there(text) else _WEIGHTED.fullmatch(text)
    if weighted is None:
        return WeightedText(text)
    name, number = weighted.groups()
    try:
        weight = float(number)
    except ValueError:
        return WeightedText(text)
    if not (weight > 0 and math.isfinite(weight)):
        raise InputError(f"the weight of calibration text {name} must be positive, got {number}")
    return WeightedText(name, weight)


def _is_there(name: str) -> bool:
    try:
        return local_path(name).exists()
    except (OSError, ValueError):  # what is no path, or too long for one
        return False


@dataclass(frozen=True)
class CalibrationText:
    """What calibration sequences are drawn from. contents: the text of each source."""

    sources: tuple[WeightedText, ...]
    contents: tuple[str, ...]

    @classmethod
    def read(cls, calibration: str) -> "CalibrationText":
        """The texts that are named. Raises: InputError, as `parse_sources` and `read_text` do."""
        sources = parse_sources(calibration)
        return cls(sources, tuple(read_text(source.name) for source in sources))

    @property
    def name(self) -> str:
        """As it was asked for, without folders."""
        return ",".join(
            (Path(name).name if _is_there(name) else name) + ("" if weight == 1 else f"*{weight:g}")
            for name, weight in self.sources
        )

    @property
    def identity(self) -> str:
        """A string that is the same for the same texts in the same proportions."""
        if len(self.contents) == 1:
            return self.contents[0]
        total = sum(source.weight for source in self.sources)
        return json.dumps([s.weight / total for s in self.sources] + list(self.contents))

    def tokenized(self, tokenizer: Any) -> "CalibrationTokens":
        """Raises: InputError for what the tokenizer refuses."""
        return CalibrationTokens(
            self.sources, tuple(tokenize(tokenizer, text) for text in self.contents)
        )


@dataclass(frozen=True)
class CalibrationTokens:
    """A `CalibrationText` as a model reads it. tokens: int64 [tokens] of each source."""

    sources: tuple[WeightedText, ...]
    tokens: tuple[Tensor, ...]

    def most(self, seq_len: int) -> int:
        """The most sequences that there are, in the proportions of the weights."""
        limits = [len(tokens) // seq_len for tokens in self.tokens]
        return next(
            (
                samples
                for samples in range(sum(limits), 0, -1)
                if all(n <= most for n, most in zip(self._shares(samples), limits, strict=True))
            ),
            0,
        )

    def sequences(self, *, samples: int, seq_len: int, seed: int) -> Tensor:
        """Calibration sequences: int64 [samples, seq_len], those of each source spread over all.

        Raises: InputError when a source has too little text, or its weight gives it no sequence.
        """
        parts, places = [], []
        for (name, _), tokens, count in zip(
            self.sources, self.tokens, self._shares(samples), strict=True
        ):
            if count == 0:
                raise InputError(
                    f"{samples} calibration sequences leave none to {name}: raise `samples`, or "
                    "its weight"
                )
            what = "calibration text" if len(self.sources) == 1 else f"calibration text {name}"
            parts.append(
                sample_sequences(tokens, samples=count, seq_len=seq_len, seed=seed, what=what)
            )
            places += [(index + 0.5) / count for index in range(count)]
        order = sorted(range(samples), key=places.__getitem__)
        return torch.cat(parts)[order]

    def _shares(self, samples: int) -> list[int]:
        """How many of the sequences are of each source: the whole parts of its exact share, and one
        more where the largest fractions are left."""
        total = sum(source.weight for source in self.sources)
        exact = [samples * source.weight / total for source in self.sources]
        shares = [math.floor(share) for share in exact]
        by_fraction = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
        for index in by_fraction[: samples - sum(shares)]:
            shares[index] += 1
        return shares
