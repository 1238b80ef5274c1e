"""Progress with the remaining time on stderr: a bar on a terminal, lines in a log."""

import sys
import threading
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)

from duqpp.cli.tables import console as data_console
from duqpp.files import local_path
from duqpp.models.gguf import is_gguf

STAGES = {
    "fingerprint": "reading the model",
    "quantize": "quantizing decoder blocks",
    "distill": "distilling",
    "inspect": "inspecting decoder blocks",
    "verify": "checking the checkpoint's shards",
    "selfcheck": "running the kernels",
    "evaluate": "evaluating the text",
    "export": "converting shards",
}
PATIENCE = 10.0  # seconds of a stage before the first line of it, where stderr is no terminal
INTERVAL = 30.0  # seconds between two lines of a stage


class Bars:
    """Progress on stderr, one stage at a time; an instance is a `progress` argument.

    On a terminal a bar, erased when its stage ends; elsewhere, as in a log file, lines: see
    `_Log`. Between two stages, and after `stop`, nothing is written, so that what a command prints
    may share the terminal or the file.
    """

    def __init__(self, console: Console | None = None) -> None:
        # The stream itself: `sys.stderr` may be redirected while a library is kept quiet.
        self.console = console or data_console(sys.stderr)
        self._stage = ""
        self._bar = Progress(disable=True)
        self._log: _Log | None = None
        self._stepped = 0.0  # when the last step was, on the console's clock

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._end(finished=kind is None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are done; `total` 0 is an unknown number."""
        now = self.console.get_time()
        if stage != self._stage:
            self._start(stage, total)
        else:
            # rich takes the mean rate over a period. Steps take from milliseconds to minutes, and
            # those that an earlier run has finished are fast: the last few are to count.
            self._bar.speed_estimate_period = max(30.0, 2.5 * (now - self._stepped))
        self._stepped = now
        self._bar.update(self._bar.task_ids[0], completed=done)
        if total and done >= total:
            self.stop()

    def wait(self, what: str) -> None:
        """Show that something of unknown length goes on, until the next stage."""
        self(what, 0, 0)

    def open(self, model: str, what: str = "model") -> None:
        """`wait` for a model that is opened; the hub shows its own bars of what it downloads."""
        if not self.console.is_terminal or is_gguf(model) or local_path(model).exists():
            self.wait(f"opening the {what}")
        else:
            self.stop()

    def stop(self) -> None:
        """End the stage: erase the bar, or say in the log that it is done."""
        self._end(finished=True)

    def _start(self, stage: str, total: int) -> None:
        self.stop()
        self._stage = stage
        title, colon, name = stage.rpartition(": ")
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
        if total:
            columns += [
                BarColumn(30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
            ]
        self._bar = Progress(
            *columns,
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
            redirect_stdout=False,  # stdout may be a file while stderr is a terminal
            redirect_stderr=False,
        )
        self._bar.add_task(title + colon + STAGES.get(name, name), total=total or None)
        self._bar.start()
        if self._bar.disable:
            self._log = _Log(self.console, self._bar.tasks[0])

    def _end(self, *, finished: bool) -> None:
        self._bar.stop()
        if self._log is not None:
            self._log.end(finished=finished)
        self._log, self._stage = None, ""


class _Log:
    """A stage on a stream that is no terminal, such as the log of a job.

    A line once the stage has lasted for `PATIENCE`, so that what is short prints nothing, then one
    at every `INTERVAL`, and one when it has ended. A step may take minutes, so that lines cannot
    wait for steps: a thread writes them, which has ended when `end` returns.
    """

    def __init__(self, console: Console, task: Task) -> None:
        self._console, self._task = console, task
        self._ended = threading.Event()
        self._is_long = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self, *, finished: bool) -> None:
        """Nothing more is written. finished: rather than broken off by an error."""
        self._ended.set()
        self._thread.join()
        if self._is_long and finished:
            self._print(f"done after {timedelta(seconds=int(self._task.elapsed or 0))}")

    def _run(self) -> None:
        wait = PATIENCE
        while not self._ended.wait(wait):
            self._is_long, wait = True, INTERVAL
            counts = []
            if self._task.total is not None:
                counts.append(f"{self._task.completed:.0f}/{self._task.total:.0f}")
            if self._task.time_remaining is not None:
                counts.append(f"{TimeRemainingColumn().render(self._task)} left")
            self._print(*counts)

    def _print(self, *parts: str) -> None:
        line = ", ".join([self._task.description, *parts])
        if not self._console.quiet:
            print(line, file=self._console.file, flush=True)
