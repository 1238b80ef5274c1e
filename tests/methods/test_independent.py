"""Methods that fit groups by themselves, on tiny models: what they preserve, skip and report."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import duqpp.methods.independent as module
from duqpp.calibration.gptq import Gptq
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import dequantize, quantize
from duqpp.methods import METHODS
from duqpp.methods.base import Block, Streams
from duqpp.methods.group import group_generator
from duqpp.models.source import open_source
from duqpp.models.stack import BlockInputs, DecoderStack
from duqpp.nn import MXFP4Linear
from duqpp.rotation.construct import outlier_aware
from tests import inputs, oracle
from tests.families import FAMILIES, GROUPS, LLAMA

SINGLE = [name for name in METHODS if name not in ("learned", "duqpp")]  # group by group
LINEARS = [name for group in GROUPS for name in group.linears]
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass
class Job:
    """A decoder block before and after, with what is needed to run both."""

    original: nn.Module
    quantized: nn.Module
    config: QuantizeConfig
    inputs: BlockInputs
    reports: dict
    exact: dict[str, torch.Tensor]  # folded weights before rounding, by linear


@pytest.fixture(scope="session")
def stacks(make_tiny):
    """``stacks(family, dtype, **config)``: a tiny model's decoder stack, and inputs of block 0."""
    made = {}

    def make(family: str, dtype=None, **overrides) -> tuple[DecoderStack, BlockInputs]:
        key = (family, dtype, *sorted(overrides.items()))
        if key not in made:
            stack = DecoderStack(open_source(str(make_tiny(family, **overrides))), dtype)
            tokens = torch.randint(0, 300, (6, 48), generator=inputs.generator(1))
            made[key] = stack, stack.first_inputs(tokens)
        return made[key]

    return make


@pytest.fixture
def run(stacks, monkeypatch):
    """``run(family, model=..., **options)``: quantize block 0 of a tiny model."""

    def job(family: str = "llama", model: dict | None = None, **options) -> Job:
        stack, block_inputs = stacks(family, **(model or {}))
        original = stack.block(0)
        quantized = copy.deepcopy(original)
        config = QuantizeConfig(**({"max_steps": 12} | options))
        exact = {}

        def recording(plan, options, hessian, quantize_weights=_QUANTIZE_WEIGHTS, **rest):
            result = quantize_weights(plan, options, hessian, **rest)
            exact.update({name: weight.exact for name, weight in result.items()})
            return result

        monkeypatch.setattr(module, "quantize_weights", recording)
        block = Block.of(quantized, 0, config.skip, stack.family)
        streams = Streams(block_inputs if config.needs.inputs else None)
        reports = config.build_method().quantize(block, streams).groups
        reports = {report.name.rpartition(".")[2]: report for report in reports}
        return Job(original, quantized, config, block_inputs, reports, exact)

    return job


_QUANTIZE_WEIGHTS = module.quantize_weights


def observe(block: nn.Module, block_inputs: BlockInputs, config: QuantizeConfig):
    """Statistics of block 0 by group, and the outputs that the next block reads, if it does."""
    return config.build_method().observe(Block.of(block, 0, config.skip, LLAMA), block_inputs)


# The float model's function. Each quantized linear is replaced by its twin: the same transform of
# the input, and the folded weight, neither rounded to MXFP4. In float64 it must be the original.


class Twin(nn.Module):
    def __init__(self, linear: MXFP4Linear, weight: torch.Tensor) -> None:
        super().__init__()
        blocks = linear.in_features // 32
        matrix = torch.eye(linear.in_features, dtype=torch.float64)
        if linear.pre_rotation is not None:
            matrix = matrix @ torch.block_diag(*linear.pre_rotation.double().expand(blocks, 32, 32))
        if linear.permutation is not None:
            matrix = matrix[:, linear.permutation.long()]
        if linear.rotation is not None:
            matrix = matrix @ torch.block_diag(*linear.rotation.double().expand(blocks, 32, 32))
        self.matrix, self.weight = matrix, weight.double()
        self.bias = None if linear.bias is None else linear.bias.double()

    def forward(self, x):
        return nn.functional.linear(x @ self.matrix, self.weight, self.bias)


def float64_twin(job: Job) -> nn.Module:
    block = copy.deepcopy(job.quantized)
    for name, weight in job.exact.items():
        block.set_submodule(name, Twin(block.get_submodule(name), weight))
    for owner in (block.self_attn, block.mlp):  # sharing quantizes; twins do not
        owner._forward_pre_hooks.clear()
        owner._forward_pre_hooks_with_kwargs.clear()
    return block.double()


def contributions(block: nn.Module, block_inputs: BlockInputs, dtype=torch.float64) -> torch.Tensor:
    """What the block adds to its input, over all batches: the residual would hide errors."""
    added = []
    with torch.no_grad():
        for hidden, arguments in zip(block_inputs.hidden, block_inputs.arguments, strict=True):
            keywords = dict(arguments[0])
            position = keywords["position_embeddings"]
            keywords["position_embeddings"] = tuple(p.to(dtype) for p in position)
            out = block(hidden.to(dtype), **keywords)
            added.append((out[0] if isinstance(out, tuple) else out) - hidden.to(dtype))
    return torch.cat(added)


def relative(made: torch.Tensor, exact: torch.Tensor) -> float:
    return float((made - exact).norm() / exact.norm())


def function_error(job: Job) -> float:
    """How far the smoothed and rotated float block is from the original, in float64."""
    exact = contributions(copy.deepcopy(job.original).double(), job.inputs)
    return relative(contributions(float64_twin(job), job.inputs), exact)


# Folded weights are kept in float32, and norms compute in it.
TIGHT = 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_before_rounding_the_block_computes_the_original_function(
    family, method, rotation, alpha, run
):
    job = run(family, method=method, rotation=rotation, smooth_alpha=alpha)
    assert set(job.exact) == set(LINEARS)
    assert function_error(job) < TIGHT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_function_is_preserved_from_half_precision_weights(family, rotation, dtype, run):
    """Norms and biases keep their dtype and still absorb the smoothing without rounding."""
    job = run(family, {"dtype": dtype}, rotation=rotation)
    assert job.quantized.input_layernorm.weight.dtype == dtype
    assert function_error(job) < TIGHT


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
@pytest.mark.parametrize(
    "heads",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 2, "head_dim": 32},
    ],
    ids=["no sharing", "one value head", "heads wider than hidden_size"],
)
def test_the_function_is_preserved_for_any_heads(family, rotation, heads, run):
    assert function_error(run(family, heads, rotation=rotation)) < TIGHT


@pytest.mark.parametrize("options", [{"hessian": "float"}, {"hessian": "quantized"}])
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
def test_gptq_folds_the_same_weights(options, rotation, run):
    plain = run("qwen2", rotation=rotation)
    job = run("qwen2", rotation=rotation, gptq=True, **options)
    assert function_error(job) < TIGHT
    for name in LINEARS:
        oracle.assert_same(job.exact[name], plain.exact[name], name)


# Smoothing.


def equation(activation: torch.Tensor, weight: torch.Tensor, alpha: float = 0.6) -> torch.Tensor:
    """SmoothQuant's scales of geometric mean 1 from amax of each channel: float64 [K]."""
    s = activation.double() ** alpha / weight.double() ** (1 - alpha)
    return s / s.log().mean().exp()


def inputs_of(block: nn.Module, name: str, block_inputs: BlockInputs) -> torch.Tensor:
    """What a linear of a float block reads: float32 [tokens, K]."""
    seen = []
    hook = block.get_submodule(name).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    for _ in block_inputs.outputs(block, 0):
        pass
    hook.remove()
    return torch.cat([x.flatten(0, -2).float() for x in seen])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["rtn", "duquant++"])
def test_norms_absorb_the_scales_of_the_equation(family, method, run):
    job = run(family, method=method, smooth_alpha=0.6)
    amax = {n: inputs_of(job.original, n, job.inputs).abs().amax(0) for n in LINEARS}
    weight = {n: job.original.get_submodule(n).weight.double() for n in LINEARS}
    # o_proj: 2 value heads of 16 channels, each read by 2 query heads; the largest counts.
    readers = (amax["self_attn.o_proj"], weight["self_attn.o_proj"].abs().amax(0))
    s_value = equation(*(v.view(2, 2, 16).amax(1).flatten() for v in readers))
    s_down = equation(amax["mlp.down_proj"], weight["mlp.down_proj"].abs().amax(0))
    # What v_proj and up_proj make for them is divided before their own inputs are smoothed.
    weight["self_attn.v_proj"] /= s_value[:, None]
    weight["mlp.up_proj"] /= s_down[:, None]
    for norm, group in zip(NORMS, (GROUPS[0], GROUPS[2]), strict=True):
        columns = torch.cat([weight[n] for n in group.linears]).abs().amax(0)
        expected = equation(amax[group.linears[0]], columns)
        before, after = (b.get_submodule(norm).weight for b in (job.original, job.quantized))
        torch.testing.assert_close(before.double() / after.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
def test_rotations_are_built_for_the_smoothed_input(family, rotation, run):
    job = run(family, rotation=rotation)
    statistics, _ = observe(copy.deepcopy(job.original), job.inputs, job.config)
    for group, norm in zip((GROUPS[0], GROUPS[2]), NORMS, strict=True):
        if rotation == "shared":
            before, after = (b.get_submodule(norm).weight for b in (job.original, job.quantized))
            s = before / after
        else:
            weights = [job.original.get_submodule(n).weight for n in group.linears]
            s = equation(statistics[group.name].amax, torch.cat(weights).abs().amax(0)).float()
        generator = group_generator(job.config.seed, f"model.layers.0.{group.name}")
        R = outlier_aware(
            statistics[group.name].samples() / s,
            generator,
            per_block=rotation == "per-block",
            max_steps=job.config.max_steps,
        )
        stored = job.quantized.get_submodule(group.linears[0]).rotation.double()
        if rotation == "per-block":
            stored = stored * s.view(-1, 32, 1)
        assert relative(stored, R) < 2.0**-8, group.name


@pytest.mark.parametrize("rotation", ["shared", "per-block"])
def test_per_block_rotations_leave_producers_alone(rotation, run):
    job = run("qwen2", rotation=rotation)
    state, original = job.quantized.state_dict(), job.original.state_dict()
    kept = ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias"]
    for name in kept:
        same = bool((state[name] == original[name]).all())
        assert same == (rotation == "per-block"), name
    for name in ("self_attn.q_proj.bias", "self_attn.k_proj.bias"):
        oracle.assert_same(state[name], original[name], name)


def test_no_smoothing_leaves_producers_alone(run):
    job = run("qwen2", smooth_alpha=0.0)
    state = job.quantized.state_dict()
    for name, tensor in job.original.state_dict().items():
        if name in state:
            oracle.assert_same(state[name], tensor, name)


# Skip lists.

SKIPS = {
    "a whole group": ("mlp.gate_proj", "mlp.up_proj"),
    "one linear of a group": ("k_proj",),
    "a producer": ("v_proj",),
    "the other producer": ("up_proj",),
    "the attention": ("model.layers.0.self_attn",),
    "a name with its layer": ("model.layers.0.mlp.down_proj",),
    "two groups in part": ("q_proj", "gate_proj", "o_proj"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS)
def test_skipped_linears_are_bit_identical_in_a_working_block(family, rotation, skip, run):
    job = run(family, rotation=rotation, skip=skip)
    skipped = [n for n in LINEARS if any(s in f"model.layers.0.{n}" for s in skip)]
    assert skipped
    assert set(job.exact) == set(LINEARS) - set(skipped)
    for name in LINEARS:
        linear = job.quantized.get_submodule(name)
        assert type(linear) is (nn.Linear if name in skipped else MXFP4Linear), name
    for name in skipped:
        before, after = (b.get_submodule(name) for b in (job.original, job.quantized))
        oracle.assert_same(after.weight, before.weight, name)
        if before.bias is not None:
            oracle.assert_same(after.bias, before.bias, f"{name}.bias")
    assert function_error(job) < TIGHT
    rounded = contributions(job.quantized, job.inputs, torch.float32)
    # Weights are random and errors large; a part that is wrong gives 1 and more.
    assert relative(rounded, contributions(job.original, job.inputs, torch.float32)) < 0.8


def test_the_lists_of_another_layer_do_not_matter(run):
    job = run(skip=("model.layers.1.self_attn", "lm_head"))
    assert set(job.exact) == set(LINEARS)


def test_a_group_keeps_its_rotation_whatever_else_is_skipped(run):
    """Each group draws from its own generator, so an ablation changes one thing at a time."""
    for method, group in (("random", "mlp.down_proj"), ("duquant++", "self_attn.q_proj")):
        whole = run(method=method, smooth_alpha=0.0)
        part = run(method=method, smooth_alpha=0.0, skip=("gate_proj", "up_proj", "o_proj"))
        first, second = (j.quantized.get_submodule(group).rotation for j in (whole, part))
        oracle.assert_same(first, second, f"{method} {group}")
    # One generator for all would give groups of one width the same random matrices.
    job = run(method="random")
    rotations = [job.quantized.get_submodule(group.linears[0]).rotation for group in GROUPS]
    assert len({tuple(R.flatten().tolist()) for R in rotations}) == len(GROUPS)


# What is stored.


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
def test_stored_weights_are_the_rounded_folded_weights(method, rotation, run):
    job = run("qwen2", method=method, rotation=rotation)
    for name in LINEARS:
        linear = job.quantized.get_submodule(name)
        expected = quantize(job.exact[name], rule=job.config.weight_rule)
        oracle.assert_same(linear.weight.codes, expected.codes, f"{name} codes")
        oracle.assert_same(linear.weight.scales, expected.scales, f"{name} scales")
        assert linear.rule is job.config.activation_rule
    for group in GROUPS:
        first, *others = (job.quantized.get_submodule(name) for name in group.linears)
        for other in others:
            for part in ("rotation", "pre_rotation", "permutation"):
                if getattr(first, part) is not None:
                    oracle.assert_same(getattr(other, part), getattr(first, part), part)
                    assert getattr(other, part).data_ptr() != getattr(first, part).data_ptr()


def test_stored_tensors_own_their_memory(run):
    """A view into the group's concatenated weight would be saved with all of it."""
    job = run("qwen2", method="duquant")
    for name, tensor in job.quantized.state_dict().items():
        size = tensor.untyped_storage().nbytes()
        assert size == tensor.numel() * tensor.element_size(), name


def test_each_block_has_a_random_matrix_of_its_own(run):
    """One per block of 32 channels; the shared one is the same for all of them."""
    job = run("llama", method="random", rotation="per-block")
    for name in LINEARS:
        matrices = job.quantized.get_submodule(name).rotation
        assert len(matrices) == len(matrices.flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("method", SINGLE)
def test_seeded(method, run):
    first, again, other = (run(method=method, seed=seed) for seed in (1, 1, 2))
    states = [job.quantized.state_dict() for job in (first, again, other)]
    for name, tensor in states[0].items():
        oracle.assert_same(states[1][name], tensor, name)
    differs = any((states[2][name] != tensor).any() for name, tensor in states[0].items())
    assert differs == (method not in ("rtn", "hadamard"))


# GPTQ: the Hessian is that of the inputs in the basis that weights are rounded in.


@pytest.fixture
def hessians(monkeypatch) -> list[torch.Tensor]:
    """Every Hessian that GPTQ gets, in order."""
    seen, real = [], Gptq.of

    def recording(hessian, **options):
        seen.append(hessian)
        return real(hessian, **options)

    monkeypatch.setattr(Gptq, "of", recording)
    return seen


@pytest.mark.parametrize("method", ["rtn", "duquant++", "duquant"])
@pytest.mark.parametrize("hessian", ["float", "quantized"])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_hessians_are_those_of_the_transformed_inputs(method, hessian, alpha, run, hessians):
    options = {"method": method, "hessian": hessian, "smooth_alpha": alpha}
    job = run("qwen2", rotation="per-block", gptq=True, **options)
    assert len(hessians) == len(GROUPS)
    for group, H in zip(GROUPS, hessians, strict=True):
        name = group.linears[0]
        x = inputs_of(job.original, name, job.inputs).double()
        y = (x @ Twin(job.quantized.get_submodule(name), job.exact[name]).matrix).float()
        if hessian == "quantized":
            y = dequantize(quantize(y, rule=job.config.activation_rule))
        direct = 2 / len(y) * y.double().T @ y.double()
        # A code that float32 rounds the other way is a small step in a quantized input.
        assert relative(H, direct) < (1e-5 if hessian == "float" else 1e-3), group.name


@pytest.mark.parametrize("rotation", ["shared", "per-block"])
def test_hessians_of_float_and_quantized_inputs_differ_by_quantization(rotation, run, hessians):
    """With smoothing in the producers too: both are of what the quantized linears read."""
    for hessian in ("float", "quantized"):
        run("qwen2", rotation=rotation, gptq=True, hessian=hessian)
    for exact, rounded in zip(hessians[:4], hessians[4:], strict=True):
        assert 1e-6 < relative(rounded, exact) < 0.15


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_lowers_the_error_of_the_outputs(family, run):
    nearest, compensated = run(family), run(family, gptq=True)
    for name, report in compensated.reports.items():
        assert report.output_error < nearest.reports[name].output_error * 1.02, name
    total = [sum(r.output_error for r in job.reports.values()) for job in (nearest, compensated)]
    assert total[1] < 0.95 * total[0]


# Reports.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["hadamard", "duquant++", "duquant"])
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
def test_rotations_help_inputs_with_outliers(family, method, rotation, run):
    """The norms of the tiny models enlarge one channel, which q,k,v and gate,up then read."""
    job = run(family, method=method, rotation=rotation, smooth_alpha=0.6)
    for name in ("qkv", "gate_up"):
        report = job.reports[name]
        assert max(report.block_amax) < 0.7 * max(report.block_amax_before)
        assert report.activation_error < report.activation_error_before


def test_report_figures_are_what_they_say(run):
    job = run("qwen2", skip=("k_proj",))
    assert list(job.reports) == ["qkv", "o", "gate_up", "down"]
    for group in GROUPS:
        report = job.reports[group.name]
        names = [n for n in group.linears if n in job.exact]
        linears = [job.quantized.get_submodule(n) for n in names]
        exact = torch.cat([job.exact[n] for n in names])
        rounded = torch.cat([dequantize(linear.weight) for linear in linears])
        assert report.weight_error == pytest.approx(relative(rounded, exact), rel=1e-4)
        assert 0.02 < report.weight_error < 0.2
        x = inputs_of(job.original, names[0], job.inputs)  # all tokens fit into the sample
        assert report.block_amax_before == pytest.approx(
            x.abs().amax(0).view(-1, 32).amax(1).tolist(), rel=1e-3
        )
        plain = dequantize(quantize(x, rule=job.config.activation_rule))
        assert report.activation_error_before == pytest.approx(relative(plain, x), rel=0.1)
        assert 0 < report.activation_error < 0.2


@pytest.mark.parametrize("rotation", ["shared", "per-block"])
def test_output_error_is_that_of_the_quantized_linears(rotation, run):
    job = run("qwen2", rotation=rotation)
    for group, norm in zip((GROUPS[0], GROUPS[2]), NORMS, strict=True):
        linears = [job.quantized.get_submodule(n) for n in group.linears]
        weights = torch.cat([job.original.get_submodule(n).weight for n in group.linears])
        x = inputs_of(job.original, group.linears[0], job.inputs)
        before, after = (b.get_submodule(norm).weight for b in (job.original, job.quantized))
        y = [linear(x * after / before) for linear in linears]
        y = torch.cat(
            [y if m.bias is None else y - m.bias for m, y in zip(linears, y, strict=True)], 1
        )
        # The sample has rows of channel peaks twice.
        expected = pytest.approx(relative(y, x @ weights.T), rel=0.1)
        assert job.reports[group.name].output_error == expected


def test_without_activations_only_weights_are_reported(run):
    job = run(method="hadamard")
    for report in job.reports.values():
        values = report.to_dict()
        assert set(values) == {
            "name",
            "weight_error",
            "activation_error_before",
            "activation_error",
            "output_error",
            "block_amax_before",
            "block_amax",
        }
        assert values.pop("name").startswith("model.layers.0.")
        assert 0.02 < values.pop("weight_error") < 0.2
        assert set(values.values()) == {None}


# Bad values.


def test_nan_in_activations_names_the_linear(stacks):
    stack, block_inputs = stacks("llama")
    block = copy.deepcopy(stack.block(0))
    hidden = [h.clone() for h in block_inputs.hidden]
    hidden[-1][0, 3, 7] = float("nan")
    bad = BlockInputs(hidden, block_inputs.arguments)
    with pytest.raises(InputError) as error:
        observe(block, bad, QuantizeConfig())
    assert str(error.value) == (
        "the input of model.layers.0.self_attn.q_proj has NaN or infinite values in calibration"
    )
    block.mlp.up_proj.weight.data[2, 2] = float("inf")
    with pytest.raises(InputError, match=r"^the input of model\.layers\.0\.mlp\.down_proj has NaN"):
        observe(block, block_inputs, QuantizeConfig())
    assert not block.self_attn.q_proj._forward_pre_hooks, "hooks stay behind after an error"


def test_weights_that_overflow_name_the_linear(stacks):
    stack, _ = stacks("llama")
    block = copy.deepcopy(stack.block(0))
    block.mlp.gate_proj.weight.data[:] = 3e38
    config = QuantizeConfig(method="hadamard")
    with pytest.raises(InputError) as error:
        config.build_method().quantize(Block.of(block, 0, (), stack.family), Streams())
    assert str(error.value) == "model.layers.0.mlp.gate_proj: folded weights overflow float32"


def test_statistics_leave_the_block_as_it_was(stacks):
    stack, block_inputs = stacks("qwen3")
    block = copy.deepcopy(stack.block(0))
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    config = QuantizeConfig(next_inputs="float")
    whole, outputs = observe(block, block_inputs, config)
    short, none = observe(block, block_inputs, QuantizeConfig())
    assert none is None and set(short) == set(whole)
    for name in whole:  # ending the pass early loses nothing
        oracle.assert_same(short[name].amax, whole[name].amax, name)
        oracle.assert_same(short[name].samples(), whole[name].samples(), name)
    for name, tensor in block.state_dict().items():
        oracle.assert_same(tensor, before[name], name)
    assert not any(m._forward_pre_hooks for m in block.modules())
    expected = list(block_inputs.outputs(block, 0))
    for made, wanted in zip(outputs, expected, strict=True):
        oracle.assert_same(made, wanted, "outputs of the float block")


def test_every_group_is_observed_with_all_its_tokens(stacks):
    stack, block_inputs = stacks("llama")
    block = copy.deepcopy(stack.block(0))
    config = QuantizeConfig(gptq=True)
    statistics, _ = observe(block, block_inputs, config)
    assert list(statistics) == [group.name for group in GROUPS]
    for group in GROUPS:
        x = inputs_of(block, group.linears[-1], block_inputs)
        held = statistics[group.name]
        assert held.tokens == block_inputs.tokens == len(x)
        oracle.assert_same(held.amax, x.abs().amax(0), f"amax of {group.name}")
        torch.testing.assert_close(held.take_gram(), x.T @ x, rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match="second moments are not kept"):
        observe(block, block_inputs, QuantizeConfig())[0]["o"].take_gram()
