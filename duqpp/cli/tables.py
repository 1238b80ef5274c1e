"""What several commands print: JSON, numbers for people, and the table of a comparison."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from duqpp.evaluation.scores import Row, Scores

_SCORE_WIDTHS = {"perplexity": 16, "ratio to float": 16, "KL, nats": 15, "top-1, %": 13}
_COST_WIDTHS = {"quantize": 9, "linears": 9, "bits/weight": 11}


def print_json(values: dict[str, Any]) -> None:
    """On stdout, indented."""
    print(json.dumps(values, indent=2))


def size(count: int) -> str:
    """Bytes, for people: "56.4 MB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def percent(error: float | None) -> str:
    """A relative error, for people."""
    return "-" if error is None else f"{100 * error:.2f} %"


def console(stream: IO[str] | None = None, **options: Any) -> Console:
    """A console, on stdout by default, that prints names as they are.

    Brackets in the name of a model would be markup, and ":b:" an emoji.
    """
    return Console(file=stream, markup=False, emoji=False, **options)


class ComparisonTable:
    """A comparison on a stream, each row as soon as it is complete.

    rich lays out a whole table: here each row is a table of its own, and columns of fixed widths
    stand under each other.

    Args: methods, texts: what is compared, and on what: the widest names set the first column's
        width.
    """

    def __init__(self, methods: Iterable[str], texts: Sequence[str], stream: IO[str]) -> None:
        names = ["method", "float", *methods, *map(_text, texts[1:])]
        self._widths = {"method": max(map(cell_len, names)), **_SCORE_WIDTHS, **_COST_WIDTHS}
        # Wide enough for every row: on a narrow terminal lines are broken, and nothing is cut.
        self._console = console(stream, width=sum(self._widths.values()) + 2 * len(self._widths))
        self._is_new = True

    def print(self, row: Row) -> None:
        """One method's results, a line for each text; after +-, the deviation over seeds."""
        table = Table(box=None, show_header=self._is_new, header_style=None, pad_edge=False)
        self._is_new = False
        for head, width in self._widths.items():
            table.add_column(head, width=width, justify="left" if head == "method" else "right")
        cost = (
            f"{row.seconds:.1f} s" if row.seconds else "-",
            size(row.weight_bytes),
            f"{row.bits_per_weight:.2f}",
        )
        table.add_row(row.method, *_scores(row.headline), *cost)
        for scores in row.texts[1:]:
            table.add_row(_text(scores.text), *_scores(scores))
        self._console.print(table)


def _scores(scores: Scores) -> tuple[str, ...]:
    """The columns that there are for each text."""
    spread = scores.agreement_spread
    return (
        _spread(scores.perplexity, scores.spread, 2),
        _spread(scores.ratio, scores.ratio_spread, 3),
        _spread(scores.kl, scores.kl_spread, 3),
        _spread(100 * scores.agreement, None if spread is None else 100 * spread, 1),
    )


def _text(text: str) -> str:
    """An evaluation text other than the first, in the first column."""
    return f"  on {text if text.startswith('hf:') else Path(text).name}"


def _spread(value: float, spread: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if spread is None else f" +- {spread:.{digits}f}")
