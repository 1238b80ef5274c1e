"""What the commands print: JSON, lines for people, and tables."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from duqpp.evaluation.perplexity import PerplexityResult
from duqpp.evaluation.scores import Row, Scores
from duqpp.evaluation.tasks import TaskScore
from duqpp.tools.inspection import Inspection, layer_and_kind
from duqpp.tools.selfcheck import Report as SelfcheckReport

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


def perplexity_lines(result: PerplexityResult) -> list[str]:
    """What `duqpp eval` prints of a text."""
    lines = [
        f"perplexity {result.perplexity:.4f} over {result.windows} windows of {result.seq_len} "
        f"tokens ({result.seconds:.1f} s)"
    ]
    if result.divergence:
        lines.append(
            f"KL divergence from the reference {result.divergence.kl:.4f} nats per token, top-1 "
            f"agreement {percent(result.divergence.agreement)}"
        )
    return [*lines, f"convention: {result.convention}"]


def task_lines(scores: list[TaskScore]) -> list[str]:
    """A line for each metric; after +-, the standard error over the samples."""
    lines = []
    for score in scores:
        kind = "" if score.filter == "none" else f" ({score.filter})"
        error = "" if score.stderr is None else f" +- {score.stderr:.4f}"
        count = "" if score.samples is None else f", {score.samples} samples, {score.shots} shots"
        lines.append(f"{score.task}: {score.metric}{kind} {score.value:.4f}{error}{count}")
    return lines


class ComparisonTable:
    """A comparison on a stream, each row as soon as it is complete.

    rich lays out a whole table: here each row is a table of its own, and columns of fixed widths
    stand under each other.

    Args: methods, texts: what is compared, and on what: the widest names set the first column's
        width.
    """

    def __init__(self, methods: Iterable[str], texts: Sequence[str], stream: IO[str]) -> None:
        names = ["method", "float", *methods, *map(_text, texts[1:])]
        self._widths = {"method": max(map(len, names)), **_SCORE_WIDTHS, **_COST_WIDTHS}
        # Wide enough for every row: on a narrow terminal lines are broken, and nothing is cut.
        self._console = Console(
            file=stream, width=sum(self._widths.values()) + 2 * len(self._widths)
        )
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
        table.add_row(escape(row.method), *_scores(row.headline), *cost)
        for scores in row.texts[1:]:
            table.add_row(escape(_text(scores.text)), *_scores(scores))
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


def inspection_table(inspection: Inspection) -> Table:
    """A line per linear group."""
    table = Table(
        box=SIMPLE_HEAD,
        title=f"{inspection.model}: {inspection.method}",
        caption="max |x|: largest input magnitude; after: smoothed and rotated\n"
        "relative errors of inputs x, weights W and outputs y",
    )
    table.add_column("layer", justify="right")
    table.add_column("linears")
    for head in ("max |x|", "after", "x error", "after", "W error", "y error"):
        table.add_column(head, justify="right")
    for group in inspection.groups:
        layer, kind = layer_and_kind(group)
        amax = [group.block_amax_before, group.block_amax]
        errors = (
            group.activation_error_before,
            group.activation_error,
            group.weight_error,
            group.output_error,
        )
        table.add_row(
            str(layer),
            kind,
            *("-" if blocks is None else f"{max(blocks):.4g}" for blocks in amax),
            *map(percent, errors),
        )
    return table


def doctor_lines(facts: dict[str, Any]) -> list[str]:
    """Per op and device, which backend runs it; for each shape, which kernel, and why that one."""
    lines = []
    for entry in facts["ops"]:
        chosen = entry["selected"] or f"none: {entry['error']}"
        lines.append(f"{entry['op']} on {entry['device']}: {chosen}")
        for kernel in entry["kernels"]:
            shape = "{M},{N},{K}".format(**kernel)
            lines.append(f"  {shape}: {kernel['name'] or 'none'} ({kernel['why']})")
    return lines


def others_lines(facts: dict[str, Any]) -> list[str]:
    """Why each of the other backends is not taken; once, where all ops have one answer."""
    answers: dict[tuple[str, str, str], list[str]] = {}
    for entry in facts["ops"]:
        for name, reason in entry["others"].items():
            answers.setdefault((name, entry["device"], reason), []).append(entry["op"])
    ops = {entry["op"] for entry in facts["ops"]}
    return [
        f"not {name} for {'any op' if set(of) == ops else ', '.join(of)} on {device}: {reason}"
        for (name, device, reason), of in answers.items()
    ]


def selfcheck_table(report: SelfcheckReport) -> Table:
    """A line per kernel: how many cases, and the first that failed."""
    table = Table(box=SIMPLE_HEAD)
    for head in ("backend", "op", "cases", "result"):
        table.add_column(head)
    for check in report.checks:
        result = "\n".join(check.failures) or "equal to the reference"
        table.add_row(check.backend, check.op, str(check.cases), result)
    return table


def timings_table(report: SelfcheckReport) -> Table:
    """A line per linear and number of rows: microseconds, and against torch's bfloat16."""
    table = Table(box=SIMPLE_HEAD)
    for head in ("linear", "M", "quantize", "gemm", "both, us", "vs bf16"):
        table.add_column(head, justify="left" if head == "linear" else "right")
    for t in report.timings:
        times = (f"{value:.1f}" for value in (t.quantize_us, t.gemm_us, t.linear_us))
        table.add_row(t.linear, str(t.M), *times, f"{t.bf16_us / t.linear_us:.2f}")
    return table
