"""Seconds by stage: each counted once, by block, beside other threads, and in a whole job."""

import json
import threading
from contextvars import copy_context

import pytest
import torch

import duqpp
from duqpp.cli.main import main
from duqpp.config import QuantizeConfig
from duqpp.placement import stages
from duqpp.placement.stages import Profile, profiled, stage

TOKENS = torch.randint(0, 300, (4, 48), generator=torch.Generator().manual_seed(1))
# What every job goes through, and what a method that reads activations does besides.
ALWAYS = {"opening", "fingerprint", "tokens", "reading", "fold", "packing", "report"}
ALWAYS |= {"writing", "finishing", "other"}
ALWAYS |= {"float pass", "transform", "hessian"}
FITTED = ALWAYS | {"quantized pass", "statistics"}
GPTQ = {"drift", "factor", "gptq"}
JOBS = {
    "rtn": ({}, ALWAYS | {"smoothing", "rounding"}),
    "duquant++": ({}, FITTED | {"smoothing", "rounding"}),
    "duquant": ({"gptq": True}, FITTED | {"smoothing"} | GPTQ - {"drift"}),
    "learned": ({}, FITTED | {"smoothing", "rounding"}),
    "duqpp": ({}, FITTED | GPTQ),
    "duqpp blocks": ({"refine": "blocks", "samples": 2}, FITTED | {"rounding", "refine"}),
    "duqpp distill": (
        {"refine": "distill", "samples": 2},
        FITTED | {"rounding", "refine", "distill"},
    ),
}


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that stages read, in its only entry."""
    now = [100.0]
    monkeypatch.setattr(stages, "_now", lambda: now[0])
    return now


def test_a_stage_inside_of_another_is_counted_once(clock):
    with profiled() as profile:
        clock[0] += 1
        with stage("hessian", 3):
            clock[0] += 10
            for _ in range(2):
                with stage("rounding"):
                    clock[0] += 100
                    with stage("hessian"):
                        clock[0] += 1000
        with stage("rounding", 1):
            clock[0] += 10000
    found = profile.to_dict()
    assert found["seconds"] == clock[0] - 100
    assert found["by_stage"] == {"rounding": 10200, "hessian": 2010, "other": 1}
    assert list(found["by_stage"]) == ["rounding", "hessian", "other"], "the most first"
    assert found["blocks"] == [
        {"block": 1, "by_stage": {"rounding": 10000}},
        {"block": 3, "by_stage": {"hessian": 2010, "rounding": 200}},
    ]
    assert json.loads(json.dumps(found)) == found


def test_a_stage_that_fails_is_counted_and_closed(clock):
    with pytest.raises(ValueError), profiled() as profile:
        with pytest.raises(KeyError), stage("gptq"):
            clock[0] += 5
            raise KeyError
        clock[0] += 1
        raise ValueError
    assert profile.to_dict()["by_stage"] == {"gptq": 5, "other": 1}
    with stage("gptq"):
        clock[0] += 7
    assert profile.to_dict()["seconds"] == 6, "what comes after a job is none of it"


def test_a_thread_beside_the_job_takes_nothing_off_its_stages(clock):
    @stage("reading", block=7)
    def read() -> None:
        clock[0] += 4

    with profiled() as profile, stage("gptq", block=6):
        for run in (copy_context().run, lambda function: function()):  # in it, and outside of it
            thread = threading.Thread(target=run, args=(read,))
            thread.start()
            thread.join()
    found = profile.to_dict()
    assert found["by_stage"] == {"gptq": 8, "other": 0}
    assert found["beside"] == {"reading": 4}
    assert found["seconds"] == 8
    assert found["blocks"] == [
        {"block": 6, "by_stage": {"gptq": 8}},
        {"block": 7, "by_stage": {}, "beside": {"reading": 4}},
    ]


def test_the_device_is_waited_for_where_stages_begin_and_end(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    with stage("gptq"):
        pass
    with profiled(), stage("gptq"):
        pass
    assert waited == [], "the CPU does what it is told at once"
    device = torch.device("cuda", 1)
    with profiled(device):
        with stage("gptq"):
            pass
        read = stage("reading")(lambda: None)
        thread = threading.Thread(target=copy_context().run, args=(read,))
        thread.start()
        thread.join()
    assert waited == [device] * 4, "and a thread beside the job waits for nothing"


@pytest.mark.parametrize("job", JOBS)
def test_every_stage_of_a_job_is_named(job, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 48)
    options, expected = JOBS[job]
    config = QuantizeConfig(method=job.split()[0], max_steps=4, **options)
    report = duqpp.quantize_model(
        str(tiny_llama), tmp_path / "out", config, calibration=TOKENS, profile=True
    )
    found = report.profile
    assert set(found["by_stage"]) == expected
    assert [block["block"] for block in found["blocks"]] == [0, 1]
    assert report.seconds <= found["seconds"] <= 1.1 * report.seconds + 0.1
    assert sum(found["by_stage"].values()) == pytest.approx(found["seconds"])
    inside = sum(sum(block["by_stage"].values()) for block in found["blocks"])
    assert 0 < inside < found["seconds"]


def test_a_resumed_job_counts_its_own_blocks(tiny_llama, tmp_path):
    out, stop = tmp_path / "out", RuntimeError("stopped")

    def progress(name: str, done: int, total: int) -> None:
        if (name, done) == ("quantize", 1):
            raise stop

    options = {"calibration": TOKENS, "profile": True}
    config = QuantizeConfig(method="hadamard", gptq=True)
    with pytest.raises(RuntimeError):
        duqpp.quantize_model(str(tiny_llama), out, config, **options, progress=progress)
    report = duqpp.quantize_model(str(tiny_llama), out, config, **options, resume=True)
    by_block = {block["block"]: set(block["by_stage"]) for block in report.profile["blocks"]}
    assert by_block[0] == {"reading", "quantized pass", "other"}
    assert {"reading", "gptq", "writing"} < by_block[1]


def test_the_command_writes_its_profile(tiny_llama, tmp_path, capsys):
    file = tmp_path / "profile.json"
    small = ["--method", "rtn", "--json"]
    command = ["quantize", str(tiny_llama), str(tmp_path / "out"), *small]
    assert main([*command, "--profile", str(tmp_path)]) == 2
    error = f"error: cannot write the profile to {tmp_path}: it is a folder\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path / "out").exists(), "it is said before the work"
    assert main([*command, "--profile", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written == json.loads(capsys.readouterr().out)["profile"]
    assert written["by_stage"]["rounding"] > 0


def test_nobody_asked_for_a_profile(tiny_llama, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a clock was read")

    monkeypatch.setattr(stages, "_now", refuse)
    monkeypatch.setattr(Profile, "__init__", refuse)
    config = QuantizeConfig(method="rtn")
    assert duqpp.quantize_model(str(tiny_llama), tmp_path / "out", config).profile is None
