"""Interrupted quantization: killed at any point, it resumes to the same bytes, or says why not."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import duqpp
from duqpp.checkpoint.layout import quantized_block
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.job import folder as job_folder
from duqpp.models.source import SafetensorsSource
from duqpp.nn import MXFP4Linear
from tests import decoder
from tests.checkpoint import damage
from tests.forked import Forked
from tests.second_device import second_device

TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
OPTIONS = {"max_steps": 8, "gptq": True}
LAYERS = 4
REST, FIRST, SECOND, THIRD, FOURTH = (f"model-0000{i}-of-00005.safetensors" for i in range(1, 6))


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


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory):
    """Leave behind the partial folder of a job that ended in `block`; it returns that folder.

    Jobs of the same model and options are run once, and their folder copied.
    """
    known = {}

    def run(model: Path, out: Path, block: int = 2, **options) -> Path:
        key = json.dumps([str(model), block, options], sort_keys=True)
        if key not in known:
            elsewhere = tmp_path_factory.mktemp("interrupted") / "out"
            with pytest.raises(Stopped):
                quantize(model, elsewhere, progress=stop_in_block(block), **options)
            known[key] = elsewhere.with_name("out.partial")
        return damage.copy_of(known[key], out.with_name(out.name + ".partial"))

    return run


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

    def stay(stage: str, done: int, total: int) -> None:
        """In that block, so that a kill finds the job in it however slow the machine is."""
        while (stage, done) == ("quantize", block):
            time.sleep(60)

    job = Forked(lambda: quantize(model, out, progress=stay))
    last = (FIRST, SECOND, THIRD, FOURTH)[block - 1]
    deadline = time.monotonic() + 120
    while not (work / last).with_suffix(".json").exists():  # which follows the shard
        assert not job.has_ended(), "the job ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.kill()
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
        {"method": "duqpp"},
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
        "duqpp float inputs",
        "refined",
    ],
)
def test_resume_gives_the_same_bytes(options, model, tmp_path, uninterrupted, interrupted):
    out = tmp_path / "out"
    interrupted(model, out, **options)
    report = quantize(model, out, resume=True, **options)
    assert report.resumed_blocks == 2
    assert len(report.groups) == (3 if "skip" in options else 4) * LAYERS
    assert hashes(out) == uninterrupted(**options)


def test_resume_of_a_bfloat16_model(model, tmp_path, interrupted):
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
def test_resume_before_the_first_and_after_the_last_block(
    block, model, tmp_path, uninterrupted, interrupted
):
    out = tmp_path / "out"
    interrupted(model, out, block=block)
    assert quantize(model, out, resume=True).resumed_blocks == block
    assert hashes(out) == uninterrupted()


def test_resume_without_anything_to_resume(model, tmp_path, uninterrupted):
    assert quantize(model, tmp_path / "out", resume=True).resumed_blocks == 0
    assert hashes(tmp_path / "out") == uninterrupted()


def test_interrupted_twice(model, tmp_path, uninterrupted, interrupted):
    out = tmp_path / "out"
    interrupted(model, out, block=1)
    with pytest.raises(Stopped):
        quantize(model, out, resume=True, progress=stop_in_block(3))
    assert quantize(model, out, resume=True).resumed_blocks == 3
    assert hashes(out) == uninterrupted()


@pytest.mark.parametrize("call", ["replace", "unlink"])
def test_stopped_at_any_file_operation(call, model, tmp_path, uninterrupted, monkeypatch):
    """Every place between two file operations is one where the machine may be switched off.

    Afterwards the output is whole, or resuming makes it so; a stop is never answered by an error.
    One before a file is synced is one before it is renamed.
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
    assert number > {"replace": 10, "unlink": 5}[call]


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


# Files: job, config.json; what is outside the blocks, then each: and a record.
@pytest.mark.parametrize(("nth", "finished"), [(9, 2), (12, 3)])
def test_full_disk_keeps_what_is_finished(
    nth, finished, model, tmp_path, uninterrupted, monkeypatch
):
    fsync, calls = os.fsync, []

    def full_at_the_nth(descriptor):
        calls.append(descriptor)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(descriptor)

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", full_at_the_nth)
    with pytest.raises(InputError, match=r"out\.partial: No space left on device; .*`resume=True`"):
        quantize(model, out)
    assert quantize(model, out, resume=True).resumed_blocks == finished
    assert hashes(out) == uninterrupted()


def test_a_partial_folder_is_not_continued_unasked(model, tmp_path, interrupted):
    work = interrupted(model, tmp_path / "out")
    before = hashes(work)
    with pytest.raises(InputError, match=r"out\.partial holds an unfinished job.*`resume=True`"):
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
def test_refuses_another_model(change, model, tmp_path, interrupted):
    source, out = damage.copy_of(model, tmp_path / "model"), tmp_path / "out"
    work = interrupted(source, out)
    before = hashes(work)
    other = damage.copy_of(model, tmp_path / "other")
    change(other)
    with pytest.raises(InputError, match="unfinished job of another model; remove it"):
        quantize(other, out, resume=True)
    assert hashes(work) == before
    quantize(source, out, resume=True)


def test_resumes_a_model_that_was_moved(model, tmp_path, interrupted):
    interrupted(model, tmp_path / "out")
    moved = damage.copy_of(model, tmp_path / "somewhere else")
    assert quantize(moved, tmp_path / "out", resume=True).resumed_blocks == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"calibration": TOKENS.roll(1)}, "calibration"),
        ({"calibration": TOKENS[:1]}, "calibration"),
        ({"calibration": TOKENS.flip(1)}, "calibration"),
        ({"seed": 1}, "configuration (seed)"),
        ({"gptq": False}, "configuration (gptq)"),
        ({"method": "hadamard"}, "configuration (method, smooth_alpha)"),
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
def test_refuses_another_job(change, named, model, tmp_path, interrupted):
    work = interrupted(model, tmp_path / "out")
    before = hashes(work)
    with pytest.raises(InputError, match=re.escape(f"job of another {named}; remove it")):
        quantize(model, tmp_path / "out", resume=True, **change)
    assert hashes(work) == before, "another job's folder was touched"
    assert not (tmp_path / "out").exists()


def test_refuses_another_version(model, tmp_path, monkeypatch, interrupted):
    interrupted(model, tmp_path / "out")
    monkeypatch.setattr(job_folder, "__version__", "0.0.0")
    with pytest.raises(InputError, match="another version"):
        quantize(model, tmp_path / "out", resume=True)


def test_refuses_a_folder_that_is_no_job(model, tmp_path):
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="remove it, or choose another output folder"):
        quantize(model, tmp_path / "out", resume=True)
    assert [f.name for f in work.iterdir()] == ["notes.txt"]


def test_finished_blocks_are_verified(model, tmp_path, uninterrupted, interrupted):
    """A flipped bit in a finished shard is not carried into the result, nor is the rest lost."""
    work = interrupted(model, tmp_path / "out")
    damage.flip_bit(work / FIRST, 8 * (work / FIRST).stat().st_size - 1)
    with pytest.raises(duqpp.CheckpointError, match=f"{FIRST}.*is altered.*remove that file"):
        quantize(model, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
    (work / FIRST).unlink()
    assert quantize(model, tmp_path / "out", resume=True).resumed_blocks == 1
    assert hashes(tmp_path / "out") == uninterrupted()


DISTILL = {"method": "duqpp", "refine": "distill", "samples": 1, "refine_samples": 2}


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        (SECOND.replace("safetensors", "json"), "{", {}),
        (SECOND.replace("safetensors", "json"), "{}", {}),
        (SECOND.replace("safetensors", "json"), '{"groups": [{"a": 1}], "refined": []}', {}),
        (SECOND.replace("safetensors", "latents"), None, DISTILL),
        (REST, None, {}),
    ],
    ids=["report", "empty report", "another report", "latents", "rest"],
)
def test_a_damaged_file_is_removed_and_made_again_as_the_line_says(
    name, content, options, model, tmp_path, uninterrupted, interrupted
):
    """None: a flipped bit."""
    out = tmp_path / "out"
    work = interrupted(model, out, block=3, **options)
    if content is None:
        damage.flip_bit(work / name, 8 * (work / name).stat().st_size - 1)
    else:
        (work / name).write_text(content)
    with pytest.raises(duqpp.CheckpointError) as raised:
        quantize(model, out, resume=True, **options)
    assert str(work / name) in str(raised.value)
    assert str(raised.value).endswith("; remove that file, and continue with `resume=True`")
    (work / name).unlink()
    report = quantize(model, out, resume=True, **options)
    assert len(report.groups) == 4 * LAYERS
    assert hashes(out) == uninterrupted(**options)


@pytest.mark.parametrize("name", ["a shard", "the report"])
def test_a_file_damaged_after_distillation_is_made_again(name, model, tmp_path, monkeypatch):
    """Behind distilled blocks a block would not get the same bytes: all are made again."""
    out, work = tmp_path / "out", tmp_path / "out.partial"
    falling = itertools.count(0, -1)  # so that what was trained is kept
    monkeypatch.setattr("duqpp.methods.refine.distill.divergence", lambda *_: float(next(falling)))
    monkeypatch.setattr("duqpp.methods.refine.distill._RATE", 3e-2)

    def stop(*_):
        raise Stopped

    with pytest.raises(Stopped), monkeypatch.context() as patch:
        patch.setattr("duqpp.job.quantize.write_companions", stop)
        quantize(model, out, **DISTILL)
    expected = {n: digest for n, digest in hashes(work).items() if n.endswith(".safetensors")}
    if name == "a shard":
        file = work / THIRD
        damage.flip_bit(file, 8 * file.stat().st_size - 1)
    else:
        file = work / "model-distilled.json"
        file.write_text("{}")
    with pytest.raises(duqpp.CheckpointError, match=f"{file.name}.*; remove that file"):
        quantize(model, out, resume=True, **DISTILL)
    file.unlink()
    with pytest.raises(Stopped):  # trained blocks of before must not feed those behind them
        quantize(model, out, resume=True, progress=stop_in_block(1), **DISTILL)
    quantize(model, out, resume=True, **DISTILL)
    assert expected.items() <= hashes(out).items()


def altered_seed(text: str) -> str:
    return text.replace('"seed": 0', '"seed": 1')


@pytest.mark.parametrize(
    "damage_text",
    [lambda text: "{", lambda text: "", lambda text: text[:300], lambda text: "[]", altered_seed],
    ids=["brace", "empty", "cut", "list", "altered"],
)
def test_a_damaged_job_file_costs_no_block(
    damage_text, model, tmp_path, uninterrupted, interrupted
):
    """The records of the blocks say whose they are, and another job is still refused."""
    out, work = tmp_path / "out", interrupted(model, tmp_path / "out")
    file = work / "duqpp-job.json"
    text = file.read_text()
    file.write_text(damage_text(text))
    assert file.read_text() != text
    before = hashes(work)
    with pytest.raises(duqpp.CheckpointError, match=r"duqpp-job\.json.*; remove .*out\.partial"):
        quantize(model, out, resume=True, seed=1)
    assert hashes(work) == before
    assert quantize(model, out, resume=True).resumed_blocks == 2
    assert hashes(out) == uninterrupted()


def test_a_job_file_that_is_lost_costs_no_block(model, tmp_path, uninterrupted, interrupted):
    work = interrupted(model, tmp_path / "out")
    (work / "duqpp-job.json").unlink()
    with pytest.raises(InputError, match=r"out\.partial is the unfinished job of another model"):
        quantize(model, tmp_path / "out", resume=True, seed=1)
    assert quantize(model, tmp_path / "out", resume=True).resumed_blocks == 2
    assert hashes(tmp_path / "out") == uninterrupted()


def test_a_damaged_job_file_without_a_block_is_an_error(model, tmp_path, interrupted):
    work = interrupted(model, tmp_path / "out")
    (work / "duqpp-job.json").write_text("{")
    for record in work.glob("model-*.json"):
        record.unlink()
    with pytest.raises(duqpp.CheckpointError, match=r"is not valid JSON.*; remove .*out\.partial"):
        quantize(model, tmp_path / "out", resume=True)


def improved_report(work: Path, other: Path) -> Path:
    """Better than it was: the card would say so."""
    record = work / SECOND.replace("safetensors", "json")

    def improve(values: dict) -> None:
        values["groups"][0]["weight_error"] /= 2

    damage.edit_json(record, improve)
    return record


def others(*names: str):
    """Files of another job of the same model, in the place of this one's."""

    def bring(work: Path, other: Path) -> Path:
        for name in names:
            shutil.copyfile(other / name, work / name)
        return work / names[-1]

    return bring


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (improved_report, "is altered"),
        (others(SECOND), "is not the file that model-00003-of-00005.json names"),
        (others(SECOND.replace("safetensors", "json")), "is of another job"),
        (others(SECOND, SECOND.replace("safetensors", "json")), "is of another job"),
        (others(REST.replace("safetensors", "json")), "is of another job"),
    ],
    ids=["altered report", "shard", "report", "shard and report", "rest"],
)
def test_what_is_not_of_the_job_does_not_reach_the_checkpoint(
    change, message, model, tmp_path, uninterrupted, interrupted
):
    """Neither numbers that the card gives, nor codes that another seed made."""
    (tmp_path / "other").mkdir()
    options = {"method": "random", "gptq": False}
    other = interrupted(model, tmp_path / "other" / "out", seed=7, **options)
    work = interrupted(model, tmp_path / "out", **options)
    file = change(work, other)
    with pytest.raises(duqpp.CheckpointError, match=f"{message}.*; remove that file") as raised:
        quantize(model, tmp_path / "out", resume=True, **options)
    assert str(raised.value).startswith(str(file))
    file.unlink()
    quantize(model, tmp_path / "out", resume=True, **options)
    assert hashes(tmp_path / "out") == uninterrupted(**options)


def test_an_error_keeps_what_is_finished(model, tmp_path, uninterrupted, monkeypatch):
    """Such as a source that cannot be read for a moment: the message says how to go on."""
    out, work = tmp_path / "out", tmp_path / "out.partial"
    tensor = SafetensorsSource.tensor

    def unreadable(self, name):
        if name.startswith("model.layers.2."):
            raise InputError(f"cannot read {name}")
        return tensor(self, name)

    def run(**options):
        quantize(model, out, **options)

    # The fingerprint reads all tensors as well, before any work.
    monkeypatch.setattr("duqpp.job.folder.fingerprint", lambda source: "the model")
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsSource, "tensor", unreadable)
        for resume in (False, True):
            with pytest.raises(InputError) as raised:
                run(resume=resume)
            message = str(raised.value)
            assert message.startswith("cannot read model.layers.2.")
            assert message.endswith(f"; continue with `resume=True`, or remove {work}")
            assert (work / SECOND).exists()
    run(resume=True)
    expected, made = uninterrupted(), hashes(out)
    # config.json names the job, and this one's model has another fingerprint.
    named = {"config.json", "duqpp-manifest.json"}
    assert {name for name in expected if made[name] != expected[name]} == named


def test_a_wrong_backend_keeps_what_is_finished(
    model, tmp_path, uninterrupted, monkeypatch, interrupted
):
    work = interrupted(model, tmp_path / "out")
    before = hashes(work)
    with monkeypatch.context() as patch:
        patch.setenv("DUQPP_BACKEND", "cpuu")
        with pytest.raises(duqpp.BackendUnavailableError):
            quantize(model, tmp_path / "out", resume=True)
    assert hashes(work) == before
    assert quantize(model, tmp_path / "out", resume=True).resumed_blocks == 2
    assert hashes(tmp_path / "out") == uninterrupted()


def test_a_name_that_cannot_be_given_is_an_error_of_one_line(
    model, tmp_path, uninterrupted, monkeypatch
):
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "out":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(InputError, match=r"cannot rename .*out\.partial to .*`resume=True`"):
            quantize(model, tmp_path / "out")
    assert quantize(model, tmp_path / "out", resume=True).resumed_blocks == LAYERS
    assert hashes(tmp_path / "out") == uninterrupted()


def test_an_output_that_was_filled_meanwhile_stays(model, tmp_path):
    out = tmp_path / "out"

    def fill(stage, done, total):
        if (stage, done) == ("quantize", total):
            out.mkdir()
            (out / "mine.txt").write_text("precious")

    with pytest.raises(InputError, match=r"cannot rename .* to .*out: Directory not empty"):
        quantize(model, out, progress=fill)
    assert (out / "mine.txt").read_text() == "precious"
    assert (tmp_path / "out.partial" / FOURTH).exists()


def test_what_cannot_be_removed_from_a_whole_output_is_only_a_warning(
    model, tmp_path, uninterrupted, monkeypatch, caplog
):
    def refuse(self, missing_ok=False, unlink=Path.unlink):
        if self.name == "duqpp-job.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    quantize(model, tmp_path / "out")
    assert uninterrupted().items() <= hashes(tmp_path / "out").items()
    assert "duqpp-job.json is no longer needed, but stays: Permission denied" in caplog.text


def test_two_jobs_do_not_work_in_one_folder(model, tmp_path, uninterrupted):
    """Neither does the second touch it, nor is it told to remove it; the first one goes on."""
    out, work, messages = tmp_path / "out", tmp_path / "out.partial", []

    def again(stage, done, total):
        if (stage, done) == ("quantize", 2):
            record = (work / SECOND).with_suffix(".json")  # of block 1, which is being written
            while not record.exists():
                time.sleep(0.01)
            before = hashes(work)
            for resume in (False, True):
                with pytest.raises(InputError) as raised:
                    quantize(model, out, resume=resume, seed=1)
                messages.append(str(raised.value))
            assert hashes(work) == before

    quantize(model, out, progress=again)
    assert messages == [f"another process is working in {work}: let it finish"] * 2
    assert hashes(out) == uninterrupted()


def test_two_jobs_that_start_together(model, tmp_path, uninterrupted):
    """The folder is not there yet when the second one looks for it; the output is, afterwards."""
    out, errors = tmp_path / "out", []

    def slow(stage, done, total):
        """Of the second job: the first one begins and goes on to its end."""
        if stage == "fingerprint":
            quantize(model, out, progress=fast)

    def fast(stage, done, total):
        if (stage, done) == ("quantize", 1):
            with pytest.raises(InputError, match="another process is working in") as raised:
                quantize(model, out)
            errors.append(raised.value)

    with pytest.raises(InputError, match="out exists and is not an empty folder"):
        quantize(model, out, progress=slow)
    assert len(errors) == 1
    assert not (tmp_path / "out.partial").exists()
    assert hashes(out) == uninterrupted()


def test_the_lock_goes_with_the_job(model, tmp_path):
    """Also when it ended by an error or an interruption."""
    with pytest.raises(Stopped) as raised:
        quantize(model, tmp_path / "out", progress=stop_in_block(1))
    quantize(model, tmp_path / "out", resume=True)
    assert raised.value.__traceback__ is not None  # which keeps the frames of the first job


def test_the_shape_of_tokens_is_part_of_the_job(model, tmp_path, interrupted):
    interrupted(model, tmp_path / "out")
    with pytest.raises(InputError, match="unfinished job of another calibration; remove it"):
        quantize(model, tmp_path / "out", resume=True, calibration=TOKENS.view(4, 24))


def test_tokens_on_another_device(model, tmp_path, uninterrupted):
    with second_device() as device:
        quantize(model, tmp_path / "out", calibration=TOKENS.to(device))
    assert hashes(tmp_path / "out") == uninterrupted()


@pytest.mark.parametrize("options", [{}, DISTILL], ids=["plain", "distilled"])
def test_finished_blocks_behind_the_last_one_to_make_are_not_run(
    options, model, tmp_path, uninterrupted, monkeypatch, interrupted
):
    """Only those before it are: one block is missing in the middle; then none is.

    Distillation, which comes after them, reads each once.
    """
    out = tmp_path / "out"
    work = interrupted(model, out, block=4, **options)
    (work / SECOND).unlink()
    loaded = []

    def load(stack, index, *rest, real=quantized_block):
        loaded.append(index)
        block = real(stack, index, *rest)
        for module in block.modules():
            if isinstance(module, MXFP4Linear):
                assert module._prepared is not None
        return block

    monkeypatch.setattr("duqpp.job.blocks.quantized_block", load)
    with pytest.raises(Stopped):
        quantize(model, out, resume=True, progress=stop_in_block(LAYERS), **options)
    assert loaded == [0]
    assert quantize(model, out, resume=True, **options).resumed_blocks == LAYERS
    assert loaded == [0, *(range(LAYERS) if options else [])]
    assert hashes(out) == uninterrupted(**options)


def test_half_written_files_of_the_killed_job_are_replaced(
    model, tmp_path, uninterrupted, interrupted
):
    work = interrupted(model, tmp_path / "out")
    (work / f"{THIRD}.partial").write_bytes(b"half a shard")
    (work / "config.json.partial").write_text("{")
    quantize(model, tmp_path / "out", resume=True)
    assert hashes(tmp_path / "out") == uninterrupted()


def test_partial_folder_has_only_whole_shards(model, tmp_path, interrupted):
    work = interrupted(model, tmp_path / "out", block=3)
    shards = sorted(work.glob("*.safetensors"))
    assert [f.name for f in shards] == [REST, FIRST, SECOND, THIRD]
    for shard in shards:
        decoder.read_shard(shard)
    shutil.rmtree(work)
