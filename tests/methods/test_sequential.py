"""The method duqpp on tiny models: what it preserves, and that each group sees its real input."""

import copy
import weakref
from collections import Counter

import pytest
import torch

import duqpp.methods.sequential as module
from duqpp.calibration.gptq import Gptq
from duqpp.calibration.statistics import draw_sample
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import dequantize, quantize
from duqpp.methods import group as common
from duqpp.methods.base import Block, Streams
from duqpp.methods.sequential import run_float_block
from duqpp.models.source import open_source
from duqpp.models.stack import BlockInputs, DecoderStack
from duqpp.nn import MXFP4Linear
from tests import inputs, oracle
from tests.families import FAMILIES, GROUPS, LLAMA


@pytest.fixture
def run(make_tiny):
    """``run(family, **options)``: block 0 before and after, its inputs, and the reports."""

    def job(family: str = "llama", dtype: torch.dtype | None = None, **options):
        stack = DecoderStack(open_source(str(make_tiny(family))), dtype)
        tokens = torch.randint(0, 300, (6, 48), generator=inputs.generator(1))
        block_inputs = stack.first_inputs(tokens)
        original = stack.block(0)
        quantized = copy.deepcopy(original)
        config = QuantizeConfig(method="duqpp", **options)
        block = Block.of(quantized, 0, config.skip, stack.family)
        reports = config.build_method().quantize_groups(block, block_inputs).reports
        return original, quantized, block_inputs, reports

    return job


def read_by(block: torch.nn.Module, name: str, block_inputs: BlockInputs) -> torch.Tensor:
    """What a linear reads, float32 [tokens, K]; sharing is off, so that it is not rounded yet."""
    block = copy.deepcopy(block)
    for owner in (block.self_attn, block.mlp):
        owner._forward_pre_hooks.clear()
        owner._forward_pre_hooks_with_kwargs.clear()
    seen = []
    block.get_submodule(name).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    for _ in block_inputs.outputs(block, 0):
        pass
    return torch.cat([x.flatten(0, -2).float() for x in seen])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_quantized_with_one_matrix_per_block(family, run):
    _, block, _, reports = run(family)
    assert [r.name for r in reports] == [f"model.layers.0.{g.name}" for g in GROUPS]
    for group in GROUPS:
        linears = [block.get_submodule(name) for name in group.linears]
        for linear in linears:
            assert isinstance(linear, MXFP4Linear)
            assert linear.rotation.shape == (linear.in_features // 32, 32, 32)
            assert torch.equal(linear.rotation, linears[0].rotation)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gptq", [True, False])
def test_the_error_is_that_of_four_bits(family, gptq, run):
    """Effective weights, R folded back, are the original ones up to MXFP4's rounding."""
    original, block, _, _ = run(family, gptq=gptq)
    for group in GROUPS:
        for name in group.linears:
            linear = block.get_submodule(name)
            matrices = linear.rotation.double()
            blocks = dequantize(linear.weight).double().unflatten(1, (-1, 32))
            made = torch.einsum("nbi,bji->nbj", blocks, matrices).flatten(1)
            exact = original.get_submodule(name).weight.double()
            assert (made - exact).norm() < 0.3 * exact.norm(), name


def test_each_group_is_calibrated_on_what_it_will_read(run, monkeypatch):
    """Moments and Hessians are of the block's inputs behind the groups quantized before.

    Of 288 rows, which the Hessian takes in part by part.
    """
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 100)
    seen, hessians = [], []
    monkeypatch.setattr(
        module,
        "second_moments",
        lambda x, *rest, real=module.second_moments: seen.append(x) or real(x, *rest),
    )
    monkeypatch.setattr(
        module,
        "quantize_weights",
        lambda plan, options, hessian, *rest, real=module.quantize_weights: (
            hessians.append((plan, hessian)) or real(plan, options, hessian, *rest)
        ),
    )
    _, block, block_inputs, _ = run("llama")
    activations = seen[0::2]  # and weights between them
    for group, x, (plan, hessian) in zip(GROUPS, activations, hessians, strict=True):
        read = read_by(block, group.linears[0], block_inputs)
        torch.testing.assert_close(x, read, rtol=1e-4, atol=1e-5)
        rounded = dequantize(quantize(plan.transform.apply(x), rule="even"))
        torch.testing.assert_close(hessian, 2 / len(x) * rounded.T @ rounded, rtol=1e-4, atol=1e-4)


def test_the_hessian_of_float_activations_is_not_rounded(run, monkeypatch):
    hessians = []
    monkeypatch.setattr(
        module,
        "quantize_weights",
        lambda plan, options, hessian, *rest, real=module.quantize_weights: (
            hessians.append((plan, hessian)) or real(plan, options, hessian, *rest)
        ),
    )
    original, _, block_inputs, _ = run("llama", hessian="float")
    plan, hessian = hessians[0]
    y = plan.transform.apply(read_by(original, GROUPS[0].linears[0], block_inputs))
    torch.testing.assert_close(hessian, 2 / len(y) * y.T @ y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [(), ("o_proj",), ("v_proj", "down_proj"), ("mlp",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_gives_what_it_gives_when_it_is_run_whole(
    family, dtype, skip, make_tiny, monkeypatch
):
    monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 2 * 48)
    stack = DecoderStack(open_source(str(make_tiny(family))), dtype)
    first = stack.first_inputs(torch.randint(0, 300, (5, 48), generator=inputs.generator(1)))
    block = Block.of(stack.block(0), 0, skip, stack.family)
    method = QuantizeConfig(method="duqpp", drift=0.0, skip=skip).build_method()
    outputs = method.quantize(block, Streams(first, None, len(first.hidden))).outputs
    assert len(outputs) == 3
    for out, expected in zip(outputs, first.outputs(block.module, 0), strict=True):
        oracle.assert_same(out, expected, "outputs")


def test_no_quantized_linear_runs_twice(make_tiny, monkeypatch):
    """Each group's input is computed from what the groups before it have given already."""
    monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 2 * 48)
    runs = Counter()
    forward = MXFP4Linear.forward
    monkeypatch.setattr(
        MXFP4Linear, "forward", lambda self, x: runs.update([id(self)]) or forward(self, x)
    )
    stack = DecoderStack(open_source(str(make_tiny("llama"))))
    streams = Streams(
        stack.first_inputs(torch.randint(0, 300, (6, 48), generator=inputs.generator(1))),
        stack.first_inputs(torch.randint(0, 300, (6, 48), generator=inputs.generator(1))),
        3,
    )
    block = Block.of(stack.block(0), 0, (), stack.family)
    streams.advance(block, QuantizeConfig(method="duqpp").build_method().quantize(block, streams))
    linears = [block.module.get_submodule(name) for group in GROUPS for name in group.linears]
    assert [runs[id(linear)] for linear in linears] == [3] * 7


def test_a_float_block_is_run_once_for_outputs_and_group_inputs(run, monkeypatch):
    """Of the first batches alone, what the groups read; of all of them, the block's outputs."""
    monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 2 * 48)
    original, _, block_inputs, _ = run("llama")
    batches = len(block_inputs.hidden)
    assert batches == 3
    runs = []
    handle = original.register_forward_hook(lambda *_: runs.append(1))
    block = Block.of(original, 0, ("o_proj",), LLAMA)
    outputs, found = run_float_block(block, block_inputs, batches - 1)
    handle.remove()
    assert len(runs) == batches
    for out, expected in zip(outputs, block_inputs.outputs(original, 0), strict=True):
        oracle.assert_same(out, expected, "outputs")
    assert list(found) == ["qkv", "gate_up", "down"]
    for group in GROUPS:
        if group.name in found:
            read = read_by(original, group.linears[0], block_inputs.first(batches - 1))
            oracle.assert_same(found[group.name], read, group.name)
    assert run_float_block(block, block_inputs, 0)[1] == {}


def test_the_drift_is_from_the_input_before_rounding_to_the_float_models(make_tiny, monkeypatch):
    """In the transformed basis; the float model's inputs here are another text's."""
    seen = []
    monkeypatch.setattr(
        module,
        "quantize_weights",
        lambda plan, options, hessian, drift, ranks, real=module.quantize_weights: (
            seen.append((plan, drift.sums)) or real(plan, options, hessian, drift, ranks)
        ),
    )
    xs = []
    monkeypatch.setattr(
        module,
        "second_moments",
        lambda x, *rest, real=module.second_moments: xs.append(x) or real(x, *rest),
    )
    stack = DecoderStack(open_source(str(make_tiny("llama"))))
    own, other = (
        stack.first_inputs(torch.randint(0, 300, (6, 48), generator=inputs.generator(seed)))
        for seed in (1, 2)
    )
    block = Block.of(stack.block(0), 0, (), stack.family)
    _, exact = run_float_block(block, other, len(other.hidden))
    QuantizeConfig(method="duqpp").build_method().quantize_groups(block, own, dict(exact))
    for group, x, (plan, drift) in zip(GROUPS, xs[0::2], seen, strict=True):
        ours, theirs = plan.transform.apply(x), plan.transform.apply(exact[group.name])
        rounded = dequantize(quantize(ours, rule="even"))
        expected = 2 / len(x) * (theirs - ours).T @ rounded
        torch.testing.assert_close(drift, expected, rtol=1e-3, atol=1e-4)


def test_a_float_model_that_overflows_is_an_error_with_the_linears_name(run, make_tiny):
    stack = DecoderStack(open_source(str(make_tiny("llama"))))
    first = stack.first_inputs(torch.randint(0, 300, (6, 48), generator=inputs.generator(1)))
    block = Block.of(stack.block(0), 0, (), stack.family)
    _, exact = run_float_block(block, first, len(first.hidden))
    exact["gate_up"][5, 7] = float("inf")
    with pytest.raises(InputError, match=r"layers\.0\.gate_up: the float model's activations"):
        QuantizeConfig(method="duqpp").build_method().quantize_groups(block, first, exact)


@pytest.mark.parametrize("gptq", [True, False])
def test_reports_are_of_all_that_a_group_reads(gptq, run, monkeypatch):
    """block_amax of every row, errors of the drawn ones; many batches, and parts of one."""
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 100)
    monkeypatch.setattr(common, "REPORT_ROWS", 7)
    seen, plans, reported = [], [], []
    monkeypatch.setattr(
        module,
        "second_moments",
        lambda x, *rest, real=module.second_moments: seen.append(x) or real(x, *rest),
    )
    monkeypatch.setattr(
        module,
        "report_group",
        lambda plan, weights, samples, *rest, real=module.report_group: (
            plans.append(plan) or reported.append(samples) or real(plan, weights, samples, *rest)
        ),
    )
    reports = run("llama", gptq=gptq)[3]
    rows = draw_sample(6 * 48, module.SAMPLE_TOKENS, 0)[[0, 48, 96, 144, 191, 239, 287]]
    for report, x, plan, samples in zip(reports, seen[0::2], plans, reported, strict=True):
        assert torch.equal(samples, x[rows])
        for found, values in (
            (report.block_amax_before, x),
            (report.block_amax, plan.transform.apply(x)),
        ):
            expected = values.abs().amax(0).view(-1, 32).amax(1)
            assert found == pytest.approx(expected.tolist(), rel=1e-3)


def test_the_input_is_let_go_of_before_gptq(run, monkeypatch):
    alive = []
    monkeypatch.setattr(
        module,
        "second_moments",
        lambda x, *rest, real=module.second_moments: alive.append(weakref.ref(x)) or real(x, *rest),
    )
    monkeypatch.setattr(
        module,
        "quantize_weights",
        lambda *arguments, real=module.quantize_weights: (
            alive.append(alive[-2]() is not None) or real(*arguments)
        ),
    )
    run("llama", torch.bfloat16)  # of float32 inputs two are kept: see `Known`
    assert [entry for entry in alive if isinstance(entry, bool)] == [False] * 4


def test_refinement_starts_from_what_gptq_has_rounded(make_tiny, monkeypatch):
    compensated, real = [], Gptq.round
    monkeypatch.setattr(
        Gptq,
        "round",
        lambda *arguments: compensated.append(real(*arguments)) or compensated[-1],
    )
    stack = DecoderStack(open_source(str(make_tiny("llama"))))
    first = stack.first_inputs(torch.randint(0, 300, (6, 48), generator=inputs.generator(1)))
    block = Block.of(stack.block(0), 0, (), stack.family)
    method = QuantizeConfig(method="duqpp", refine="blocks", gptq=True).build_method()
    latents = method.quantize_groups(block, first).latents
    for group, result in zip(GROUPS, compensated, strict=True):
        found = torch.cat([latents[name] for name in group.linears])
        oracle.assert_same(found, result.compensated, group.name)


def test_gptq_lowers_the_output_error(run):
    reports = {gptq: run("llama", gptq=gptq)[3] for gptq in (True, False)}
    for group, nearest in zip(reports[True], reports[False], strict=True):
        assert group.output_error < nearest.output_error, group.name


def test_skipped_linears_stay(run):
    original, block, _, reports = run("llama", skip=("k_proj", "down_proj"))
    assert [r.name.rpartition(".")[2] for r in reports] == ["qkv", "o", "gate_up"]
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        assert torch.equal(block.get_submodule(name).weight, original.get_submodule(name).weight)


def test_options_that_do_not_belong_to_it_are_refused():
    for options in ({"rotation": "shared"}, {"smooth_alpha": 0.5}):
        with pytest.raises(InputError, match="a transform per block"):
            QuantizeConfig(method="duqpp", **options)
    with pytest.raises(InputError, match=r"`drift` must lie in \[0, 1\], got 1.5"):
        QuantizeConfig(method="duqpp", drift=1.5)
    with pytest.raises(InputError, match=r"`drift` is for the method duqpp, not duquant\+\+"):
        QuantizeConfig(method="duquant++", gptq=True, drift=0.3)
    for off in ({"gptq": False}, {"refine": "blocks"}):
        with pytest.raises(
            InputError, match="`drift` is what GPTQ makes up for, and that is off: `gptq=True`"
        ):
            QuantizeConfig(method="duqpp", drift=0.3, **off)
