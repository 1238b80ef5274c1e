"""Progress: bars on a terminal, lines in a log, and nothing of either inside what is printed."""

import contextlib
import io
import os
import pty
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import duqpp
from duqpp.cli import progress
from duqpp.cli.progress import Bars
from duqpp.config import QuantizeConfig
from duqpp.integrations.transformers import load_model
from duqpp.tools.generate import generate
from tests.forked import Forked, duqpp_command

PROMPT = "The capital of France is"


class Clock:
    """Seconds as a console and its bars see them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(clock) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, get_time=clock)


@pytest.fixture
def log(clock, monkeypatch) -> Console:
    """A stream that is no terminal, and patience for nothing: lines come all the time."""
    monkeypatch.setattr(progress, "PATIENCE", 0.001)
    monkeypatch.setattr(progress, "INTERVAL", 0.001)
    return Console(file=io.StringIO(), get_time=clock)


def lines_of(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def wait_for(text: str, console: Console) -> None:
    """Until it is on the console: a thread writes there."""
    deadline = time.monotonic() + 60
    while text not in console.file.getvalue():
        assert time.monotonic() < deadline, f"{text!r} is not in {console.file.getvalue()[-500:]!r}"
        time.sleep(0.001)


@pytest.mark.parametrize("console", ["terminal", "log"])
def test_steps_are_counted_and_the_rest_is_estimated(console, clock, request):
    console = request.getfixturevalue(console)
    with Bars(console) as bars:
        bars("a: quantize", 0, 30)
        wait_for("0/30", console)
        for done in (1, 2, 3):
            assert "0:09:00" not in console.file.getvalue()
            clock.now += 20.0
            bars("a: quantize", done, 30)
        wait_for("3/30", console)
        wait_for("0:09:00", console)  # 27 blocks of 20 seconds
    assert "a: quantizing decoder blocks" in console.file.getvalue()


def test_the_estimate_follows_the_recent_rate(log, clock):
    with Bars(log) as bars:
        for done in range(60):  # as when the first 50 blocks were finished by an earlier run
            clock.now += 0.1 if done <= 50 else 600.0
            bars("quantize", done, 70)
        wait_for("quantizing decoder blocks, 59/70, 1:50:00 left", log)  # 11 blocks of 10 minutes


def test_a_stage_that_ends_erases_its_bar(terminal):
    with Bars(terminal) as bars:
        bars.wait("opening the model")
        wait_for("opening the model", terminal)
        bars("duquant++ --gptq: evaluate", 0, 2)
        wait_for("duquant++ --gptq: evaluating the text", terminal)
        bars("duquant++ --gptq: evaluate", 2, 2)
        shown = terminal.file.getvalue()
        assert shown.endswith("\x1b[2K")  # erase the line
        time.sleep(0.3)  # a bar is drawn ten times a second
        assert terminal.file.getvalue() == shown


def test_a_long_stage_says_where_it_is_and_when_it_is_done(log, clock):
    with Bars(log) as bars:
        bars("distill", 0, 9)
        wait_for("distilling, 0/9\ndistilling, 0/9\n", log)
        clock.now += 3010.4
        bars("distill", 9, 9)
    assert lines_of(log)[-1] == "distilling, done after 0:50:10"
    assert set(lines_of(log)[:-1]) == {"distilling, 0/9"}


def test_lines_come_after_a_patience_and_at_intervals(log, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.3)
    monkeypatch.setattr(progress, "INTERVAL", 1000.0)
    with Bars(log) as bars:
        bars.wait("opening the model")
        time.sleep(0.1)
        assert lines_of(log) == []
        wait_for("opening the model\n", log)
        time.sleep(0.3)
        assert lines_of(log) == ["opening the model"]
    assert lines_of(log) == ["opening the model", "opening the model, done after 0:00:00"]


def test_short_stages_print_nothing_into_a_log(log, clock, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 1000.0)
    before = threading.active_count()
    with Bars(log) as bars:
        for seed in range(10):
            for done in range(5):
                bars(f"rtn, seed {seed}: evaluate", done, 4)
                clock.now += 200
        assert threading.active_count() == before
    assert lines_of(log) == []


def test_a_stage_that_an_error_breaks_off_is_not_done(log):
    with pytest.raises(ValueError, match="broken"), Bars(log) as bars:
        bars("distill", 0, 9)
        wait_for("distilling, 0/9", log)
        raise ValueError("broken")
    assert set(lines_of(log)) == {"distilling, 0/9"}


def test_the_hub_has_the_terminal_while_it_downloads(terminal, log, tmp_path):
    with Bars(terminal) as bars:
        bars.open(str(tmp_path))
        wait_for("opening the model", terminal)
        bars.open("someone/some-model")
        assert terminal.file.getvalue().endswith("\x1b[2K")
        bars.open("model.gguf", "reference")
        wait_for("opening the reference", terminal)
    with Bars(log) as bars:
        bars.open("someone/some-model")
        wait_for("opening the model", log)


# Generated text is what a user waits for: no progress may land in it.


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("progress") / "out"
    duqpp.quantize_model(str(tiny_llama), out, QuantizeConfig(method="hadamard"))
    return out


@pytest.mark.parametrize("console", ["terminal", "log"])
def test_nothing_is_written_while_a_loaded_model_generates(console, quantized, request):
    """Text and progress on one stream, inside `Bars`: a stage must not outlive its last step."""
    console = request.getfixturevalue(console)
    with Bars(console) as bars, contextlib.redirect_stdout(console.file):

        def shown(stage: str, done: int, total: int) -> None:
            """Each stage lasts until it is on the console."""
            bars(stage, done, total)
            if stage == "verify" and done < total:
                wait_for("checking the checkpoint's shards", console)

        model, tokenizer = load_model(str(quantized), progress=shown)
        assert "checking the checkpoint's shards" in console.file.getvalue()
        print(PROMPT, end="")
        time.sleep(0.3)
        text = generate(model, tokenizer, PROMPT, max_new_tokens=8, stream=True).text
    assert f"{PROMPT}{text}\n" in console.file.getvalue()


def output_of_a_file(command: Callable[[], object], folder: Path) -> str:
    with open(folder / "both.txt", "w+b") as file:
        assert Forked(command, [None, file.fileno(), file.fileno()]).wait() == 0
        return (folder / "both.txt").read_bytes().decode()


def output_of_a_terminal(command: Callable[[], object], folder: Path) -> str:
    leader, follower = pty.openpty()
    process = Forked(command, [follower] * 3)
    os.close(follower)
    found = b""
    with contextlib.suppress(OSError):  # how the end of a terminal is told on Linux
        while part := os.read(leader, 65536):
            found += part
    os.close(leader)
    assert process.wait() == 0
    return found.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("run", [output_of_a_file, output_of_a_terminal])
def test_the_command_writes_text_and_progress_to_one_place(
    run: Callable[[Callable[[], object], Path], str], quantized, tmp_path, monkeypatch
):
    for name in ("PATIENCE", "INTERVAL"):
        monkeypatch.setattr(progress, name, 0.001)
    model, tokenizer = load_model(str(quantized))
    text = generate(model, tokenizer, PROMPT, max_new_tokens=8).text
    arguments = ["generate", str(quantized), PROMPT, "--max-new-tokens", "8", "--device", "cpu"]
    output = run(duqpp_command(*arguments), tmp_path)
    progress_shown, generated, speed = output.partition(f"{text}\n8 tokens in ")
    assert generated and speed.endswith("tokens/s\n") and speed.count("\n") == 1
    assert "checking the checkpoint's shards" in progress_shown


def test_a_quiet_console_gets_no_line(monkeypatch, capfd):
    """As that of every rank but the first."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    for quiet in (True, False):
        with Bars(Console(quiet=quiet)) as bars:
            bars("quantize", 0, 2)
            time.sleep(0.1)
            bars("quantize", 2, 2)
        assert (capfd.readouterr().out == "") is quiet
