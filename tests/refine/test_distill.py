"""Distillation: its loss and gradient in float64, and what it does to a tiny model."""

import copy

import pytest
import torch
from torch import nn

import duqpp
import duqpp.refine.distill as module
from duqpp.config import QuantizeConfig
from duqpp.models.llama import DecoderStack
from duqpp.models.source import open_source
from duqpp.quantize_block import layout_of
from duqpp.refine.distill import distill, divergence, divergence_gradient
from duqpp.sequential import quantize_sequentially
from tests import inputs

CONFIG = QuantizeConfig(method="duqpp", refine="distill", samples=1, refine_samples=2)


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
def job(make_tiny, tmp_path):
    """Quantized blocks, their latents, first inputs, the float model's last outputs, the head."""

    def make():
        stack = DecoderStack(open_source(str(make_tiny("llama"))))
        tokens = torch.randint(0, 300, (20, 512), generator=inputs.generator(1))
        stream = stack.first_inputs(tokens)
        exact, first = stream.first(len(stream.hidden)), stream.first(len(stream.hidden))
        blocks, latents = [], []
        layout = layout_of(CONFIG, {})
        for index in range(len(stack)):
            block = stack.block(index)
            exact.hidden = list(exact.outputs(block, index))
            _, found = quantize_sequentially(block, index, CONFIG, layout, stream.first(1))
            stream.hidden = list(stream.outputs(block, index))
            blocks.append(block)
            latents.append(found)
        state = tmp_path / "state"
        return blocks, latents, CONFIG, first, exact.hidden, stack.head(), state

    return make


def run(job, progress=lambda *_: None):
    return distill(*job, inputs.generator(5), progress)


def held_divergence(blocks, first, exact, head) -> float:
    hidden = first.hidden[-1]
    with torch.no_grad():
        for index, block in enumerate(blocks):
            out = block(hidden, **first.arguments[-1][index])
            hidden = out[0] if isinstance(out, tuple) else out
        return float(exact_divergence(hidden, exact[-1], head))


def test_it_lowers_the_divergence_on_text_that_it_did_not_train_on(job):
    blocks, latents, config, first, exact, head, state = job()
    before = held_divergence(blocks, first, exact, head)
    report = run((blocks, latents, config, first, exact, head, state))
    after = held_divergence(blocks, first, exact, head)
    assert report.improved
    assert after < before
    assert report.divergence_after == pytest.approx(after, rel=1e-2)
    assert report.steps == 2 * (len(exact) - 1)


def test_what_does_not_help_is_not_kept(job, monkeypatch):
    monkeypatch.setattr(module, "_RATE", 30.0)
    arguments = job()
    before = [copy.deepcopy(block.state_dict()) for block in arguments[0]]
    report = run(arguments)
    assert not report.improved
    for block, expected in zip(arguments[0], before, strict=True):
        assert all(torch.equal(v, expected[n]) for n, v in block.state_dict().items())


class Stopped(BaseException):
    pass


def test_what_is_inside_of_blocks_is_made_again_and_changes_nothing(job, monkeypatch):
    """The weights are those of a run that keeps everything; each block runs twice in a step."""
    calls, made = [], []
    for keep in (False, True):
        blocks, *rest = job()
        if keep:
            monkeypatch.setattr(module, "checkpoint", lambda f, x, use_reentrant, **k: f(x, **k))
        handle = blocks[0].register_forward_pre_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        report = run((blocks, *rest))
        handle.remove()
        assert sum(calls) == report.steps * (1 if keep else 2)
        calls.clear()
        made.append([b.state_dict() for b in blocks])
    for recomputed, kept in zip(*made, strict=True):
        assert all(torch.equal(v, kept[n]) for n, v in recomputed.items())


def test_an_interrupted_run_goes_on_from_its_last_state(job, monkeypatch):
    monkeypatch.setattr(module, "_SAVE_STEPS", 3)
    whole, parts = job(), job()
    assert not whole[-1].exists()
    run(whole)
    whole[-1].unlink()

    def stop(stage, done, total):
        if done == 5:
            raise Stopped

    steps = []
    with pytest.raises(Stopped):
        run(parts, stop)
    # As another process would: from the blocks and latents as they were.
    fresh = job()
    assert fresh[-1].exists()
    run(fresh, lambda stage, done, total: steps.append(done))
    assert steps[0] == 3
    for block, expected in zip(fresh[0], whole[0], strict=True):
        expected = expected.state_dict()
        assert all(torch.equal(v, expected[n]) for n, v in block.state_dict().items())


# Through quantize_model.

TOKENS = torch.randint(0, 300, (9, 512), generator=torch.Generator().manual_seed(1))


def quantize(model, out, **options):
    return duqpp.quantize_model(str(model), out, CONFIG, calibration=TOKENS, **options)


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_distilled_checkpoint_has_the_files_of_any_other(tiny_llama, tmp_path):
    report = quantize(tiny_llama, tmp_path / "out")
    assert report.distilled.improved
    assert len(report.refined) == 2
    plain = QuantizeConfig(method="duqpp")
    duqpp.quantize_model(str(tiny_llama), tmp_path / "plain", plain, calibration=TOKENS)
    assert files(tmp_path / "out").keys() == files(tmp_path / "plain").keys()
    duqpp.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("where", ["training", "renaming"])
def test_resume_gives_the_same_bytes(where, tiny_llama, tmp_path, monkeypatch):
    import duqpp.refine.shards as shards

    monkeypatch.setattr(module, "_SAVE_STEPS", 1)
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
