"""MXFP4Linear inside a tiny Llama: what is quantized how often, gradients, torch.compile."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from duqpp.config import QuantizeConfig
from duqpp.methods.base import Block, Streams
from duqpp.models.family import family_of
from duqpp.nn import MXFP4Linear
from duqpp.ops.reference import ReferenceBackend
from tests import inputs, oracle
from tests.families import FAMILIES

LAYERS = 2
LINEARS = 7  # in a layer: q, k, v, o, gate, up, down
INPUTS = 4  # that they read: q,k,v / o / gate,up / down


@pytest.fixture
def quantized(make_tiny):
    """Factory: ``quantized(model_type, layers=..., **options of QuantizeConfig)``, uncalibrated."""

    def make(model_type: str = "llama", layers: int = LAYERS, **options):
        folder = make_tiny(model_type, num_hidden_layers=layers)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        config = QuantizeConfig(**({"method": "hadamard"} | options))
        method = config.build_method()
        for index, block in enumerate(model.model.layers):
            method.quantize(Block.of(block, index, config.skip, family_of(model.config)), Streams())
        return model

    return make


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 300, (batch, length), generator=inputs.generator(0))


class CountOps(TorchDispatchMode):
    """Counts the duqpp ops that the dispatcher sees, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "duqpp":
            self.calls[func._schema.name.removeprefix("duqpp::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count_backend_calls(monkeypatch) -> Counter:
    """What reaches the reference backend, by op, with every op sent there."""
    calls: Counter[str] = Counter()
    monkeypatch.setenv("DUQPP_BACKEND", "reference")

    def count(op: str, original) -> None:
        def counting(*args):
            calls[op] += 1
            return original(*args)

        monkeypatch.setattr(ReferenceBackend, op, counting)

    count("rotate_quantize", ReferenceBackend.rotate_quantize)
    count("mxfp4_gemm", ReferenceBackend.mxfp4_gemm)
    return calls


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_each_input_is_quantized_once(model_type, guard, quantized, count_backend_calls):
    model = quantized(model_type)
    with guard(), CountOps() as ops:
        model(tokens())
    assert ops.calls["rotate_quantize"] + ops.calls["mxfp4_linear"] == INPUTS * LAYERS
    assert ops.calls["mxfp4_gemm"] + ops.calls["mxfp4_linear"] == LINEARS * LAYERS
    assert count_backend_calls == {
        "rotate_quantize": INPUTS * LAYERS,
        "mxfp4_gemm": LINEARS * LAYERS,
    }


def test_a_group_with_a_skipped_linear_quantizes_for_each_of_the_others(
    quantized, count_backend_calls
):
    model = quantized(skip=("k_proj", "model.layers.1.mlp"))
    with torch.no_grad():
        model(tokens())
    # Layer 0: q, v, o, gate and up together, down. Layer 1: q, v, o.
    assert count_backend_calls == {"rotate_quantize": 5 + 3, "mxfp4_gemm": 6 + 3}


def test_with_gradients_each_linear_quantizes_for_itself(quantized, count_backend_calls):
    model = quantized()
    model(tokens())
    assert count_backend_calls["rotate_quantize"] == LINEARS * LAYERS


def test_generation_with_a_cache_shares_too(quantized, count_backend_calls):
    model = quantized()
    model.generate(tokens(1), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert count_backend_calls["rotate_quantize"] == 3 * INPUTS * LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_the_same_bits_with_and_without_gradients(dtype, quantized):
    model = quantized().to(dtype)
    with torch.no_grad():
        shared = model(tokens()).logits
    asked = model(tokens()).logits
    assert shared.dtype == dtype
    assert not shared.isnan().any()
    assert asked.requires_grad
    oracle.assert_same(asked, shared, "logits")


def test_gradients_flow_through_every_quantized_layer(quantized):
    model = quantized()
    model(tokens(), labels=tokens()).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    norms = ("input_layernorm", "post_attention_layernorm")
    layers = {f"model.layers.{i}.{norm}.weight" for i in range(LAYERS) for norm in norms}
    assert set(trained) == layers | {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_rotations_stay_bfloat16_when_the_model_changes_its_dtype(quantized):
    model = quantized()
    layers = [m for m in model.modules() if isinstance(m, MXFP4Linear)]
    before = [layer.rotation.clone() for layer in layers]
    assert len(layers) == LINEARS * LAYERS
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert model.dtype == dtype
        for layer, rotation in zip(layers, before, strict=True):
            assert layer.rotation.dtype == torch.bfloat16
            oracle.assert_same(layer.rotation, rotation, f"rotation in a {dtype} model")
            assert layer.weight_packed.dtype == layer.weight_scale.dtype == torch.uint8


def test_names_in_the_state_dict(quantized):
    names = set(quantized("qwen2").model.layers[0].state_dict())
    expected = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    for linear in ("q", "k", "v", "o"):
        expected |= {f"self_attn.{linear}_proj.{n}" for n in ("weight_packed", "weight_scale")}
        expected |= {f"self_attn.{linear}_proj.rotation"}
    expected |= {f"self_attn.{linear}_proj.bias" for linear in ("q", "k", "v")}
    for linear in ("gate", "up", "down"):
        parts = ("weight_packed", "weight_scale", "rotation")
        expected |= {f"mlp.{linear}_proj.{part}" for part in parts}
    assert names == expected


def test_lm_head_and_embeddings_stay_in_floating_point(quantized):
    model = quantized()
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert model.model.embed_tokens.weight.dtype == torch.float32


@pytest.fixture
def compiled():
    """torch.compile into one graph, with the state of the compiler reset around the test.

    A second decoder layer would be compiled like the first, in as much time again.
    """
    torch._dynamo.reset()
    yield lambda model, **options: torch.compile(
        model, fullgraph=True, backend="aot_eager", **options
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"rotation": "per-block", "method": "random"}])
def test_compiles_into_one_graph_with_equal_logits(options, quantized, compiled):
    model = quantized(layers=1, **options)
    with torch.no_grad():
        expected = model(tokens()).logits
        oracle.assert_same(compiled(model)(tokens()).logits, expected, "logits")


def test_compiles_with_any_number_of_tokens(quantized, compiled):
    model = quantized(layers=1)
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for length in (12, 5, 31):
            expected = model(tokens(2, length)).logits
            torch.testing.assert_close(fast(tokens(2, length)).logits, expected)


def test_compiles_into_one_graph_with_equal_gradients(quantized, compiled):
    model = quantized(layers=1)
    expected = model(tokens(), labels=tokens())
    expected.loss.backward()
    embedding = model.model.embed_tokens.weight
    gradient = embedding.grad.clone()
    embedding.grad = None
    result = compiled(model)(tokens(), labels=tokens())
    result.loss.backward()
    oracle.assert_same(result.logits, expected.logits, "logits")
    torch.testing.assert_close(embedding.grad, gradient)
