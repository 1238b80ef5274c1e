"""What duqpp prints: progress with the remaining time, as bars or as lines, and tables."""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from duqpp.evaluation.perplexity import PerplexityResult
from duqpp.evaluation.scores import Row, Scores
from duqpp.evaluation.tasks import TaskScore
from duqpp.models.gguf import is_gguf
from duqpp.tools.inspection import Inspection, layer_and_kind
from duqpp.tools.selfcheck import Report as SelfcheckReport

_STAGES = {
    "fingerprint": "reading the model",
    "quantize": "quantizing decoder blocks",
    "distill": "distilling",
    "inspect": "inspecting decoder blocks",
    "verify": "checking the checkpoint's shards",
    "selfcheck": "running the kernels",
    "evaluate": "evaluating windows",
    "export": "converting shards",
}
_PATIENCE = 10.0  # seconds of a stage before the first line of it, where stderr is no terminal
_INTERVAL = 30.0  # seconds between two lines of a stage
_RATE_STEPS = 8  # the remaining time follows the rate of the last few steps


class Bars:
    """Progress on stderr, one stage at a time; an instance is a `progress` argument.

    On a terminal a bar, erased when its stage ends, so that what is printed between two stages
    stays in order. Elsewhere, as in a log file, lines: see `_Lines`.
    """

    def __init__(self) -> None:
        # The stream itself: `sys.stderr` may be redirected while a library is kept quiet.
        self.console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._lines: _Lines | None = None
        self._stage = ""
        self._steps: deque[tuple[float, int]] = deque(maxlen=_RATE_STEPS + 1)

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._end(finished=kind is None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are done; `total` 0 is an unknown number."""
        if stage != self._stage:
            self._start(stage, total)
        self._steps.append((time.monotonic(), done))
        count = f"{done}/{total}" if total else ""
        ends = self._estimate(total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, count=count, ends=ends)
        elif not total or done < total:
            self._lines.step(count, ends)
        if total and done >= total:
            self.stop()

    def wait(self, what: str) -> None:
        """Show that something of unknown length goes on, until the next stage."""
        self(what, 0, 0)

    def open(self, model: str, what: str = "model") -> None:
        """`wait` for a model that is opened; the hub shows its own bars of what it downloads."""
        if not self.console.is_terminal or is_gguf(model) or Path(model).expanduser().exists():
            self.wait(f"opening the {what}")
        else:
            self.stop()

    def stop(self) -> None:
        """End the stage: erase the bar."""
        self._end(finished=True)

    def _end(self, *, finished: bool) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._lines is not None:
            self._lines.end(finished=finished)
        self._bar, self._lines, self._stage = None, None, ""

    def _start(self, stage: str, total: int) -> None:
        self.stop()
        self._stage = stage
        self._steps.clear()
        title, colon, name = stage.rpartition(": ")
        description = title + colon + _STAGES.get(name, name)
        if not self.console.is_terminal:
            self._lines = _Lines(self.console.file, description)
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}"),
            _Remaining(),
            console=self.console,
            transient=True,
            redirect_stdout=False,  # stdout may be a file while stderr is a terminal
            redirect_stderr=False,
        )
        self._bar.add_task(escape(description), total=total or None, count="", ends=None)
        self._bar.start()

    def _estimate(self, total: int) -> float | None:
        """When the stage will end, on the monotonic clock; None before the first step."""
        (started, first), (now, done) = self._steps[0], self._steps[-1]
        if done <= first:
            return None
        return now + (now - started) / (done - first) * (total - done)


class _Lines:
    """A stage on a stream that is no terminal, such as the log of a job.

    A line once the stage has lasted for `_PATIENCE` seconds, so that what is short prints nothing;
    then one for a step, but none within `_INTERVAL` of the last; and one when it has ended.
    """

    def __init__(self, stream: IO[str], description: str) -> None:
        self._stream, self._description = stream, description
        self._started = time.monotonic()
        self._printed: float | None = None  # when the last line was
        self._count = ""
        # A step may take minutes: the first line is not to wait for it.
        self._timer = threading.Timer(_PATIENCE, self._begin)
        self._timer.daemon = True
        self._timer.start()

    def step(self, count: str, ends: float | None) -> None:
        """A step is done. count: "3/80", or "". ends: estimated, on the monotonic clock."""
        self._count = count
        now = time.monotonic()
        if self._printed is not None and now - self._printed >= _INTERVAL:
            self._print(count, "" if ends is None else f"{_span(ends - now)} left")

    def end(self, *, finished: bool) -> None:
        """Nothing more is printed. finished: rather than broken off by an error."""
        self._timer.cancel()
        if self._printed is not None and finished:
            self._print(f"done after {_span(time.monotonic() - self._started)}")

    def _begin(self) -> None:
        self._print(self._count)

    def _print(self, *parts: str) -> None:
        self._printed = time.monotonic()
        line = ", ".join(part for part in (self._description, *parts) if part)
        with suppress(ValueError):  # the stream is closed: the process ends
            print(line, file=self._stream, flush=True)


def _span(seconds: float) -> timedelta:
    """Whole seconds, for people: printed as 0:09:00."""
    return timedelta(seconds=max(0, round(seconds)))


class _Remaining(ProgressColumn):
    """Time until the task's `ends`, counting down."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        if ends is None:
            return Text("")
        return Text(f"{_span(ends - time.monotonic())} left", style="progress.remaining")


def quiet_transformers() -> None:
    """Without transformers' own progress bars and advice, for the rest of the process.

    Bars of downloads from the hub stay, on a terminal.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of the hub, too
    # The variable has the last word, and the hub warns of who asks for something else.
    if sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is not True:
        enable_progress_bars()


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


def comparison_header(methods: list[str], texts: Sequence[str] = ()) -> str:
    """Column heads over `comparison_line`s; what can stand in the first column sets its width."""
    return (
        f"{'method':<{_width(methods, texts)}}  {'perplexity':>16}  {'ratio to float':>16}  "
        f"{'KL, nats':>15}  {'top-1, %':>13}  {'quantize':>9}  {'linears':>9}  {'bits/weight':>11}"
    )


def comparison_line(row: Row, methods: list[str]) -> str:
    """One method's results, a line for each text; after +-, the standard deviation over seeds."""
    seconds = f"{row.seconds:.1f} s" if row.seconds else "-"
    width = _width(methods, [scores.text for scores in row.texts])
    lines = [
        f"{row.method:<{width}}  {_scores(row.headline)}  {seconds:>9}  "
        f"{size(row.weight_bytes):>9}  {row.bits_per_weight:>11.2f}"
    ]
    lines += [f"{_text(scores.text):<{width}}  {_scores(scores)}" for scores in row.texts[1:]]
    return "\n".join(lines)


def _scores(scores: Scores) -> str:
    """The columns that there are for each text."""
    spread = scores.agreement_spread
    agreement = _spread(100 * scores.agreement, None if spread is None else 100 * spread, 1)
    return (
        f"{_spread(scores.perplexity, scores.spread, 2):>16}  "
        f"{_spread(scores.ratio, scores.ratio_spread, 3):>16}  "
        f"{_spread(scores.kl, scores.kl_spread, 3):>15}  {agreement:>13}"
    )


def _text(text: str) -> str:
    """An evaluation text other than the first, in the first column."""
    return f"  on {text if text.startswith('hf:') else Path(text).name}"


def _width(methods: Sequence[str], texts: Sequence[str]) -> int:
    return max(map(len, ("method", "float", *methods, *map(_text, texts[1:]))))


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
