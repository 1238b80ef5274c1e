"""learn_rotations on a tiny model: orthogonal, better than its start, and the block as it was."""

import copy
import itertools
import math

import pytest
import torch

import duqpp
import duqpp.methods.learned as module
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import ScaleRule, dequantize, quantize
from duqpp.methods.base import Block, Streams
from duqpp.methods.learned import learn_rotations
from duqpp.methods.refine.blocks import block_loss
from duqpp.methods.refine.latent import RoundedInput
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack
from duqpp.nn import MXFP4Linear
from tests import inputs
from tests.families import GROUPS, LLAMA

CONFIG = QuantizeConfig(method="learned", samples=1)


@pytest.fixture
def job(make_tiny):
    """The stack, its block 0, and what that reads: four batches."""
    stack = DecoderStack(open_source(str(make_tiny("llama"))))
    tokens = torch.randint(0, 300, (16, 512), generator=inputs.generator(1))
    return stack, stack.block(0), stack.first_inputs(tokens)


def learn(module_, config: QuantizeConfig, block_inputs, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rotations for block 0."""
    block = Block.of(module_, 0, config.skip, LLAMA)
    return learn_rotations(
        block, block_inputs, config.build_method().options, inputs.generator(seed)
    )


def output_error(block, exact, block_inputs, batches) -> float:
    """The mean over tokens of the relative squared error of a block's outputs."""
    outputs = list(block_inputs.outputs(block, 0))
    return sum(
        float(
            ((outputs[b] - exact[b]).square().sum(-1) / exact[b].square().sum(-1)).double().mean()
        )
        for b in batches
    )


def test_a_block_without_quantized_linears_has_none(job):
    _, block, block_inputs = job
    config = QuantizeConfig(method="learned", samples=1, skip=("model.layers.0",))
    assert learn(block, config, block_inputs) == {}


@pytest.mark.parametrize("scope", ["shared", "per-block"])
def test_rotations_are_orthogonal_and_lower_the_error_that_they_were_not_trained_on(
    scope, job, monkeypatch
):
    stack, block, block_inputs = job
    config = QuantizeConfig(method="learned", rotation=scope, samples=1)
    exact = list(block_inputs.outputs(block, 0))
    before = copy.deepcopy(block.state_dict())
    errors = {}
    for epochs in (0, 4):
        monkeypatch.setattr(module, "_EPOCHS", epochs)
        found = learn(block, config, block_inputs)
        assert all(torch.equal(v, before[n]) for n, v in block.state_dict().items())
        assert list(found) == [group.name for group in GROUPS]
        for group in GROUPS:
            matrix = found[group.name]
            channels = block.get_submodule(group.linears[0]).in_features
            wanted = (32, 32) if scope == "shared" else (channels // 32, 32, 32)
            assert matrix.shape == wanted
            # Held in float32: 32 products of unit vectors, each rounded a few times.
            torch.testing.assert_close(
                matrix @ matrix.mT, torch.eye(32).double().expand(wanted), rtol=0, atol=1e-5
            )
        rounded = copy.deepcopy(block)
        monkeypatch.setattr(module, "learn_rotations", lambda *_, found=found: found)
        block_of = Block.of(rounded, 0, (), stack.family)
        config.build_method().quantize(block_of, Streams(block_inputs))
        monkeypatch.undo()
        for group in GROUPS:
            stored = rounded.get_submodule(group.linears[0]).rotation
            assert torch.equal(stored, found[group.name].bfloat16())
        errors[epochs] = output_error(rounded, exact, block_inputs, [len(exact) - 1])
    if scope == "shared":  # with one per block, 12 steps gain nothing on a random model
        assert errors[4] < errors[0]


@pytest.mark.parametrize("shape", [(32, 32), (3, 32, 32)], ids=["shared", "per-block"])
def test_a_linear_in_training_computes_what_it_will_when_quantized(shape):
    """y = Q(x R) Q(W R).T + b, where R is orthogonal, so that its inverse is its transpose."""
    x, linear = inputs.gaussian(40, 96, 1), torch.nn.Linear(96, 48)
    start = torch.linalg.qr(inputs.gaussian(math.prod(shape[:-1]), 32, 2).view(shape)).Q
    rotation = module.Rotation(start)
    rounded_input = RoundedInput(rotation, ScaleRule.EVEN, 1)
    stand_in = module.RotatedLinear(linear, rotation, rounded_input, ScaleRule.MSE)
    matrix = torch.block_diag(*start.expand(3, 32, 32))
    rounded_x = dequantize(quantize(x @ matrix, rule=ScaleRule.EVEN))
    weight = dequantize(quantize(linear.weight.detach() @ matrix, rule=ScaleRule.MSE))
    expected = rounded_x @ weight.T + linear.bias.detach()
    found = stand_in(x).detach()
    # A value at a midpoint may round to the other side: few do, by a step of one block each.
    assert (found - expected).norm() < 0.02 * expected.norm()
    exact = x @ linear.weight.detach().T + linear.bias.detach()
    assert 0.02 * exact.norm() < (found - exact).norm() < 0.3 * exact.norm()


def test_the_start_is_a_hadamard_with_random_signs(job, monkeypatch):
    monkeypatch.setattr(module, "_EPOCHS", 0)
    _, block, block_inputs = job
    signs = []
    for seed in (0, 1):
        found = learn(block, CONFIG, block_inputs, seed)
        matrix = found["qkv"]
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(32)), atol=1e-6)
        signs.append(matrix.sign())
    assert not torch.equal(*signs)


def test_a_start_that_is_best_is_kept(job, monkeypatch):
    """Each loss is made to look worse than the one before it."""
    _, block, block_inputs = job
    losses = itertools.count()

    def rising(*arguments):
        loss = block_loss(*arguments)
        return lambda batch: loss(batch) + next(losses)

    monkeypatch.setattr(module, "block_loss", rising)
    learned = learn(block, CONFIG, block_inputs)
    monkeypatch.setattr(module, "_EPOCHS", 0)
    start = learn(block, CONFIG, block_inputs)
    # Two epochs that bring nothing are enough: steps, evaluations, and that of the second call.
    assert next(losses) == 2 * 3 + 3 + 1
    assert all(torch.equal(learned[name], start[name]) for name in start)


@pytest.mark.parametrize("options", [{}, {"gptq": True, "rotation": "per-block"}])
def test_a_model_quantized_with_learned_rotations(options, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 4 * 64)
    config = QuantizeConfig(method="learned", samples=10, seq_len=64, **options)
    tokens = torch.randint(0, 300, (10, 64), generator=inputs.generator(2))
    made = []
    for name in ("one", "two"):
        duqpp.quantize_model(str(tiny_llama), tmp_path / name, config, calibration=tokens)
        made.append({f.name: f.read_bytes() for f in (tmp_path / name).glob("*.safetensors")})
    assert made[0] == made[1]
    model = duqpp.from_pretrained(tmp_path / "one")
    linears = [m for m in model.modules() if isinstance(m, MXFP4Linear)]
    assert len(linears) == 14
    for linear in linears:
        gram = linear.rotation.double() @ linear.rotation.double().mT
        # Rounded to bfloat16, 32 products at a relative error of 2^-8 at most, of either sign.
        assert (gram - torch.eye(32).double()).abs().max() < 2**-5
    with torch.no_grad():
        assert model(tokens[:1, :48]).logits.isfinite().all()


def test_skipped_linears_stay_exact(job):
    _, block, block_inputs = job
    config = QuantizeConfig(method="learned", samples=1, skip=("down_proj", "k_proj"))
    found = learn(block, config, block_inputs)
    assert list(found) == ["qkv", "o", "gate_up"]


def test_one_batch_is_too_few(job):
    _, block, block_inputs = job
    with pytest.raises(InputError, match="needs more calibration text"):
        learn(block, CONFIG, block_inputs.first(1))


def test_smoothing_is_refused():
    with pytest.raises(InputError, match="learned trains rotations alone"):
        QuantizeConfig(method="learned", smooth_alpha=0.5)
