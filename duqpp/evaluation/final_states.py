"""What enters a model's head: by a whole transformers model, or by a stack block by block."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.errors import refusing
from duqpp.evaluation.head import Head
from duqpp.job.overlap import ahead
from duqpp.job.plan import memory_of_passes
from duqpp.models.shapes import ShapedModel
from duqpp.models.stack import BlockInputs, DecoderStack
from duqpp.placement.devices import fitting, rest_for

WINDOW = "the model with one window of `seq_len` tokens"  # that must fit into a GPU's memory


@contextmanager
def _reading(device: torch.device) -> Iterator[None]:
    """What a model raises where it cannot read the text, as one quantized by others may."""
    with refusing("the model cannot read the text"), fitting(WINDOW, device):
        yield


def rounds(model: Any) -> int:
    """How often the windows are gone through before the head: once for each block of a stack."""
    return len(model) if isinstance(model, DecoderStack) else 0


def final_states(
    model: Any, windows: Tensor, step: Callable[[], None]
) -> tuple[Head, Iterator[Tensor]]:
    """A model's head, and the states [seq_len, hidden size] of each window that it is for.

    A stack gives what the whole model gives, bit by bit: windows go through its blocks one by one.
    It keeps the states of all windows, on the GPU where there is room, and the weights of one block
    at a time, beside those of the next one, which is read meanwhile.

    Args:
        model: a transformers causal language model, or a stack.
        windows: int64 [windows, seq_len].
        step: called before each of the `rounds` goes through a window.
    Raises: InputError, CheckpointError when weights cannot be read, or do not fit each other.
    """
    if not isinstance(model, DecoderStack):
        with _reading(model.device):
            head = Head.of(model)
        return head, (_whole(model, window[None]) for window in windows)

    def needed() -> float:
        shaped = ShapedModel(model.config, model.dtype, windows.shape[1])
        return memory_of_passes(shaped, len(windows))

    placement = rest_for(model.placement, needed)
    with _reading(model.device):
        inputs = model.first_inputs(windows, batch=1, placement=placement)
    with closing(ahead(model.read, range(len(model)))) as weights:
        for index in range(len(model)):
            _advance(inputs, model.block(index, next(weights)), index, step)
    norm, lm_head = model.head()
    return Head(lm_head), _normalized(norm, inputs)


@torch.no_grad()
def _whole(model: Any, ids: Tensor) -> Tensor:
    with _reading(model.device):
        out = model.base_model(input_ids=ids.to(model.device), use_cache=False)
    states: Tensor = out.last_hidden_state[0]
    return states


@torch.no_grad()
def _advance(inputs: BlockInputs, block: nn.Module, index: int, step: Callable[[], None]) -> None:
    """Replace the states of each window by the block's outputs for them."""
    for window in range(len(inputs.hidden)):
        step()
        with _reading(inputs.placement.compute):
            inputs.hidden[window] = inputs.placement.rested(inputs.run(block, index, window))


@torch.no_grad()
def _normalized(norm: nn.Module, inputs: BlockInputs) -> Iterator[Tensor]:
    """The states of each window behind the last norm; they are let go of in turn."""
    while inputs.hidden:
        hidden = inputs.hidden.pop(0)
        yield norm(hidden.to(inputs.placement.compute))[0]
