"""refine_block on a tiny model: held-out loss decides, and the codes that stay are hardware's."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

import duqpp
import duqpp.methods.refine.blocks as module
from duqpp.calibration.tokens import tokenize
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import ScaleRule, quantize
from duqpp.methods.base import Block
from duqpp.methods.refine.blocks import refine_block
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack
from duqpp.nn import MXFP4Linear
from tests import inputs
from tests.families import GROUPS

LINEARS = [name for group in GROUPS for name in group.linears]
MSE = ScaleRule.MSE
CONFIG = QuantizeConfig(method="duqpp", refine="blocks", samples=1, refine_samples=2)


@pytest.fixture
def job(make_tiny):
    """A quantized block 0, its latents, what it reads, and what the float block gives."""

    def make(family: str = "llama", config: QuantizeConfig = CONFIG):
        stack = DecoderStack(open_source(str(make_tiny(family))))
        tokens = torch.randint(0, 300, (24, 512), generator=inputs.generator(1))
        block_inputs = stack.first_inputs(tokens)
        block = stack.block(0)
        targets = list(block_inputs.outputs(block, 0))
        own = Block.of(block, 0, config.skip, stack.family)
        latents = config.build_method().quantize_groups(own, block_inputs.first(1)).latents
        return own, latents, block_inputs, targets

    return make


def loss(block, block_inputs, targets, batches) -> float:
    """The mean relative squared error over batches, in float64."""
    outputs = list(block_inputs.outputs(block, 0))
    errors = [
        (outputs[b] - targets[b]).double().square().sum(-1) / targets[b].double().square().sum(-1)
        for b in batches
    ]
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_lowers_the_loss_on_batches_that_it_did_not_train_on(family, job):
    block, latents, block_inputs, targets = job(family)
    before = copy.deepcopy(block.module)
    report, _ = refine_block(block, latents, block_inputs, targets, MSE, inputs.generator(0))
    held = [len(targets) - 1]
    assert report.improved
    assert report.steps == len(targets) - 1
    made = loss(block.module, block_inputs, targets, held)
    assert made < loss(before, block_inputs, targets, held)
    assert made == pytest.approx(report.loss_after, rel=1e-3)
    for name in LINEARS:
        linear = block.module.get_submodule(name)
        assert isinstance(linear, MXFP4Linear)
        assert not torch.equal(linear.weight.codes, before.get_submodule(name).weight.codes)
        assert torch.equal(linear.rotation, before.get_submodule(name).rotation)


def test_the_same_seed_gives_the_same_bytes(job):
    made = []
    for _ in range(2):
        block, *rest = job()
        refine_block(block, *rest, MSE, inputs.generator(3))
        made.append(block.module.state_dict())
    assert all(torch.equal(v, made[1][n]) for n, v in made[0].items())


def test_what_does_not_help_is_not_kept(job, monkeypatch):
    """A rate that wrecks the weights: the block must be as it was, byte for byte."""
    monkeypatch.setattr(module, "_RATE", 30.0)
    block, latents, block_inputs, targets = job()
    before = copy.deepcopy(block.module.state_dict())
    report, _ = refine_block(block, latents, block_inputs, targets, MSE, inputs.generator(0))
    assert not report.improved
    assert report.loss_after == report.loss_before
    assert all(torch.equal(v, before[n]) for n, v in block.module.state_dict().items())


def test_the_codes_of_the_best_check_are_kept(job, monkeypatch):
    """Of three checks: the first, or the last."""

    def kept(values: list[float]) -> list[torch.Tensor]:
        def measured(*arguments, real=module_loss):
            loss, found = real(*arguments), iter(values)
            return lambda b: loss(b) if torch.is_grad_enabled() else torch.tensor(next(found))

        monkeypatch.setattr(module, "block_loss", measured)
        block, *rest = job()
        report, latents = refine_block(block, *rest, MSE, inputs.generator(0))
        assert (report.loss_after, report.steps) == (pytest.approx(min(values)), 5)
        codes = [block.module.get_submodule(name).weight.codes for name in LINEARS]
        for name, found in zip(LINEARS, codes, strict=True):
            assert torch.equal(found, quantize(latents[name], rule=MSE).codes)
        return codes

    module_loss = module.block_loss
    first, last = kept([1.0, 0.4, 0.43, 0.42]), kept([1.0, 0.9, 0.8, 0.7])
    assert any(not torch.equal(*codes) for codes in zip(first, last, strict=True))


def test_skipped_linears_are_not_trained(job):
    config = QuantizeConfig(
        method="duqpp", refine="blocks", samples=1, refine_samples=2, skip=("k_proj", "down_proj")
    )
    block, latents, block_inputs, targets = job(config=config)
    kept = {
        n: block.module.get_submodule(n).weight.clone()
        for n in ("self_attn.k_proj", "mlp.down_proj")
    }
    refine_block(block, latents, block_inputs, targets, MSE, inputs.generator(0))
    for name, weight in kept.items():
        assert torch.equal(block.module.get_submodule(name).weight, weight)


@pytest.mark.parametrize("refine", ["blocks", "distill"])
def test_a_block_without_quantized_linears_is_left_out(refine, make_tiny, tmp_path):
    config = QuantizeConfig(
        method="duqpp", refine=refine, samples=1, refine_samples=2, skip=("model.layers.0",)
    )
    tokens = torch.randint(0, 300, (9, 512), generator=inputs.generator(1))
    report = duqpp.quantize_model(
        str(make_tiny("llama")), tmp_path / "out", config, calibration=tokens
    )
    assert report.refined[0] == module.RefineReport(0.0, 0.0, steps=0)
    assert report.refined[1].steps > 0
    assert {group.name.rpartition(".")[0] for group in report.groups} == {"model.layers.1"}
    duqpp.from_pretrained(tmp_path / "out")


def test_one_batch_is_too_few(job):
    block, latents, block_inputs, targets = job()
    with pytest.raises(InputError, match="training needs more calibration text"):
        refine_block(block, latents, block_inputs.first(1), targets, MSE, inputs.generator(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "duquant++"}, "`refine` is for the method duqpp"),
        ({"next_inputs": "float"}, "`next_inputs=quantized`"),
        ({"samples": 72, "refine_samples": 72}, "`refine_samples` must be more than `samples`"),
    ],
)
def test_options_that_refinement_cannot_work_with(options, message):
    with pytest.raises(InputError, match=message):
        QuantizeConfig(**{"method": "duqpp", "refine": "blocks"} | options)


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        ({}, 72 * 1024, 72),
        ({}, 10**6, 72),
        ({}, 72 * 1024 - 1, 71),
        ({}, 1024, 17),  # more than those that calibrate, which the text is then too short for
        ({"seq_len": 2048}, 72 * 1024, 36),
        ({"refine_samples": 20}, 72 * 1024, 20),
        ({"refine": "none"}, 1024, None),
    ],
)
def test_as_many_sequences_as_the_text_has(options, tokens, expected):
    config = QuantizeConfig(**{"method": "duqpp", "refine": "blocks"} | options)
    assert config.for_text(tokens // config.seq_len).refine_samples == expected


def test_short_text_refines_with_all_of_it(tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    tokens = tokenize(AutoTokenizer.from_pretrained(tiny_llama), text.read_text()).numel()
    config = QuantizeConfig(method="duqpp", refine="blocks", samples=2, seq_len=32)
    assert 2 < tokens // 32 < 72
    report = duqpp.quantize_model(str(tiny_llama), tmp_path / "out", config, calibration=str(text))
    assert all(block.steps > 0 for block in report.refined)
    assert f"text.txt, {tokens // 32} x 32 tokens" in (tmp_path / "out" / "README.md").read_text()
    too_many = replace(config, refine_samples=tokens // 32 + 1)
    with pytest.raises(InputError, match="`refine_samples`"):
        duqpp.quantize_model(str(tiny_llama), tmp_path / "no", too_many, calibration=str(text))
