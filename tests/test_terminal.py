"""Progress bars on a terminal, and formats for people."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from duqpp import terminal
from duqpp.divergence import Divergence
from duqpp.evaluate import PerplexityResult
from duqpp.scores import Row, Run, Scores
from duqpp.tasks import TaskScore
from duqpp.terminal import (
    Bars,
    comparison_header,
    comparison_line,
    percent,
    perplexity_lines,
    size,
    task_lines,
)


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


def test_nothing_is_drawn_without_a_terminal():
    with Bars() as bars:
        bars.console = Console(file=io.StringIO())
        bars.wait("opening the model")
        bars("quantize", 1, 2)
        assert bars.console.file.getvalue() == ""


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
