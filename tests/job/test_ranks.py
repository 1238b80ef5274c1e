"""A job on several ranks gives what one process gives, ends as one, and resumes on any number."""

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed import run as torchrun

import duqpp
from duqpp.checkpoint.shard import read_json
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.job import agreement
from duqpp.job.companions import REPORT_FILE
from duqpp.methods import sequential
from duqpp.models import stack
from duqpp.placement import HOST
from duqpp.placement.ranks import ALONE, Ranks, joined
from tests import decoder
from tests.forked import Forked, duqpp_command
from tests.ranks import ForkedRanks

SEQUENCES, LENGTH, BATCH = 19, 48, 2  # ten batches, the last of one sequence
TOKENS = torch.randint(0, 300, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
PARTLY = {"samples": 9, "refine_samples": SEQUENCES}
# By name: the options, and whether a sum over tokens decides anything.
CASES = {
    "rtn": ({"method": "rtn"}, False),
    "random, smoothed": ({"method": "random", "smooth_alpha": 0.5}, False),
    "duquant++": ({"max_steps": 8}, False),
    "duquant, GPTQ": ({"method": "duquant", "max_steps": 8, "gptq": True}, True),
    "hadamard, GPTQ of rounded inputs": (
        {"method": "hadamard", "gptq": True, "hessian": "quantized", "smooth_alpha": 0.5},
        True,
    ),
    "duqpp": ({"method": "duqpp"}, True),
    "duqpp on float inputs": (
        {"method": "duqpp", "hessian": "float", "next_inputs": "float"},
        True,
    ),
    "learned": ({"method": "learned"}, True),
    "duqpp, blocks": ({"method": "duqpp", "refine": "blocks", **PARTLY}, True),
}
ON_THREE = ("duquant, GPTQ", "duqpp", "duqpp, blocks")  # which have all that ranks share
RUNS = [(name, 2) for name in CASES] + [(name, 3) for name in CASES if name in ON_THREE]
TIES = 1e-3  # of the codes, at most, may lie so near to a tie that the order of a sum decides


@pytest.fixture(scope="module", autouse=True)
def _small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "TOKENS_PER_BATCH", BATCH * LENGTH)
        yield


def quantize(model: Path, out: Path, ranks: Ranks = ALONE, **options) -> None:
    call = {k: options.pop(k) for k in ("resume", "calibration") if k in options}
    config = QuantizeConfig(**options)
    call = {"calibration": TOKENS, "device": HOST, "ranks": ranks} | call
    duqpp.quantize_model(str(model), out, config, **call)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@contextmanager
def latents_kept(folder: Path) -> Iterator[None]:
    """Let each block's latents be saved once they are refined."""
    folder.mkdir()
    real = sequential.refine_block

    def refine_block(block, *arguments, **options):
        report, latents = real(block, *arguments, **options)
        torch.save(latents, folder / f"{block.index}.pt")
        return report, latents

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequential, "refine_block", refine_block)
        yield


@pytest.fixture(scope="module")
def outputs(tiny_llama, tmp_path_factory) -> Path:
    """A folder with the outputs of all cases: "CASE" of one process, "CASE on 2" of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    with latents_kept(folder / "latents of 0 on 1"):
        for name, (options, _) in CASES.items():
            quantize(tiny_llama, folder / name, **options)

    def on(count: int) -> Callable[[int], None]:
        def run(rank: int) -> None:
            with joined(HOST) as ranks, latents_kept(folder / f"latents of {rank} on {count}"):
                for name, (options, _) in CASES.items():
                    if count == 2 or name in ON_THREE:
                        quantize(tiny_llama, folder / f"{name} on {count}", ranks, **options)

        return run

    for count in (2, 3):
        assert ForkedRanks(count, on(count)).wait() == [0] * count
    return folder


@pytest.mark.parametrize(("name", "count"), RUNS)
def test_ranks_give_the_codes_of_one_process(name, count, outputs):
    alone, shared = outputs / name, outputs / f"{name} on {count}"
    if not CASES[name][1]:
        assert hashes(shared) == hashes(alone)
        return
    expected, found = (decoder.Checkpoint(folder).data for folder in (alone, shared))
    assert found.keys() == expected.keys()
    packed = [name for name in expected if name.endswith("weight_packed")]
    pairs = [pair for name in packed for pair in zip(found[name], expected[name], strict=True)]
    assert sum(a != b for a, b in pairs) <= TIES * len(pairs)


@pytest.mark.parametrize("count", [2, 3])
def test_blocks_are_refined_in_the_steps_of_one_process(count, outputs):
    """Nine of ten batches train, whichever rank has them."""
    alone, shared = (
        read_json(outputs / f"duqpp, blocks{on}" / REPORT_FILE)["refined"]
        for on in ("", f" on {count}")
    )
    assert [block["steps"] for block in shared] == [9, 9]
    for own, expected in zip(shared, alone, strict=True):
        assert own == pytest.approx(expected, rel=1e-3)
    assert any(block["loss_after"] < block["loss_before"] for block in shared)


@pytest.mark.parametrize("count", [2, 3])
def test_all_ranks_refine_to_the_same_latents(count, outputs):
    """Bit by bit; and to those of one process, whose transforms are the same but for ties."""
    for block in ("0.pt", "1.pt"):
        first, *others = (
            torch.load(outputs / f"latents of {rank} on {count}" / block) for rank in range(count)
        )
        assert len(first) == 7
        alone = torch.load(outputs / "latents of 0 on 1" / block)
        for latents in (*others, alone):
            assert latents.keys() == first.keys()
        for name, latent in first.items():
            assert all(torch.equal(latents[name], latent) for latents in others)
            assert (alone[name] - latent).norm() <= 1e-3 * latent.norm()


def command(model: Path, out: Path, *options: str) -> Callable[[], object]:
    arguments = ("--device", "cpu", "--method", "duqpp", "--samples", "8", "--seq-len", "48")
    return duqpp_command("quantize", str(model), str(out), *arguments, *options)


def ended(
    count: int, function: Callable[[int], object], folder: Path
) -> tuple[list[int], list[str]]:
    """The exit codes of ranks, and the lines that they have printed on stderr, all together."""
    path = folder / "stderr.txt"
    with open(path, "a+b") as stderr, open(os.devnull, "wb") as nowhere:
        ranks = ForkedRanks(count, function, (None, nowhere.fileno(), stderr.fileno()))
        codes = ranks.wait(40)
    return codes, path.read_text().splitlines()


def in_block(index: int, action: Callable[[], None]) -> None:
    """Do something when a job is about to read a decoder block."""
    real = stack.DecoderStack.block

    def block(self: stack.DecoderStack, of: int, *weights: object) -> torch.nn.Module:
        if of == index:
            action()
        return real(self, of, *weights)

    stack.DecoderStack.block = block


@pytest.fixture(scope="module")
def three_blocks(make_tiny) -> Path:
    return make_tiny("llama", num_hidden_layers=3)


def test_a_killed_rank_ends_the_job_which_resumes_on_any_number(three_blocks, tmp_path):
    def run(rank: int) -> None:
        if rank == 1:
            in_block(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
        command(three_blocks, tmp_path / "out")()

    codes, lines = ended(2, run, tmp_path)
    assert codes[1] == -signal.SIGKILL and codes[0] == 2
    assert len(lines) == 1, lines
    assert re.fullmatch(
        r"error: another rank has ended: .*; continue with --resume, or remove .*", lines[0]
    )
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    assert len(list(partial.glob("model-0000[234]-of-00004.safetensors"))) == 1
    assert Forked(command(three_blocks, tmp_path / "alone")).wait() == 0
    for count in (1, 3):
        out = tmp_path / f"on {count}"
        shutil.copytree(partial, out.with_name(out.name + ".partial"))
        resumed = command(three_blocks, out, "--resume")
        if count == 1:
            assert Forked(resumed).wait() == 0
        else:
            assert ended(count, lambda _, run=resumed: run(), tmp_path)[0] == [0] * count
        assert hashes(out) == hashes(tmp_path / "alone")


@pytest.mark.parametrize(
    ("own", "what"),
    [
        (["--seed", "1"], r"rank 1 has another calibration and configuration \(seed\) than rank 0"),
        (["--samples", "9"], r"rank 1 has another calibration and configuration \(samples\) than"),
        (["--damping", "0.5"], r"rank 1 has another configuration \(damping\) than rank 0"),
    ],
)
def test_ranks_that_disagree_are_told_so_in_one_line(own, what, three_blocks, tmp_path):
    def run(rank: int) -> None:
        command(three_blocks, tmp_path / "out", *(own if rank == 1 else []))()

    codes, lines = ended(2, run, tmp_path)
    assert sorted(codes) == [1, 2]
    assert len(lines) == 1 and re.match(f"error: {what}", lines[0]), lines
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_ranks_do_not_share_is_an_error_and_leaves_nothing(
    three_blocks, tmp_path, monkeypatch
):
    monkeypatch.setattr(agreement, "_PATIENCE", 0.3)

    def run(rank: int) -> None:
        (tmp_path / str(rank)).mkdir()
        command(three_blocks, tmp_path / str(rank) / "out")()

    codes, lines = ended(2, run, tmp_path)
    assert codes == [1, 2]
    assert len(lines) == 1 and re.match(r"error: rank 1 on \S+ does not see .*1/out", lines[0]), (
        lines
    )
    assert not list(tmp_path.glob("*/out*"))


def test_an_error_of_one_rank_is_the_error_of_all_and_leaves_nothing(three_blocks, tmp_path):
    def fail() -> None:
        raise InputError("a tensor is damaged")

    def run(rank: int) -> None:
        if rank == 1:
            in_block(0, fail)
        command(three_blocks, tmp_path / "out")()

    assert ended(2, run, tmp_path) == ([1, 2], ["error: a tensor is damaged"])
    assert not list(tmp_path.glob("out*"))


def test_ctrl_c_ends_all_ranks_with_one_line_that_says_how_to_go_on(three_blocks, tmp_path):
    """torchrun sends it to every rank: here the one that waits for the other gets it too."""

    def run(rank: int) -> None:
        if rank == 1:
            in_block(1, lambda: os.kill(os.getpid(), signal.SIGINT))
        command(three_blocks, tmp_path / "out")()

    codes, lines = ended(2, run, tmp_path)
    assert sorted(codes) == [1, 130]
    start = "interrupted: go on at the last whole block with torchrun ... -m duqpp quantize "
    assert len(lines) == 1 and lines[0].startswith(start) and "--resume" in lines[0], lines


def test_more_ranks_than_batches_are_refused(three_blocks, tmp_path):
    run = command(three_blocks, tmp_path / "out", "--samples", "2")
    codes, lines = ended(2, lambda _: run(), tmp_path)
    assert sorted(codes) == [1, 2]
    assert lines == [
        "error: 2 ranks need 3 calibration sequences, 2 a batch, and there are 2: start fewer "
        "ranks, or raise --samples (with --refine: --refine-samples)"
    ]
    assert not list(tmp_path.glob("out*"))


def test_other_commands_are_refused_in_one_line(three_blocks, tmp_path):
    run = duqpp_command("inspect", str(three_blocks))
    codes, lines = ended(2, lambda _: run(), tmp_path)
    assert codes == [2, 2]
    assert lines == ["error: duqpp inspect is one process: start it without torchrun"]


def test_torchrun_starts_a_job(tiny_llama, tmp_path):
    """The one test with new processes, which take seconds to import torch."""
    out = tmp_path / "out"
    options = ["--device", "cpu", "--method", "hadamard", "--gptq", "--samples", "9"]
    options += ["--seq-len", "512", "--json"]  # batches of four

    def run() -> None:
        arguments = ["--standalone", "--nproc-per-node", "2", "-m", "duqpp"]
        torchrun.main([*arguments, "quantize", str(tiny_llama), str(out), *options])

    with open(tmp_path / "stdout.txt", "wb") as stdout:
        assert Forked(run, (None, stdout.fileno(), None)).wait() == 0
    assert json.loads((tmp_path / "stdout.txt").read_text())["out"] == str(out), "printed once"
    assert (out / "config.json").exists()
