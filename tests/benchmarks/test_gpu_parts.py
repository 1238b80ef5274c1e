"""`make gpu` without a GPU: its parts, what it says of them, and the benchmarks small."""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import gpu
import pytest
import torch
from gpu import FAILED, LEFT, NAMES, PASSED, SKIPPED, TIMED_OUT, follow, judge
from harness import INCOMPLETE
from roofline import Peaks

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("status", "lines", "state", "why"),
    [
        (0, ["=== 3 passed in 2s ==="], PASSED, ()),
        (
            0,
            ["SKIPPED [2] a.py: why", "== 3 passed, 2 skipped =="],
            PASSED,
            ("SKIPPED [2] a.py: why",),
        ),
        (0, ["SKIPPED [2] a.py: why", "== 2 skipped =="], SKIPPED, ("SKIPPED [2] a.py: why",)),
        (0, ["row", "not measured: fp8: no"], PASSED, ("not measured: fp8: no",)),
        (0, ["a warning", "skipped: no kernel"], SKIPPED, ("skipped: no kernel",)),
        (1, ["FAILED a.py::test_b - x", "== 1 failed =="], FAILED, ("FAILED a.py::test_b - x",)),
        (
            1,
            ["Traceback:", "torch.AcceleratorError: x", "y"],
            FAILED,
            ("torch.AcceleratorError: x",),
        ),
        (5, ["== no tests ran =="], FAILED, ("== no tests ran ==",)),
        (1, [], FAILED, ()),
        (None, ["row 1", "row 2"], TIMED_OUT, ("after: row 2",)),
        (None, [], TIMED_OUT, ("after: nothing",)),
        (INCOMPLETE, ["row", "4 of 9 rows are left: run"], LEFT, ("4 of 9 rows are left: run",)),
    ],
)
def test_how_a_part_ended(status, lines, state, why):
    assert judge(status, lines) == (state, why)


def test_lines_are_passed_on_as_they_come():
    said = []
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(4)"
    assert follow([sys.executable, "-c", code], 60, said.append) == (4, ["one", "two"])
    assert said == ["one", "two"]


def test_what_runs_too_long_is_stopped_with_its_children():
    status, lines = follow(["sh", "-c", "echo started; sleep 60; echo done"], 0.5, lambda _: None)
    assert status is None and lines == ["started"]


def options(tmp_path, *words: str):
    """What `main` makes of its words."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "why_no_gpu", lambda: None)
        patch.setattr(gpu, "environment", lambda commit: {"library": {}, **MACHINE})
        patch.setattr(gpu, "device_slug", lambda device: "h100")
        patch.setattr(gpu, "run", lambda part, chosen, machine: seen.append(chosen) or OUTCOME)
        gpu.main(["--logs", str(tmp_path), *words])
    return seen[0]


MACHINE = {"gpus": ["H100"], "driver": "580", "versions": {}, "commit": "abc"}
OUTCOME = gpu.Outcome("tests", PASSED, 1.0)


@pytest.fixture
def _h100(monkeypatch):
    monkeypatch.setattr(gpu, "device_slug", lambda device: "h100")


@without_gpu
@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize("part", [n for n in NAMES if n.startswith("bench-") or n == "quantize"])
def test_the_options_of_each_benchmark_exist(part, tmp_path, capsys):
    """Each parses its own, and only then finds no GPU."""
    command = gpu.parts(options(tmp_path, "--commit", "abc"))[part]
    with pytest.raises(SystemExit) as ended:
        import_module(Path(command[1]).stem).main(command[2:])
    assert ended.value.code == 0
    assert capsys.readouterr().out.endswith("skipped: torch sees no CUDA device\n")


@pytest.mark.usefixtures("_h100")
def test_parts_name_files_and_folders_that_exist(tmp_path):
    chosen = options(tmp_path, "--results", str(tmp_path))
    (tmp_path / "h100_mxfp4_gemm.json").write_text("{}")
    commands = gpu.parts(chosen)
    assert tuple(commands) == NAMES
    for command in commands.values():
        assert command[0] == sys.executable
        for word in command:
            if word.startswith(("tests/", "benchmarks/")):
                assert (gpu.ROOT / word).exists(), word
    assert str(tmp_path / "h100_mxfp4_gemm.json") in commands["render"]
    assert "--resume" in commands["bench-gemm"]
    assert "--resume" not in gpu.parts(options(tmp_path, "--force"))["bench-gemm"]


@pytest.mark.usefixtures("_h100")
def test_a_part_that_passed_is_not_run_again(tmp_path, monkeypatch):
    runs = []

    def played(command, limit, say):
        runs.append(command)
        return (0 if len(runs) > 1 else 1), ["SKIPPED [1] a.py: why", "1 passed, 1 skipped"]

    monkeypatch.setattr(gpu, "follow", played)
    chosen = options(tmp_path, "--results", str(tmp_path))
    assert gpu.run("tests", chosen, MACHINE).state == FAILED
    assert gpu.run("tests", chosen, MACHINE).state == PASSED  # what failed is
    again = gpu.run("tests", chosen, MACHINE)
    assert (again.state, len(runs)) == (PASSED, 2)
    assert "passed already" in again.why[0] and again.why[1] == "SKIPPED [1] a.py: why"
    gpu.run("tests", chosen, MACHINE | {"commit": "def"})
    assert len(runs) == 3  # another commit
    gpu.run("tests", options(tmp_path, "--results", str(tmp_path), "--force"), MACHINE)
    assert len(runs) == 4
    kept = json.loads((tmp_path / "tests.json").read_text())
    assert kept["state"] == PASSED and kept["machine"] == MACHINE
    assert (tmp_path / "tests.log").read_text().startswith("SKIPPED")


def test_folders_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = options(Path("a"), "--results", "b", "--plots", "c")
    assert (chosen.logs, chosen.results, chosen.plots) == tuple(tmp_path / name for name in "abc")
    assert all((tmp_path / name).is_dir() for name in "abc")


@pytest.mark.usefixtures("_h100")
def test_nothing_to_render_is_said(tmp_path):
    outcome = gpu.run("render", options(tmp_path, "--results", str(tmp_path)), MACHINE)
    assert outcome.state == SKIPPED and "no results of this device" in outcome.why[0]


@without_gpu
def test_without_a_gpu_each_part_says_why(tmp_path, capsys):
    assert gpu.main(["--logs", str(tmp_path / "none")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{part}: skipped: torch sees no CUDA device" for part in NAMES]
    assert not (tmp_path / "none").exists()


def test_the_summary_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    outcomes = iter([OUTCOME, gpu.Outcome("memcheck", FAILED, 2.0, ("FAILED a", "FAILED b"))])
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "environment", lambda commit: {"library": {}, **MACHINE})
    monkeypatch.setattr(gpu, "run", lambda *_: next(outcomes))
    assert gpu.main(["--logs", str(tmp_path), "--parts", "tests", "memcheck"]) == 1
    summary = capsys.readouterr().out.partition("=== summary\n")[2].splitlines()
    assert summary == [
        "tests: passed, 1 s",
        "memcheck: failed, 2 s",
        "    FAILED a",
        "    FAILED b",
    ]


def in_this_process(command: list[str], limit: float, say) -> tuple[int, list[str]]:
    """`follow` of one of our scripts, without the time of its imports."""
    printed = StringIO()
    status = 0
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            status = import_module(Path(command[1]).stem).main(command[2:]) or 0
        except SystemExit as ended:
            status = ended.code
    lines = printed.getvalue().splitlines()
    for line in lines:
        say(line)
    return status, lines


def test_smoke_runs_a_benchmark_and_renders_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "follow", in_this_process)
    monkeypatch.setattr("bench_rotate_quantize.copy_bandwidth", lambda *_: 1e10)
    words = ["--smoke", "--logs", str(tmp_path), "--parts", "bench-rotate", "render"]
    assert gpu.main(words) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    made = json.loads((tmp_path / "smoke" / "cpu_rotate_quantize.json").read_text())
    assert made["complete"] and len(made["rows"]) == 10
    assert "| plain | none | 64 |" in out and "bench-rotate: passed" in out
    assert "render: " in out


def test_quantization_small(tiny_llama, tmp_path, monkeypatch, capsys):
    """On the CPU it is compared with itself: nothing differs."""
    monkeypatch.setattr("bench_quantize_device.JOBS", {"duqpp": {"method": "duqpp"}})
    monkeypatch.setattr("bench_quantize_device.COMPARED", {"hadamard": {"method": "hadamard"}})
    command = gpu.parts(options(tmp_path, "--smoke"))["quantize"]
    capsys.readouterr()
    words = [*command[2:], "--threads", "1", "--json", "--trained", str(tiny_llama)]
    import_module(Path(command[1]).stem).main(words)
    made = json.loads(capsys.readouterr().out)
    assert made["complete"]
    compared, trained, timed = made["rows"]
    assert compared["differing"] == trained["differing"] == 0 < compared["of"]
    assert (trained["model"], trained["blocks"]) == (tiny_llama.stem, 2)
    assert 0 < trained["KL"] == trained["cpu_KL"] < 1
    assert timed["job"] == "duqpp" and timed["s/block"] == timed["seconds"] / 2
    assert len(timed["profile"]["blocks"]) == 2 and timed["output_error"] > 0


@pytest.mark.parametrize("part", ["bench-gemm", "bench-layer"])
def test_the_smoke_options_of_the_others(part, tmp_path, monkeypatch, capsys):
    """In this process, which has imported everything already."""
    monkeypatch.setattr("bench_mxfp4_gemm.measured_peaks", lambda *_: Peaks({"read": 1e10}))
    monkeypatch.setattr("timing.MOST_CALLS", 3)  # no more copies than that are made
    command = gpu.parts(options(tmp_path, "--smoke"))[part]
    capsys.readouterr()
    import_module(Path(command[1]).stem).main([*command[2:], "--threads", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["complete"]
