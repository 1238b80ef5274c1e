"""Rows that resume and fit a budget, and JSON that says where they were measured."""

import json
import subprocess
from argparse import Namespace

import harness
import pytest
import torch
from harness import INCOMPLETE, Budget, Run, device_slug, environment, parser, start


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    monkeypatch.setattr(harness, "environment", lambda commit=None: {"commit": commit or "abc"})


def options(file, **others) -> Namespace:
    defaults = {"out": file, "json": False, "resume": True, "seconds": 1.0, "budget": None}
    return Namespace(**{**defaults, "device": "cpu", "commit": None, **others})


def square(*, seconds: float, M: int) -> dict:
    return {"square": M * M, "seconds": seconds}


CASES = [{"M": m} for m in (1, 2, 3)]


def test_rows_that_are_there_are_not_measured_again(tmp_path, capsys):
    file = tmp_path / "rows.json"
    Run("b", {"M": "d"}, options(file), {"peaks": 1}).measure(CASES[:2], square)
    asked = []
    result = Run("b", {"M": "d"}, options(file), {"peaks": 2}).measure(
        CASES, lambda **case: asked.append(case["M"]) or square(**case)
    )
    assert asked == [3]
    assert "1 rows to measure, 2 are there already" in capsys.readouterr().out
    assert [(row["M"], row["run"]) for row in result["rows"]] == [(1, 0), (2, 0), (3, 1)]
    assert [run["peaks"] for run in result["runs"]] == [1, 2]
    assert result["complete"] and json.loads(file.read_text()) == result


@pytest.mark.parametrize("changed", [{"commit": "def"}, {"resume": False}])
def test_rows_of_another_commit_are_measured_anew(changed, tmp_path, capsys):
    file = tmp_path / "rows.json"
    Run("b", {}, options(file), {}).measure(CASES, square)
    result = Run("b", {}, options(file, **changed), {}).measure(CASES[:1], square)
    assert [row["M"] for row in result["rows"]] == [1]
    assert ("measured anew" in capsys.readouterr().out) == ("commit" in changed)


def test_each_row_is_kept_as_soon_as_it_is_there(tmp_path):
    file = tmp_path / "rows.json"

    def breaks(*, seconds: float, M: int) -> dict:
        if M == 3:
            raise KeyboardInterrupt
        return square(seconds=seconds, M=M)

    with pytest.raises(KeyboardInterrupt):
        Run("b", {}, options(file), {}).measure(CASES, breaks)
    kept = json.loads(file.read_text())
    assert [row["M"] for row in kept["rows"]] == [1, 2] and kept["complete"] is False
    assert [f.name for f in tmp_path.iterdir()] == ["rows.json"]


def test_no_memory_for_a_row_is_said_and_the_others_are_measured(tmp_path, capsys):
    def measured(*, seconds: float, M: int) -> dict:
        if M == 2:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB\nmore")
        return square(seconds=seconds, M=M)

    result = Run("b", {}, options(tmp_path / "rows.json"), {}).measure(CASES, measured)
    assert [row["M"] for row in result["rows"]] == [1, 3]
    assert result["skipped"] == [{"M": 2, "why": "out of memory: tried to allocate 80 GiB"}]
    assert "not measured: {'M': 2}: out of memory\n" in capsys.readouterr().out
    assert result["complete"]


def test_rows_without_time_are_left_for_the_next_run(tmp_path, capsys):
    file, clock = tmp_path / "rows.json", [0.0]

    def slow(*, seconds: float, M: int) -> dict:
        clock[0] += 6
        return square(seconds=seconds, M=M)

    run = Run("b", {}, options(file, budget=10.0), {}, now=lambda: clock[0])
    result = run.measure(CASES, slow)
    assert [row["M"] for row in result["rows"]] == [1, 2] and not result["complete"]
    assert result["skipped"] == [{"M": 3, "why": "no time was left"}]
    with pytest.raises(SystemExit) as ended:
        run.finish()
    assert ended.value.code == INCOMPLETE
    assert "1 of 3 rows are left" in capsys.readouterr().out
    rest = Run("b", {}, options(file), {}).measure(CASES, slow)
    assert rest["complete"] and not rest["skipped"] and len(rest["rows"]) == 3


def test_a_budget_shares_what_is_left():
    clock = [0.0]
    budget = Budget(60, 3, 50.0, now=lambda: clock[0])
    assert budget.share() == 10  # half of a third
    clock[0] = 20
    assert budget.share() == 10
    clock[0] = 59
    assert budget.share() == 0.5
    assert Budget(60, 1, 2.0, now=lambda: 0).share() == 2
    assert Budget(None, 1, 2.0).share() == 2
    clock[0] = 60
    assert Budget(0, 1, 2.0, now=lambda: clock[0]).share() is None


def test_json_alone_is_printed_where_it_is_asked_for(capsys):
    run = Run("b", {"M": "d"}, options(None, json=True), {})
    run.measure(CASES, square)
    run.add(more=1)
    run.finish()
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["rows"]) == 3 and printed["more"] == 1 and printed["bench"] == "b"


def test_a_folder_gets_a_file_that_names_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    run = Run("rotate_quantize", {}, options(tmp_path, device="cuda"), {})
    assert run.file == tmp_path / "h100-80gb-hbm3_rotate_quantize.json"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    assert device_slug("cuda") == "rtx-4090"
    assert Run("b", {}, options(tmp_path), {}).file == tmp_path / "cpu_b.json"


def chosen(*words: str) -> Namespace:
    asked = parser("a benchmark")
    harness.add_device(asked, cpu_cache="warm")
    return start(asked, [*words, "--threads", "1"])[0]


def test_caches_by_device(monkeypatch):
    assert chosen().cache == ["warm"]
    assert chosen("--cache", "cold").cache == ["cold"]
    monkeypatch.setattr(harness, "why_no_gpu", lambda: None)
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    assert chosen("--device", "cuda").cache == ["cold", "warm"]


def test_why_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(harness.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "is a build for CPUs" in harness.why_no_gpu()
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        chosen("--device", "cuda")
    assert ended.value.code == 0
    assert capsys.readouterr().out == "skipped: torch sees no CUDA device\n"


def test_the_driver_is_what_nvidia_smi_says(monkeypatch):
    unknown = {"driver": None, "power_limit": None, "clock": None}
    assert torch.cuda.is_available() or harness._driver() == unknown
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness.shutil, "which", lambda name: name)
    done = subprocess.CompletedProcess([], 0, "580.159.04, 700.00 W, 1980 MHz\n")
    monkeypatch.setattr(harness.subprocess, "run", lambda *_, **__: done)
    expected = {"driver": "580.159.04", "power_limit": "700.00 W", "clock": "1980 MHz"}
    assert harness._driver() == expected
    done.returncode = 9
    assert harness._driver() == unknown


def test_the_commit_and_whether_sources_changed(tmp_path, monkeypatch):
    if harness.shutil.which("git") is None:
        pytest.skip("no git")

    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *words], capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().strip()

    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness._described() == ""
    for name in ("benchmarks/results/a.json", "docs/a.md", "a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "One")
    commit = git("describe", "--always")
    for name in ("benchmarks/results/a.json", "docs/a.md", "new.json"):
        (tmp_path / name).write_text("two")
    assert harness._described() == commit
    (tmp_path / "a.py").write_text("two")
    assert harness._described() == f"{commit}-dirty"
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    assert harness._described() == ""


def test_the_environment_reads_back_as_it_is():
    about = environment("abc")  # the real one: the fixture replaced only the module's name
    assert json.loads(json.dumps(about)) == about
    assert {"gpus", "driver", "cuda", "versions", "commit", "cpu", "threads"} <= set(about)
