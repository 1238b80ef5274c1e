"""Decoder blocks that run one at a time."""

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from duqpp.checkpoint.layout import Layout, convert_block
from duqpp.errors import InputError
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack, check_finite
from tests.families import FAMILIES, GROUPS

TOKENS = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite(value, dtype):
    x = torch.randn(5, 7).to(dtype)
    check_finite(x, "x")
    check_finite(x[:0], "x")
    for place in ((0, 0), (4, 6), (2, 3)):
        y = x.clone()
        y[place] = value
        with pytest.raises(InputError, match=r"^some weight has NaN or infinite values$"):
            check_finite(y, "some weight")


def outputs_of_blocks(model) -> list[torch.Tensor]:
    """What each block of a transformers model gives for TOKENS."""
    outputs = []
    handles = [
        layer.register_forward_hook(
            lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model.eval()(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_give_what_the_model_gives(family, dtype, make_tiny):
    folder = make_tiny(family, "60KB", num_hidden_layers=3)
    expected = outputs_of_blocks(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    stack = DecoderStack(open_source(str(folder)), dtype=dtype)
    assert len(stack) == 3
    inputs = stack.first_inputs(TOKENS)
    assert inputs.tokens == TOKENS.numel()
    for index in range(3):
        inputs.advance(stack.block(index), index)
        assert torch.equal(torch.cat(inputs.hidden), expected[index]), index


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_blocks_with_a_sliding_window(family, make_tiny):
    """Some blocks see a window of 8 tokens only, others all: each gets the mask of its kind."""
    options = {"sliding_window": 8}
    if family != "mistral":
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        options |= {"use_sliding_window": True, "layer_types": kinds}
    folder = make_tiny(family, num_hidden_layers=3, **options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = outputs_of_blocks(model)
    stack = DecoderStack(open_source(str(folder)))
    inputs = stack.first_inputs(TOKENS)
    for index in range(3):
        inputs.advance(stack.block(index), index)
        assert torch.equal(torch.cat(inputs.hidden), expected[index]), index
    whole = make_tiny(family, num_hidden_layers=3)
    unlimited = outputs_of_blocks(AutoModelForCausalLM.from_pretrained(whole))
    assert not torch.equal(expected[-1], unlimited[-1]), "the window has no effect in this test"


def test_batches_do_not_change_the_activations(tiny_llama, monkeypatch):
    stack = DecoderStack(open_source(str(tiny_llama)))
    together = stack.first_inputs(TOKENS)
    monkeypatch.setattr("duqpp.models.stack.TOKENS_PER_BATCH", 1)
    apart = stack.first_inputs(TOKENS)
    assert (len(together.hidden), len(apart.hidden)) == (1, 3)
    block = stack.block(0)
    together.advance(block, 0)
    apart.advance(block, 0)
    assert torch.allclose(together.hidden[0], torch.cat(apart.hidden), atol=1e-5)


def test_rest_is_what_is_outside_the_blocks(make_tiny):
    for tied in (False, True):
        folder = make_tiny("llama", tie_word_embeddings=tied)
        stack = DecoderStack(open_source(str(folder)))
        names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        assert set(stack.rest()) == names - ({"lm_head.weight"} if tied else set())


def test_the_stack_keeps_no_weights(tiny_llama):
    stack = DecoderStack(open_source(str(tiny_llama)))
    stack.first_inputs(TOKENS)
    block = stack.block(0)
    assert not any(tensor.is_meta for tensor in block.state_dict().values())
    assert all(tensor.is_meta for tensor in stack.skeleton(0).state_dict().values())
    released = weakref.ref(block)
    del block
    gc.collect()
    assert released() is None


def test_converted_block_has_the_layout_and_no_weights_of_its_own(tiny_llama):
    stack = DecoderStack(open_source(str(tiny_llama)))
    block = stack.block(0)
    layout = Layout("hadamard", "shared", False, "mse", "even", skip=("o_proj",))
    convert_block(block, stack.family.quantized_groups(0, layout.skip), layout)
    state = block.state_dict()
    for group in GROUPS:
        for name in group.linears:
            packed = name != "self_attn.o_proj"
            assert (f"{name}.weight_packed" in state) is packed
            assert (f"{name}.weight" in state) is not packed


def test_batches_can_be_joined_and_taken_from_the_front(tiny_llama):
    stack = DecoderStack(open_source(str(tiny_llama)))
    first, second = (stack.first_inputs(part) for part in TOKENS.split([1, len(TOKENS) - 1]))
    joined = first.joined(second)
    assert joined.tokens == TOKENS.numel()
    front = joined.first(1)
    assert front.hidden[0] is first.hidden[0]
    block = stack.block(0)
    front.advance(block, 0)
    assert joined.hidden[0] is first.hidden[0], "advancing one must leave the other"
    joined.advance(block, 0)
    assert torch.equal(front.hidden[0], joined.hidden[0])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_gives_the_models_logits(tied, make_tiny):
    folder = make_tiny("llama", tie_word_embeddings=tied)
    stack = DecoderStack(open_source(str(folder)))
    inputs = stack.first_inputs(TOKENS)
    for index in range(len(stack)):
        inputs.advance(stack.block(index), index)
    with torch.no_grad():
        logits = stack.head()(torch.cat(inputs.hidden))
        expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
