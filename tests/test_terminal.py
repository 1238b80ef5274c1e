"""Progress bars on a terminal, and formats for people."""

import io

import pytest
from rich.console import Console

from duqpp import terminal
from duqpp.compare import Row, Run
from duqpp.terminal import Bars, comparison_header, comparison_line, percent, size


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


def test_columns_stand_under_their_heads():
    rows = [
        Row("float", (Run(None, 11.5, 0.0, 1.0),), 11.5, 400, 100),
        Row("a-long-name:gptq", (Run(0, 20.0, 5, 1.0), Run(1, 21.0, 7, 1.0)), 11.5, 54, 100),
    ]
    names = ["a-long-name:gptq"]
    lines = [comparison_line(row, names) for row in rows]
    assert len({len(line) for line in [comparison_header(names), *lines]}) == 1
    expected = "a-long-name:gptq 20.50 +- 0.71 1.783 +- 0.061 6.0 s 54 B 4.32"
    assert " ".join(lines[1].split()) == expected
