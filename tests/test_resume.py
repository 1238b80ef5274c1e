"""Interrupted quantization: killed at any point, it resumes to the same bytes, or says why not."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from tests import decoder
from tests.models import damage

TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
OPTIONS = {"max_steps": 8, "gptq": True}
LAYERS = 4
REST, FIRST, SECOND, THIRD, FOURTH = (f"model-0000{i}-of-00005.safetensors" for i in range(1, 6))

# What the subprocess runs. It stops for good in the block whose index it is given, so that a kill
# finds it in the middle of that block however slow the machine is.
JOB = """
import json, sys, time
import torch
import duqpp
torch.set_num_threads(1)
model, out, options, tokens, stop = sys.argv[1:]
def progress(stage, done, total):
    if stage == "quantize" and done == int(stop):
        while True:
            time.sleep(60)
duqpp.quantize_model(model, out, duqpp.QuantizeConfig(**json.loads(options)),
                     calibration=torch.tensor(json.loads(tokens)), progress=progress)
"""


class Stopped(BaseException):
    """Stands for the end of the process: nothing in duqpp may catch it."""


@pytest.fixture(scope="session")
def model(make_tiny) -> Path:
    return make_tiny("llama", shard_size="60KB", num_hidden_layers=LAYERS)


def quantize(model: Path, out: Path, **options):
    call = {k: options.pop(k) for k in ("resume", "progress", "calibration") if k in options}
    config = QuantizeConfig(**(OPTIONS | options))
    return duqpp.quantize_model(str(model), out, config, **({"calibration": TOKENS} | call))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def stop_in_block(index: int):
    """A progress callback that ends the job when `index` blocks are done."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == index:
            raise Stopped

    return progress


def interrupted(model: Path, out: Path, block: int = 2, **options) -> Path:
    """Leave behind the partial folder of a job that ended in `block`. Returns: that folder."""
    with pytest.raises(Stopped):
        quantize(model, out, progress=stop_in_block(block), **options)
    return out.with_name(out.name + ".partial")


@pytest.fixture(scope="session")
def uninterrupted(model, tmp_path_factory):
    """Hashes of what an uninterrupted job writes, by options; the folder is always "out"."""
    known = {}

    def run(**options) -> dict[str, str]:
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            out = tmp_path_factory.mktemp("whole") / "out"
            quantize(model, out, **options)
            known[key] = hashes(out)
        return known[key]

    return run


@pytest.mark.parametrize("block", [1, 3])
def test_kill_9_and_resume(block, model, tmp_path, uninterrupted):
    out, work = tmp_path / "out", tmp_path / "out.partial"
    arguments = [str(model), str(out), json.dumps(OPTIONS), json.dumps(TOKENS.tolist()), str(block)]
    job = subprocess.Popen([sys.executable, "-c", JOB, *arguments], cwd=tmp_path)
    last = (FIRST, SECOND, THIRD, FOURTH)[block - 1]
    deadline = time.monotonic() + 120
    while not (work / last).exists():
        assert job.poll() is None, "the job ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert not out.exists()
    finished = sorted(work.glob("*.safetensors"))
    assert [f.name for f in finished] == [REST, FIRST, SECOND, THIRD, FOURTH][: block + 1]
    before = {f.name: (f.stat().st_mtime_ns, f.stat().st_ino) for f in finished}
    report = quantize(model, out, resume=True)
    assert report.resumed_blocks == block
    assert hashes(out) == uninterrupted()
    after = {name: ((out / name).stat().st_mtime_ns, (out / name).stat().st_ino) for name in before}
    assert after == before, "finished blocks were written again"
    assert not work.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"next_inputs": "float"},
        {"gptq": False, "rotation": "per-block"},
        {"method": "rtn", "gptq": False},
        {"method": "random", "hessian": "quantized"},
        {"method": "duquant"},
        {"skip": ("down_proj",), "smooth_alpha": 0.3},
        {"method": "duqpp", "next_inputs": "float"},
        {"method": "duqpp", "refine": "blocks", "samples": 1, "refine_samples": 2},
    ],
    ids=[
        "float inputs",
        "per-block",
        "no activations",
        "quantized hessian",
        "duquant",
        "skip",
        "duqpp",
        "refined",
    ],
)
def test_resume_gives_the_same_bytes(options, model, tmp_path, uninterrupted):
    out = tmp_path / "out"
    interrupted(model, out, **options)
    report = quantize(model, out, resume=True, **options)
    assert report.resumed_blocks == 2
    assert len(report.groups) == (3 if "skip" in options else 4) * LAYERS
    assert hashes(out) == uninterrupted(**options)


def test_resume_of_a_bfloat16_model(model, tmp_path):
    source = tmp_path / "model"
    float32 = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    float32.save_pretrained(source, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(model).save_pretrained(source)
    (tmp_path / "whole").mkdir()
    quantize(source, tmp_path / "whole" / "out")
    interrupted(source, tmp_path / "out", block=3)
    quantize(source, tmp_path / "out", resume=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole" / "out")


@pytest.mark.parametrize("block", [0, LAYERS])
def test_resume_before_the_first_and_after_the_last_block(block, model, tmp_path, uninterrupted):
    out = tmp_path / "out"
    interrupted(model, out, block=block)
    assert quantize(model, out, resume=True).resumed_blocks == block
    assert hashes(out) == uninterrupted()


def test_resume_without_anything_to_resume(model, tmp_path, uninterrupted):
    assert quantize(model, tmp_path / "out", resume=True).resumed_blocks == 0
    assert hashes(tmp_path / "out") == uninterrupted()


def test_interrupted_twice(model, tmp_path, uninterrupted):
    out = tmp_path / "out"
    interrupted(model, out, block=1)
    with pytest.raises(Stopped):
        quantize(model, out, resume=True, progress=stop_in_block(3))
    assert quantize(model, out, resume=True).resumed_blocks == 3
    assert hashes(out) == uninterrupted()


@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
def test_stopped_at_any_file_operation(call, model, tmp_path, uninterrupted, monkeypatch):
    """Every place between two file operations is one where the machine may be switched off.

    Afterwards the output is whole, or resuming makes it so; a stop is never answered by an error.
    """
    options = {"method": "rtn", "gptq": False}
    expected = uninterrupted(**options)
    original, count = getattr(os, call), 0

    def stop_at(number: int):
        def operation(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                raise Stopped
            return original(*args, **kwargs)

        return operation

    for number in range(1, 100):
        out, count = tmp_path / str(number) / "out", 0
        out.parent.mkdir()
        monkeypatch.setattr(os, call, stop_at(number))
        try:
            quantize(model, out, **options)
        except Stopped:
            monkeypatch.setattr(os, call, original)
            if not out.exists():
                quantize(model, out, resume=True, **options)
            files = hashes(out)
            assert expected.items() <= files.items(), f"stopped at {call} number {number}"
            duqpp.from_pretrained(out)
        else:
            break
    assert number > {"replace": 10, "fsync": 5, "unlink": 5}[call]


def test_keyboard_interrupt_keeps_what_is_finished(model, tmp_path, uninterrupted):
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, progress=progress)
    assert not out.exists() and (tmp_path / "out.partial" / THIRD).exists()
    assert quantize(model, out, resume=True).resumed_blocks == 3
    assert hashes(out) == uninterrupted()


def test_full_disk_keeps_what_is_finished(model, tmp_path, uninterrupted, monkeypatch):
    fsync, calls = os.fsync, []

    def full_at_the_eighth(descriptor):
        calls.append(descriptor)
        if len(calls) == 8:  # job, what is outside the blocks, then a report and a shard for each
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(descriptor)

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", full_at_the_eighth)
    with pytest.raises(InputError, match=r"out\.partial: No space left on device; .*--resume"):
        quantize(model, out)
    assert quantize(model, out, resume=True).resumed_blocks == 2
    assert hashes(out) == uninterrupted()


def test_a_partial_folder_is_not_continued_unasked(model, tmp_path):
    work = interrupted(model, tmp_path / "out")
    before = hashes(work)
    with pytest.raises(InputError, match=r"out\.partial holds an unfinished job.*--resume"):
        quantize(model, tmp_path / "out")
    assert hashes(work) == before
    assert not (tmp_path / "out").exists()


def other_weight(folder: Path) -> None:
    """One weight in the middle of a tensor, in the middle of the model, by one unit."""
    name = "model.layers.2.mlp.up_proj.weight"
    weight = damage.get_tensor(folder, name)
    weight.view(torch.int32)[50, 31] += 1
    damage.set_tensor(folder, name, weight)


def other_epsilon(folder: Path) -> None:
    damage.edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-5))


@pytest.mark.parametrize("change", [other_weight, other_epsilon])
def test_refuses_another_model(change, model, tmp_path):
    source, out = damage.copy_of(model, tmp_path / "model"), tmp_path / "out"
    work = interrupted(source, out)
    before = hashes(work)
    other = damage.copy_of(model, tmp_path / "other")
    change(other)
    with pytest.raises(InputError, match="unfinished job of another model; remove it"):
        quantize(other, out, resume=True)
    assert hashes(work) == before
    quantize(source, out, resume=True)


def test_resumes_a_model_that_was_moved(model, tmp_path):
    interrupted(model, tmp_path / "out")
    moved = damage.copy_of(model, tmp_path / "somewhere else")
    assert quantize(moved, tmp_path / "out", resume=True).resumed_blocks == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"calibration": TOKENS.roll(1)}, "calibration"),
        ({"calibration": TOKENS[:1]}, "calibration"),
        ({"seed": 1}, "configuration (seed)"),
        ({"gptq": False}, "configuration (gptq)"),
        ({"method": "hadamard"}, "configuration (method)"),
        ({"next_inputs": "float"}, "configuration (next_inputs)"),
        ({"damping": 0.02}, "configuration (damping)"),
        ({"skip": ("down_proj",)}, "configuration (skip)"),
        ({"activation_rule": "floor"}, "configuration (activation_rule)"),
        (
            {"seed": 1, "gptq": False, "calibration": TOKENS.flip(0)},
            "calibration and configuration (gptq, seed)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_refuses_another_job(change, named, model, tmp_path):
    work = interrupted(model, tmp_path / "out")
    before = hashes(work)
    with pytest.raises(InputError, match=re.escape(f"job of another {named}; remove it")):
        quantize(model, tmp_path / "out", resume=True, **change)
    assert hashes(work) == before, "another job's folder was touched"
    assert not (tmp_path / "out").exists()


def test_refuses_another_version(model, tmp_path, monkeypatch):
    interrupted(model, tmp_path / "out")
    monkeypatch.setattr(duqpp, "__version__", "0.0.0")
    with pytest.raises(InputError, match="another version"):
        quantize(model, tmp_path / "out", resume=True)


def test_refuses_a_folder_that_is_no_job(model, tmp_path):
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="remove it, or choose another output folder"):
        quantize(model, tmp_path / "out", resume=True)
    assert [f.name for f in work.iterdir()] == ["notes.txt"]


def test_finished_blocks_are_verified(model, tmp_path, uninterrupted):
    """A flipped bit in a finished shard is not carried into the result, nor is the rest lost."""
    work = interrupted(model, tmp_path / "out")
    damage.flip_bit(work / FIRST, 8 * (work / FIRST).stat().st_size - 1)
    with pytest.raises(duqpp.CheckpointError, match=f"{FIRST}.*is altered.*remove that file"):
        quantize(model, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
    (work / FIRST).unlink()
    assert quantize(model, tmp_path / "out", resume=True).resumed_blocks == 1
    assert hashes(tmp_path / "out") == uninterrupted()


def test_half_written_files_of_the_killed_job_are_replaced(model, tmp_path, uninterrupted):
    work = interrupted(model, tmp_path / "out")
    (work / f"{THIRD}.partial").write_bytes(b"half a shard")
    (work / "config.json.partial").write_text("{")
    quantize(model, tmp_path / "out", resume=True)
    assert hashes(tmp_path / "out") == uninterrupted()


def test_partial_folder_has_only_whole_shards(model, tmp_path):
    work = interrupted(model, tmp_path / "out", block=3)
    shards = sorted(work.glob("*.safetensors"))
    assert [f.name for f in shards] == [REST, FIRST, SECOND, THIRD]
    for shard in shards:
        decoder.read_shard(shard)
    shutil.rmtree(work)
