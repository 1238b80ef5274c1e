"""Distillation: its loss and gradient in float64, and what it does to a tiny model."""

import copy
import shutil
import weakref
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import duqpp
import duqpp.methods.refine.distill as module
import duqpp.methods.refine.latent_model as latent_model
from duqpp.checkpoint.shard import read_shard
from duqpp.config import QuantizeConfig
from duqpp.format import ScaleRule
from duqpp.format import quantize as quantize_mxfp4
from duqpp.methods.base import Block, QuantizedModel
from duqpp.methods.refine.distill import distill, divergence, divergence_gradient
from duqpp.methods.refine.training_state import TrainingState
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack
from duqpp.placement import HOST
from duqpp.placement.ranks import ALONE, Ranks
from tests import inputs
from tests.ranks import together

CONFIG = QuantizeConfig(method="duqpp", refine="distill", samples=1, refine_samples=2)
SHORT, LONG = 32, 512  # tokens of a sequence


@pytest.fixture
def head() -> nn.Module:
    """A norm and an lm_head that is no multiple of anything."""
    linear = nn.Linear(24, 301, bias=False)
    linear.weight.data = inputs.gaussian(301, 24, 1)
    return nn.Sequential(nn.RMSNorm(24), linear).requires_grad_(False)


def exact_divergence(hidden: torch.Tensor, exact: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Mean of sum p (log p - log q), in float64."""
    head = copy.deepcopy(head).double()
    p, q = (head(h.double()).softmax(-1) for h in (exact, hidden))
    return (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("shape", [(3, 24), (2, 150, 24), (1, 256, 24)])
def test_the_divergence_and_its_gradient(shape, head):
    """Three of them: less than, more than and just the tokens whose logits are made at a time."""
    rows = torch.Size(shape[:-1]).numel()
    hidden = inputs.gaussian(rows, 24, 2).view(shape)
    exact = hidden + 0.3 * inputs.gaussian(rows, 24, 3).view(shape)
    leaf = hidden.double().requires_grad_()
    expected = exact_divergence(leaf, exact, head)
    expected.backward()
    assert divergence(hidden, exact, head) == pytest.approx(float(expected.detach()), rel=1e-4)
    made = divergence_gradient(hidden, exact, head)
    torch.testing.assert_close(made.double(), leaf.grad, rtol=1e-3, atol=1e-7)
    assert divergence(exact, exact, head) == 0.0
    assert divergence_gradient(exact, exact, head).abs().max() == 0.0


@pytest.fixture
def job(make_tiny, tmp_path, monkeypatch):
    """A quantized model with its latents, and where an interrupted run is kept.

    There are five batches, of four sequences each but for the last one; where bytes are compared,
    short ones will do.
    """

    def make(seq_len: int = SHORT, sequences: int = 20):
        monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 4 * seq_len)
        stack = DecoderStack(open_source(str(make_tiny("llama"))))
        tokens = torch.randint(0, 300, (sequences, seq_len), generator=inputs.generator(1))
        stream = stack.first_inputs(tokens)
        exact, first = stream.first(len(stream.hidden)), stream.first(len(stream.hidden))
        blocks = []
        method = CONFIG.build_method()
        for index in range(len(stack)):
            block = Block.of(stack.block(index), index, (), stack.family)
            exact.hidden = list(exact.outputs(block.module, index))
            found = method.quantize_groups(block, stream.first(1)).latents
            stream.hidden = list(stream.outputs(block.module, index))
            blocks.append((block, found))
        state = tmp_path / "distill.state"
        return QuantizedModel(blocks, first, exact.hidden, stack.head()), state

    return make


def run(job, progress=lambda *_: None):
    """Train the model, and let its blocks have what comes out."""
    model, state = job
    before = [copy.deepcopy(block.module) for block, _ in model.blocks]
    trained = distill(model, ScaleRule.MSE, state, inputs.generator(5), progress)
    for index, codes in enumerate(trained.codes):
        block, latents = model.blocks[index]
        for name, weight in codes.items():
            before[index].get_submodule(name).replace_weight(weight)
        model.blocks[index] = replace(block, module=before[index]), latents
    return trained.report


def damage(model) -> None:
    """Make every quantized weight a quarter too large, in the codes and in what is trained."""
    for block, own in model.blocks:
        for name in own:
            own[name] = 1.25 * own[name]
            block.module.get_submodule(name).replace_weight(
                quantize_mxfp4(own[name], rule=ScaleRule.MSE)
            )


def held_divergence(model) -> float:
    hidden = model.inputs.hidden[-1]
    with torch.no_grad():
        for block, _ in model.blocks:
            out = block.module(hidden, **model.inputs.arguments[-1][block.index])
            hidden = out[0] if isinstance(out, tuple) else out
        return float(exact_divergence(hidden, model.exact[-1], model.head))


def test_it_lowers_the_divergence_on_text_that_it_did_not_train_on(job, monkeypatch):
    """From a start with much to gain: what rounding alone costs this model, a few changed codes
    move by 3 % up or down."""
    model, state = job(LONG)
    damage(model)
    before = held_divergence(model)
    monkeypatch.setattr(module, "_RATE", 1e-2)
    report = run((model, state))
    after = held_divergence(model)
    assert report.improved
    assert after < 0.9 * before
    assert report.divergence_before == pytest.approx(before, rel=1e-2)
    assert report.divergence_after == pytest.approx(after, rel=1e-2)
    assert report.steps == 2 * (len(model.exact) - 1)


def test_what_does_not_help_is_not_kept(job, monkeypatch):
    monkeypatch.setattr(module, "_RATE", 30.0)
    model, state = job(LONG)
    before = copy.deepcopy(states(model))
    report = run((model, state))
    assert not report.improved
    assert_same(states(model), before)


def states(model) -> list[dict[str, torch.Tensor]]:
    """What the shards of a model's blocks would hold."""
    return [block.module.state_dict() for block, _ in model.blocks]


def assert_same(made, expected) -> None:
    for own, other in zip(made, expected, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())


def falling(values, monkeypatch) -> None:
    """Give out these held-back divergences in the place of those measured, at last the same."""
    values = iter(values)
    last = [0.0]

    def next_value(*_) -> float:
        last[0] = next(values, last[0])
        return last[0]

    monkeypatch.setattr(module, "divergence", next_value)


def test_the_best_check_is_kept_and_training_stops_when_two_in_a_row_are_worse(job, monkeypatch):
    """Checks after steps 1, 2, 3 and 4: the second is the best, so 4 of 8 steps are taken."""
    monkeypatch.setattr(module, "CHECK_STEPS", 1)
    saved = []
    monkeypatch.setattr(TrainingState, "save", lambda self: saved.append(self._latents.all_rows))
    falling([0.5, 0.4, 0.3, 0.35, 0.4], monkeypatch)
    model, state = job()
    kept = []

    def progress(stage, done, total):
        if done == 2:
            kept.extend(quantize_mxfp4(p.detach(), rule=ScaleRule.MSE) for p in saved[-1])

    report = run((model, state), progress)
    assert report == module.DistillReport(0.5, 0.3, steps=4)
    made = [block.module.get_submodule(n).weight for block, own in model.blocks for n in own]
    assert len(made) == len(kept)
    for weight, expected in zip(made, kept, strict=True):
        assert torch.equal(weight.codes, expected.codes)
        assert torch.equal(weight.scales, expected.scales)


class Stopped(BaseException):
    pass


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def test_what_is_inside_of_blocks_is_made_again_but_for_products(job, monkeypatch):
    """The weights and the products are those of a run that keeps everything; each block runs twice
    in a step."""
    calls, made, products = [], [], []
    for keep in (False, True):
        model, state = job()
        if keep:
            monkeypatch.setattr(
                latent_model, "checkpoint", lambda f, x, use_reentrant, context_fn, **k: f(x, **k)
            )
        handle = model.blocks[0][0].module.register_forward_pre_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        with Products() as counted:
            report = run((model, state))
        handle.remove()
        assert sum(calls) == report.steps * (1 if keep else 2)
        calls.clear()
        made.append(states(model))
        products.append(counted.count)
    assert_same(*made)
    assert products[0] == products[1] > 0


def test_gradients_and_the_codes_before_are_let_go_of(job, monkeypatch):
    """After every backward pass each latent has had its step, and none has a gradient."""
    model, state = job()
    linears = [
        weakref.ref(block.module.get_submodule(name)) for block, own in model.blocks for name in own
    ]
    seen, codes = [], []

    def backward(*arguments, real=module._backward):
        real(*arguments)
        latents = arguments[1]
        seen.extend(p.grad for p in latents.all_rows)
        seen.extend(p.grad for p in latents._chain.parameters())
        codes.extend(linear() for linear in linears)

    monkeypatch.setattr(module, "_backward", backward)
    distill(model, ScaleRule.MSE, state, inputs.generator(5), lambda *_: None)
    assert len(seen) > 0
    assert len(codes) > 0
    assert not any(kept is not None for kept in (*seen, *codes))


@pytest.mark.parametrize("best", ["start", "saved", "end"])
def test_an_interrupted_run_goes_on_from_its_last_state(best, job, monkeypatch):
    """Whichever is the best of the checks: the start, that of the state, or the last."""
    monkeypatch.setattr(module, "CHECK_STEPS", 3)
    divergences = {"start": [0.1, 0.2, 0.2], "saved": [0.3, 0.1, 0.2], "end": [0.3, 0.2, 0.15, 0.1]}
    falling(divergences[best], monkeypatch)
    whole, parts = job(), job()
    assert not whole[-1].exists()
    report = run(whole)
    for file in whole[-1].parent.glob("distill*"):
        file.unlink()

    def stop(stage, done, total):
        if done == 5:
            raise Stopped

    steps = []
    falling(divergences[best], monkeypatch)
    with pytest.raises(Stopped):
        run(parts, stop)
    # As another process would: from the blocks and latents as they were.
    fresh = job()
    assert fresh[-1].exists()
    falling([divergences[best][0], *divergences[best][2:]], monkeypatch)
    assert run(fresh, lambda stage, done, total: steps.append(done)) == report
    assert steps[0] == 3
    assert_same(states(fresh[0]), states(whole[0]))


def test_a_state_replaces_the_one_before_and_counts_only_if_it_is_whole(job, monkeypatch):
    """Of checks after steps 2, 4 and 6, the second one's state is there; a block's file is not."""
    monkeypatch.setattr(module, "CHECK_STEPS", 2)
    model, state = job()

    def stop(stage, done, total):
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        run((model, state), stop)
    saved = sorted(file.name for file in state.parent.glob("distill*"))
    assert saved == [f"distill-000004-0000{n}.state" for n in range(2)] + ["distill.state"]
    tensors = [read_shard(state.parent / name) for name in saved[:-1]]
    size = sum(tensor.nbytes for own in tensors for tensor in own.values())
    weights = sum(latent.numel() for own in job()[0].blocks for latent in own[1].values())
    assert size / weights in (12, 12 + 17 / 32), (
        "as duqpp.methods.costs says, with codes or without"
    )
    (state.parent / saved[0]).unlink()
    steps = []
    run(job(), lambda stage, done, total: steps.append(done))
    assert steps[0] == 0


# Several ranks: of the held-back batch, which has two sequences, the first of three has none.

RANKS_SEQUENCES = 18


def run_ranks(job, folder, count: int, stop_at: int | None = None) -> list[dict[str, Any]]:
    """What each of so many ranks has of a run, which may be stopped once it has done some steps."""

    def one(ranks: Ranks) -> dict[str, Any]:
        model, state = job
        seen: dict[str, Any] = {"steps": []}

        def progress(stage, done, total):
            seen["steps"].append(done)
            if done == stop_at:
                raise Stopped

        def backward(*arguments, real=module._backward):
            real(*arguments)
            seen["held"] = sum(p.numel() for p in arguments[1].all_rows)
            seen["gradients"] = sum(p.grad is not None for p in arguments[1]._chain.parameters())

        with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
            patch.setattr(module, "_backward", backward)
            seen["report"] = run((replace(model, ranks=ranks), state), progress)
            seen["states"] = states(model)
        return seen

    return together(count, one, folder)


def differing_codes(made, expected) -> float:
    """The share of packed codes that are not those expected; nothing else may differ."""
    differing = total = 0
    for own, other in zip(made, expected, strict=True):
        for name, tensor in own.items():
            if name.endswith("weight_packed"):
                differing += int((tensor != other[name]).sum())
                total += tensor.numel()
            elif not name.endswith("weight_scale"):
                assert torch.equal(tensor, other[name])
    return differing / total


def ever_better(monkeypatch) -> None:
    """Of the held-back divergences take a half, a third and so on: on so small a model the gain is
    not certain."""
    checks = [0]

    def less(*arguments, real=divergence) -> float:
        checks[0] += 1
        return real(*arguments) / checks[0]

    monkeypatch.setattr(module, "divergence", less)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_train_what_one_process_does_and_have_a_part_of_it_each(
    count, job, tmp_path, monkeypatch
):
    """The order of sums alone differs: a few latents that lie at a tie are rounded otherwise."""
    monkeypatch.setattr(module, "_RATE", 3e-3)
    ever_better(monkeypatch)
    model, state = job(sequences=RANKS_SEQUENCES)
    weights = sum(latent.numel() for _, latents in model.blocks for latent in latents.values())
    made = run_ranks((model, state), tmp_path, count)
    before = copy.deepcopy(states(model))
    ever_better(monkeypatch)
    report = run((model, state))
    expected = states(model)
    assert differing_codes(expected, before) > 0.01
    for rank in made:
        assert rank["report"] == made[0]["report"]
        assert_same(rank["states"], made[0]["states"])
        assert rank["gradients"] == 0
        assert rank["held"] <= weights / count * 1.05
        assert rank["report"].steps == report.steps
        for name in ("divergence_before", "divergence_after"):
            found, exact = (getattr(r, name) for r in (rank["report"], report))
            assert found == pytest.approx(exact, rel=1e-3)
    assert sum(rank["held"] for rank in made) == weights
    assert differing_codes(made[0]["states"], expected) < 1e-3


@pytest.mark.parametrize(("first", "second"), [(2, 3), (2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on(first, second, job, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_RATE", 3e-3)
    monkeypatch.setattr(module, "CHECK_STEPS", 3)
    ever_better(monkeypatch)
    begun = job(sequences=RANKS_SEQUENCES)
    run_ranks(begun, tmp_path, first, stop_at=5)
    assert begun[1].exists()
    made = run_ranks(begun, tmp_path, second)
    assert all(rank["steps"][0] == 3 for rank in made)
    for file in begun[1].parent.glob("distill*"):
        file.unlink()
    run(begun)
    assert differing_codes(made[0]["states"], states(begun[0])) < 1e-3


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_rank_has_some_sequences_of_a_batch(count, job):
    model, _ = job()
    whole, exact = model.inputs.hidden[0], model.exact[0]
    parts = [module._part(replace(model, ranks=Ranks(i, count)), 0) for i in range(count)]
    assert sum(part.share for part in parts) == 1
    assert torch.equal(torch.cat([part.hidden for part in parts if part.share]), whole)
    assert torch.equal(torch.cat([part.exact for part in parts if part.share]), exact)
    for part in parts:
        assert len(part.hidden) == len(part.exact) == max(1, round(4 * part.share))
        block, _ = model.blocks[0]
        block.module(part.hidden, **part.arguments[0])


# Through quantize_model.

TOKENS = torch.randint(0, 300, (9, SHORT), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def three_batches(monkeypatch):
    """Of `TOKENS`, one calibrates and two refine."""
    monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 4 * SHORT)


def quantize(model, out, **options):
    return duqpp.quantize_model(str(model), out, CONFIG, calibration=TOKENS, **options)


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_distilled_checkpoint_has_the_files_of_any_other_and_the_trained_codes(
    tiny_llama, tmp_path, monkeypatch, three_batches
):
    blocks = replace(CONFIG, refine="blocks")
    duqpp.quantize_model(str(tiny_llama), tmp_path / "blocks", blocks, calibration=TOKENS)
    monkeypatch.setattr(module, "_RATE", 1e-2)
    falling([0.3, 0.2], monkeypatch)  # on so small a model the gain is not certain
    report = quantize(tiny_llama, tmp_path / "out")
    assert report.distilled.improved
    assert len(report.refined) == 2
    assert files(tmp_path / "out").keys() == files(tmp_path / "blocks").keys()
    before, after = (
        duqpp.from_pretrained(tmp_path / name).state_dict() for name in ("blocks", "out")
    )
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed, "trained codes are in the checkpoint"
    assert all(name.endswith(("weight_packed", "weight_scale")) for name in changed)


@pytest.mark.parametrize("where", ["training", "renaming"])
def test_resume_gives_the_same_bytes(where, tiny_llama, tmp_path, monkeypatch, three_batches):
    import duqpp.job.distillation as shards

    monkeypatch.setattr(module, "CHECK_STEPS", 1)
    quantize(tiny_llama, tmp_path / "whole")

    def stop_training(stage, done, total):
        if (stage, done) == ("distill", 2):
            raise Stopped

    def stop_renaming(source, target, replace=shards.os.replace):
        if str(source).endswith(".distilled") and "00003" in str(source):
            raise Stopped
        replace(source, target)

    out = tmp_path / "out"
    with pytest.raises(Stopped), monkeypatch.context() as patch:
        if where == "renaming":
            patch.setattr(shards.os, "replace", stop_renaming)
        quantize(tiny_llama, out, progress=stop_training if where == "training" else None)
    assert not out.exists()
    quantize(tiny_llama, out, resume=True)
    whole = files(tmp_path / "whole")
    found = files(out)
    assert found.keys() == whole.keys()
    assert [name for name in found if found[name] != whole[name]] == []


def test_a_job_is_distilled_alike_by_any_number_of_ranks(tiny_llama, tmp_path, monkeypatch):
    """Five batches, of which two calibrate. Two ranks begin; one or both of them distil."""
    monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 2 * SHORT)
    monkeypatch.setattr(module, "_RATE", 3e-3)
    ever_better(monkeypatch)
    config = replace(CONFIG, samples=4, refine_samples=9)

    def work(out, ranks=ALONE, **options):
        options |= {"calibration": TOKENS, "device": HOST, "ranks": ranks}
        return duqpp.quantize_model(str(tiny_llama), out, config, **options).distilled

    def stop(stage, done, total):
        if stage == "distill":
            raise Stopped

    def begin(ranks: Ranks) -> None:
        with suppress(Stopped):
            work(tmp_path / "alone", ranks, progress=stop)

    together(2, begin, tmp_path)
    shutil.copytree(tmp_path / "alone.partial", tmp_path / "shared.partial")
    shared = together(2, lambda ranks: work(tmp_path / "shared", ranks, resume=True), tmp_path)
    alone = work(tmp_path / "alone", resume=True)
    assert shared[0] == shared[1]
    assert shared[0].divergence_before == pytest.approx(alone.divergence_before, rel=1e-3)
    assert shared[0].divergence_after == pytest.approx(alone.divergence_after, rel=1e-3)
    made, expected = (
        duqpp.from_pretrained(tmp_path / name).state_dict() for name in ("shared", "alone")
    )
    assert differing_codes([made], [expected]) < 1e-3
