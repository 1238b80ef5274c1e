"""What the command prints, on whatever terminal, file or closed pipe stdout and stderr are."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import duqpp
from duqpp.cli.main import main
from duqpp.config import QuantizeConfig
from duqpp.models.source import open_source
from tests.forked import Forked, duqpp_command

NAMES = ("[bold]m", "m[red]x", "[red", ":smile:", "é北京🦙", "a\\[b]")


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch):
    """What these tests do is short: no line of progress, however busy the machine is."""
    monkeypatch.setattr("duqpp.cli.progress.PATIENCE", 1000.0)


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("terminal") / "quantized"
    duqpp.quantize_model(str(tiny_llama), folder, QuantizeConfig(method="rtn"))
    return folder


@pytest.fixture
def short_text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    return str(tmp_path / "text.txt")


def run_in(encoding: str, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command whose streams have an encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        code = main(arguments)
        for stream in streams:
            stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return code, out, err


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(name, tiny_llama, short_text, tmp_path, monkeypatch):
    """Brackets are rich's markup, and an unmatched one its error; a table is wide enough."""
    monkeypatch.setenv("COLUMNS", "200")
    model, out = tmp_path / name, tmp_path / f"out {name}"
    shutil.copytree(tiny_llama, model)
    shutil.copy(short_text, tmp_path / f"{name}.txt")
    quick = ("--calib", short_text, "--samples", "1", "--seq-len", "16", "--max-steps", "1")
    code, printed, _ = run_in("utf-8", monkeypatch, "quantize", str(model), str(out), *quick)
    assert code == 0 and f"out {name}: " in printed
    code, printed, _ = run_in("utf-8", monkeypatch, "inspect", str(out))
    assert code == 0 and f"{name}: duquant++" in printed
    texts = ("--text", short_text, "--text", str(tmp_path / f"{name}.txt"), "--seq-len", "16")
    compare = ("compare", str(model), "--method", "rtn", *texts, "--windows", "1")
    code, printed, _ = run_in("utf-8", monkeypatch, *compare)
    assert code == 0 and f"  on {name}.txt" in printed
    code, _, error = run_in("utf-8", monkeypatch, "eval", str(tmp_path / f"no {name}.gguf"))
    assert (code, error) == (2, f"error: no such file: {tmp_path}/no {name}.gguf\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "utf-8"])
@pytest.mark.parametrize("columns", ["1", "80"])
def test_every_encoding_and_width(encoding, columns, quantized, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    copied = tmp_path / "é北京🦙"
    shutil.copytree(quantized, copied)
    for arguments in (["--help"], ["inspect", str(copied)], ["quantize", "--help"]):
        code, out, error = run_in(encoding, monkeypatch, *arguments)
        assert (code, error) == (0, "") and out
    code, _, error = run_in(encoding, monkeypatch, "eval", "é北京🦙.gguf")
    assert code == 2 and error.count("\n") == 1
    shown = "é北京🦙" if encoding.startswith("utf") else r"\u5317\u4eac\U0001f99"
    assert shown in error


def test_text_of_a_model_that_the_encoding_has_not(tiny_llama, monkeypatch):
    """Random text of a random model: bytes that are no characters, and most of Unicode."""
    arguments = ["generate", str(tiny_llama), "北京", "--temperature", "5", "--max-new-tokens"]
    for encoding in ("ascii", "latin-1"):
        code, out, _ = run_in(encoding, monkeypatch, *arguments, "60")
        assert code == 0 and "\\u" in out


def test_json_is_ascii_whatever_the_name(quantized, tmp_path, monkeypatch):
    copied = tmp_path / "é北京🦙"
    shutil.copytree(quantized, copied)
    code, out, _ = run_in("ascii", monkeypatch, "inspect", str(copied), "--json")
    assert code == 0 and len(json.loads(out)["groups"]) == 8


def run_with(out: int | None, err: int | None, *arguments: str) -> int:
    """Exit code of a process whose stdout and stderr are these descriptors."""
    return Forked(duqpp_command(*arguments), [None, out, err]).wait()


def closed_pipe() -> int:
    """The writing end of a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


COMMANDS = (["--help"], ["doctor"], ["doctor", "--json"], ["inspect", "MODEL"])
GENERATE = ["generate", "MODEL", "Rome", "--max-new-tokens", "3"]


def placed(arguments: list[str], model: Path) -> list[str]:
    return [str(model) if word == "MODEL" else word for word in arguments]


@pytest.mark.parametrize("arguments", [*COMMANDS, GENERATE], ids=" ".join)
def test_a_reader_that_has_gone_is_not_spoken_of(arguments, quantized, tmp_path):
    """As `head` does; the exit code is that of the signal, as shells have it."""
    with open(tmp_path / "err", "wb") as err:
        assert run_with(closed_pipe(), err.fileno(), *placed(arguments, quantized)) == 141
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_disk_is_one_line(arguments, quantized, tmp_path):
    with open("/dev/full", "wb") as full, open(tmp_path / "err", "wb") as err:
        assert run_with(full.fileno(), err.fileno(), *placed(arguments, quantized)) == 2
    assert (tmp_path / "err").read_text() == "error: No space left on device\n"


@pytest.mark.parametrize("broken", ["closed pipe", "full disk"])
def test_an_error_that_nobody_can_read_has_its_exit_code(broken):
    err = closed_pipe() if broken == "closed pipe" else os.open("/dev/full", os.O_WRONLY)
    assert run_with(None, err, "eval", "none.gguf") == 2


def test_streams_that_are_closed_are_no_error(quantized, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", str(quantized)]) == 0
    assert main(["eval", "none.gguf"]) == 2


# What the system refuses.


def one_line(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    one_line(capsys, "eval", "model")
    one_line(capsys, "quantize", "model", "out")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x: can't allocate memory: 9 B")])
def test_memory_that_is_not_there(error, monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("duqpp.tools.inspection.inspect_model", refuse)
    assert one_line(capsys, "inspect", "model").startswith("error: out of memory: ")


def test_mistakes_of_duqpp_itself_are_shown(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise TypeError("ours")

    monkeypatch.setattr("duqpp.tools.inspection.inspect_model", fail)
    with pytest.raises(TypeError, match="ours"):
        main(["inspect", "model"])


def test_a_folder_for_temporary_files_that_cannot_be_written(
    tiny_llama, short_text, monkeypatch, capsys
):
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    texts = ("--text", short_text, "--seq-len", "16", "--method", "rtn")
    assert "/proc/nowhere" in one_line(capsys, "compare", str(tiny_llama), *texts)


@pytest.mark.parametrize("arguments", [["eval", "a\0b"], ["quantize", "model", "o\0"], ["\0"]])
def test_a_nul_character_is_one_line(arguments, capsys):
    assert "NUL" in one_line(capsys, *arguments)


@pytest.mark.parametrize(
    "command", ["eval", "inspect", "export --format compressed-tensors", "quantize", "compare"]
)
def test_a_user_that_is_none(command, capsys):
    out = ["out"] if command.startswith(("export", "quantize")) else []
    arguments = [*command.split(), "~nobody-of-that-name/model", *out]
    assert "~nobody-of-that-name/model" in one_line(capsys, *arguments)


# Found out before any work.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "MODEL", "--windows", "0"], "--windows must be at least 1, got 0"),
        (["eval", "MODEL", "--seq-len", "1"], "--seq-len must be at least 2, got 1"),
        (["compare", "MODEL", "--windows", "-1"], "--windows must be at least 1, got -1"),
        (["compare", "MODEL", "--seeds", f"0,{2**64}"], f"--seeds must lie in [-{2**63}, "),
        (["quantize", "MODEL", "o", "--seed", f"{2**64}"], f"--seed must lie in [-{2**63}, "),
        (["inspect", "MODEL", "--damping", "nan"], "--damping must lie in (0, 1), got nan"),
        (["generate", "MODEL", "Rome", "--device", "cuda:" + "9" * 30], "--device must be auto"),
    ],
)
def test_numbers_that_suit_no_model_are_refused_before_one_is_opened(
    arguments, message, monkeypatch, capsys
):
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(open_source.__module__ + ".SafetensorsSource", opened)
    monkeypatch.setattr("duqpp.integrations.transformers._load_model", opened)
    monkeypatch.setattr("duqpp.evaluation.models.open_model", opened)
    assert message in one_line(capsys, *placed(arguments, Path(".")))


@pytest.mark.parametrize("content", ["[]", "{", "[" * 10**5, '{"eos_token_id": ', "\ufeff{}", "\0"])
@pytest.mark.parametrize("command", [["eval", "--seq-len", "16"], ["generate", "Rome"]])
def test_a_damaged_generation_config_is_one_line(content, command, tiny_llama, tmp_path, capsys):
    """transformers would do without its stop tokens, and say nothing."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "generation_config.json").write_text(content, encoding="utf-8")
    found = one_line(capsys, command[0], str(model), *command[1:])
    assert "cannot load the generation configuration of" in found
