"""Distillation: its loss and gradient in float64, and what it does to a tiny model."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import duqpp
import duqpp.methods.refine.distill as module
from duqpp.config import QuantizeConfig
from duqpp.format import ScaleRule
from duqpp.format import quantize as quantize_mxfp4
from duqpp.methods.base import Block, QuantizedModel
from duqpp.methods.refine.distill import distill, divergence, divergence_gradient
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack
from tests import inputs

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

    There are five batches, of four sequences each; where bytes are compared, short ones will do.
    """

    def make(seq_len: int = SHORT):
        monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 4 * seq_len)
        stack = DecoderStack(open_source(str(make_tiny("llama"))))
        tokens = torch.randint(0, 300, (20, seq_len), generator=inputs.generator(1))
        stream = stack.first_inputs(tokens)
        exact, first = stream.first(len(stream.hidden)), stream.first(len(stream.hidden))
        blocks, latents = [], []
        method = CONFIG.build_method()
        for index in range(len(stack)):
            block = Block.of(stack.block(index), index, (), stack.family)
            exact.hidden = list(exact.outputs(block.module, index))
            found = method.quantize_groups(block, stream.first(1)).latents
            stream.hidden = list(stream.outputs(block.module, index))
            blocks.append(block)
            latents.append(found)
        state = tmp_path / "state"
        return QuantizedModel(blocks, latents, first, exact.hidden, stack.head()), state

    return make


def run(job, progress=lambda *_: None):
    model, state = job
    return distill(model, ScaleRule.MSE, state, inputs.generator(5), progress)


def damage(model) -> None:
    """Make every quantized weight a quarter too large, in the codes and in what is trained."""
    for block, own in zip(model.blocks, model.latents, strict=True):
        for name in own:
            own[name] = 1.25 * own[name]
            block.module.get_submodule(name).replace_weight(
                quantize_mxfp4(own[name], rule=ScaleRule.MSE)
            )


def held_divergence(model) -> float:
    hidden = model.inputs.hidden[-1]
    with torch.no_grad():
        for block in model.blocks:
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
    return [block.module.state_dict() for block in model.blocks]


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
    monkeypatch.setattr(module, "_save", lambda _, parameters, *__: saved.append(parameters))
    falling([0.5, 0.4, 0.3, 0.35, 0.4], monkeypatch)
    model, state = job()
    kept = []

    def progress(stage, done, total):
        if done == 2:
            kept.extend(quantize_mxfp4(p.detach(), rule=ScaleRule.MSE) for p in saved[-1].values())

    report = run((model, state), progress)
    assert report == module.DistillReport(0.5, 0.3, steps=4)
    made = [
        block.module.get_submodule(n).weight
        for block, own in zip(model.blocks, model.latents, strict=True)
        for n in own
    ]
    assert len(made) == len(kept)
    for weight, expected in zip(made, kept, strict=True):
        assert torch.equal(weight.codes, expected.codes)
        assert torch.equal(weight.scales, expected.scales)


class Stopped(BaseException):
    pass


def test_what_is_inside_of_blocks_is_made_again_and_changes_nothing(job, monkeypatch):
    """The weights are those of a run that keeps everything; each block runs twice in a step."""
    calls, made = [], []
    for keep in (False, True):
        model, state = job()
        if keep:
            monkeypatch.setattr(module, "checkpoint", lambda f, x, use_reentrant, **k: f(x, **k))
        handle = model.blocks[0].module.register_forward_pre_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        report = run((model, state))
        handle.remove()
        assert sum(calls) == report.steps * (1 if keep else 2)
        calls.clear()
        made.append(states(model))
    assert_same(*made)


@pytest.mark.parametrize("best", ["start", "saved", "end"])
def test_an_interrupted_run_goes_on_from_its_last_state(best, job, monkeypatch):
    """Whichever is the best of the checks: the start, that of the state, or the last."""
    monkeypatch.setattr(module, "CHECK_STEPS", 3)
    divergences = {"start": [0.1, 0.2, 0.2], "saved": [0.3, 0.1, 0.2], "end": [0.3, 0.2, 0.15, 0.1]}
    falling(divergences[best], monkeypatch)
    whole, parts = job(), job()
    assert not whole[-1].exists()
    report = run(whole)
    whole[-1].unlink()

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
