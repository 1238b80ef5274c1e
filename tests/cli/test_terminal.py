"""Progress bars on a terminal, and formats for people."""

import importlib
import io
import warnings
from dataclasses import replace

import huggingface_hub
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from rich.console import Console
from transformers.utils import logging

from duqpp.cli import terminal
from duqpp.cli.terminal import (
    Bars,
    comparison_header,
    comparison_line,
    percent,
    perplexity_lines,
    quiet_transformers,
    size,
    task_lines,
)
from duqpp.evaluation.divergence import Divergence
from duqpp.evaluation.perplexity import PerplexityResult
from duqpp.evaluation.scores import Row, Run, Scores
from duqpp.evaluation.tasks import TaskScore

hub_tqdm = importlib.import_module("huggingface_hub.utils.tqdm")  # hidden by a class of its name


@pytest.fixture
def bars():
    bars = Bars()
    bars.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with bars:
        yield bars


def shown(bars: Bars) -> str:
    """What the bar looks like now."""
    bars._bar.refresh()
    return bars.console.file.getvalue()


def test_a_bar_counts_steps_and_estimates_the_rest(bars, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    bars("quantize", 0, 30)
    assert "left" not in shown(bars)
    for done in (1, 2, 3):
        clock[0] += 20.0
        bars("quantize", done, 30)
    text = shown(bars)
    assert "quantizing decoder blocks" in text and "3/30" in text
    assert "0:09:00 left" in text  # 27 blocks of 20 seconds


def test_the_estimate_follows_the_recent_rate(bars, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    for done in range(60):  # as when the first 50 blocks were finished by an earlier run
        clock[0] += 0.1 if done <= 50 else 10.0
        bars("quantize", done, 70)
    assert "0:01:50 left" in shown(bars)  # 11 blocks of 10 seconds


def test_a_stage_that_ends_erases_its_bar(bars):
    bars.wait("opening the model")
    assert "opening the model" in shown(bars)
    bars("duquant++:gptq: evaluate", 0, 2)
    assert "duquant++:gptq: evaluating windows" in shown(bars)
    bars("duquant++:gptq: evaluate", 2, 2)
    assert bars._bar is None
    assert bars.console.file.getvalue().endswith("\x1b[2K")  # erase the line


class Clock:
    """Time and the timers that wait for it, as `terminal` sees them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list = []

    def timer(self, seconds: float, call) -> "Clock.Timer":
        return Clock.Timer(self, self.now + seconds, call)

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.at <= self.now]:
            timer.cancel()
            timer.call()

    class Timer:
        def __init__(self, clock, at, call) -> None:
            self.clock, self.at, self.call = clock, at, call

        def start(self) -> None:
            self.clock.timers.append(self)

        def cancel(self) -> None:
            if self in self.clock.timers:
                self.clock.timers.remove(self)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(terminal.threading, "Timer", clock.timer)
    return clock


def log_of(bars: Bars) -> list[str]:
    return bars.console.file.getvalue().splitlines()


@pytest.fixture
def log():
    bars = Bars()
    bars.console = Console(file=io.StringIO())
    return bars


def test_a_long_job_says_where_it_is_in_its_log(log, clock):
    with log:
        log.wait("opening the model")
        clock.pass_(5)
        for done in range(81):
            log("a: quantize", done, 80)
            clock.pass_(20)
    lines = log_of(log)
    assert lines[:3] == [
        "a: quantizing decoder blocks, 0/80",
        "a: quantizing decoder blocks, 3/80, 0:25:40 left",
        "a: quantizing decoder blocks, 5/80, 0:25:00 left",
    ]
    assert lines[-1] == "a: quantizing decoder blocks, done after 0:26:40"
    assert len(lines) == 1 + 39 + 1, "a line for 40 seconds, two steps; none for the last, done"
    assert not clock.timers


def test_the_first_line_does_not_wait_for_a_step(log, clock):
    with log:
        log.wait("opening the model")
        clock.pass_(9)
        assert log_of(log) == []
        clock.pass_(1)
        assert log_of(log) == ["opening the model"]
        clock.pass_(3000)
    assert log_of(log) == ["opening the model", "opening the model, done after 0:50:10"]


def test_short_stages_print_nothing_into_a_log(log, clock):
    with log:
        for seed in range(100):
            for done in range(5):
                log(f"rtn, seed {seed}: evaluate", done, 4)
                clock.pass_(2)
    assert log_of(log) == []


def test_a_stage_that_an_error_breaks_off_is_not_done(log, clock):
    with pytest.raises(ValueError, match="broken"), log:
        log("distill", 0, 9)
        clock.pass_(60)
        raise ValueError("broken")
    assert log_of(log) == ["distilling, 0/9"]
    assert not clock.timers


def test_the_timer_is_a_real_one(log, monkeypatch):
    monkeypatch.setattr(terminal, "_PATIENCE", 0.01)
    with log:
        log("selfcheck", 1, 9)
        log._lines._timer.join()
        assert log_of(log) == ["running the kernels, 1/9"]
    assert log_of(log)[1:] == ["running the kernels, done after 0:00:00"]


def test_the_hub_has_the_terminal_while_it_downloads(bars, log, tmp_path):
    bars.open(str(tmp_path))
    assert "opening the model" in shown(bars)
    bars.open("someone/some-model")
    assert bars._bar is None
    bars.open("model.gguf", "reference")
    assert "opening the reference" in shown(bars)
    with log:
        log.open("someone/some-model")
        assert log._stage == "opening the model"


@pytest.mark.parametrize(
    ("is_terminal", "variable", "shown"),
    [(True, None, True), (False, None, False), (True, True, False), (True, False, True)],
)
def test_bars_of_downloads_are_for_terminals(is_terminal, variable, shown, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    verbosity, were_shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True):
        patch.setattr(terminal.sys, "stderr", stream)
        for module in (hub_tqdm, huggingface_hub.constants):
            patch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", variable)
        quiet_transformers()
        found = are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    logging.set_verbosity(verbosity)
    if were_shown:
        logging.enable_progress_bar()
    assert found == (not shown, False)


def test_formats():
    assert [size(n) for n in (0, 999, 1000, 56_412_345, 3 * 10**9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "56.4 MB",
        "3.0 GB",
    ]
    assert (percent(None), percent(0.12345)) == ("-", "12.35 %")


def scores(text: str, *runs: Run) -> Scores:
    return Scores(text, windows=2, float_perplexity=11.5, runs=runs)


def test_columns_stand_under_their_heads():
    several = Run(0, 20.0, 0.5, 0.75, 5, 1.0), Run(1, 21.0, 0.625, 0.5, 7, 1.0)
    rows = [
        Row("float", (scores("a.txt", Run(None, 11.5, 0.0, 1.0, 0.0, 1.0)),), 400, 100),
        Row("a-long-name:gptq", (scores("a.txt", *several),), 54, 100),
    ]
    names = ["a-long-name:gptq"]
    lines = [comparison_line(row, names) for row in rows]
    assert len({len(line) for line in [comparison_header(names), *lines]}) == 1
    expected = (
        "a-long-name:gptq 20.50 +- 0.71 1.783 +- 0.061 0.562 +- 0.088 62.5 +- 17.7 6.0 s 54 B 4.32"
    )
    assert " ".join(lines[1].split()) == expected
    assert " ".join(lines[0].split()) == "float 11.50 1.000 0.000 100.0 - 400 B 32.00"


def test_further_texts_have_lines_of_their_own():
    texts = ["first.txt", "/some/where/wiki.valid.txt", "hf:name:config:split"]
    run = Run(0, 23.0, 0.25, 0.5, 5, 1.0)
    row = Row("rtn", tuple(scores(text, run) for text in texts), 54, 100)
    header = comparison_header(["rtn"], texts)
    first, *others = comparison_line(row, ["rtn"]).split("\n")
    assert len(first) == len(header)
    assert [line.split() for line in others] == [
        ["on", "wiki.valid.txt", "23.00", "2.000", "0.250", "50.0"],
        ["on", "hf:name:config:split", "23.00", "2.000", "0.250", "50.0"],
    ]
    end = header.index("top-1, %") + len("top-1, %")
    assert {len(line) for line in others} == {end} and first[:end].endswith(" 50.0")


def test_lines_of_an_evaluation():
    plain = PerplexityResult(20.0, [3.0], 64, 1, 2.5)
    assert perplexity_lines(plain)[0] == "perplexity 20.0000 over 1 windows of 64 tokens (2.5 s)"
    assert len(perplexity_lines(plain)) == 2
    beside = replace(plain, divergence=Divergence(0.4321, 0.7654, [], []))
    assert perplexity_lines(beside)[1] == (
        "KL divergence from the reference 0.4321 nats per token, top-1 agreement 76.54 %"
    )


def test_lines_of_tasks():
    scores = [
        TaskScore("arc", "acc", "none", 0.5, 0.0625, 40, 0, "1.0"),
        TaskScore("gsm", "exact_match", "strict", 0.25, None, 7, 5, None),
        TaskScore("group", "acc", "none", 0.5, 0.1, None, None, "2"),
    ]
    assert task_lines(scores) == [
        "arc: acc 0.5000 +- 0.0625, 40 samples, 0 shots",
        "gsm: exact_match (strict) 0.2500, 7 samples, 5 shots",
        "group: acc 0.5000 +- 0.1000",
    ]
