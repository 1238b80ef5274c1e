"""What enters a model's head: by a whole transformers model, or by a stack block by block."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.errors import refusing
from duqpp.models.stack import BlockInputs, DecoderStack

_READING = "the model cannot read the text"  # as one quantized by others may say


def rounds(model: Any) -> int:
    """How often the windows are gone through before the head: once for each block of a stack."""
    return len(model) if isinstance(model, DecoderStack) else 0


def final_states(
    model: Any, windows: Tensor, step: Callable[[], None]
) -> tuple[nn.Linear, Iterator[Tensor]]:
    """A model's lm_head, and the states [seq_len, hidden size] of each window that it is for.

    A stack gives what the whole model gives, bit by bit: windows go through its blocks one by one.
    It keeps the states of all windows, and the weights of one block at a time.

    Args:
        model: a transformers causal language model, or a stack.
        windows: int64 [windows, seq_len].
        step: called before each of the `rounds` goes through a window.
    Raises: InputError, CheckpointError when weights cannot be read, or do not fit each other.
    """
    if not isinstance(model, DecoderStack):
        with refusing(_READING):
            head = model.lm_head
        return head, (_whole(model, window[None]) for window in windows)
    with refusing(_READING):
        inputs = model.first_inputs(windows, batch=1)
    for index in range(len(model)):
        _advance(inputs, model.block(index), index, step)
    norm, lm_head = model.head()
    return lm_head, _normalized(norm, inputs)


@torch.no_grad()
def _whole(model: Any, ids: Tensor) -> Tensor:
    with refusing(_READING):
        out = model.model(input_ids=ids.to(model.device), use_cache=False)
    states: Tensor = out.last_hidden_state[0]
    return states


@torch.no_grad()
def _advance(inputs: BlockInputs, block: nn.Module, index: int, step: Callable[[], None]) -> None:
    """Replace the states of each window by the block's outputs for them."""
    for window in range(len(inputs.hidden)):
        step()
        with refusing(_READING):
            states = inputs.run(block, index, window)
            inputs.hidden[window] = states.to(inputs.placement.storage)


@torch.no_grad()
def _normalized(norm: nn.Module, inputs: BlockInputs) -> Iterator[Tensor]:
    """The states of each window behind the last norm; they are let go of in turn."""
    while inputs.hidden:
        hidden = inputs.hidden.pop(0)
        yield norm(hidden.to(inputs.placement.compute))[0]
