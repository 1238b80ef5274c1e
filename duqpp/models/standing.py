"""Modules of a decoder block whose outputs are known, so that nothing inside of them runs again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Known:
    """What a module gives, batch by batch in their order.

    outputs: of its last linear, where activations rest. returns: what the module makes of one.
    """

    outputs: list[Tensor]
    returns: Callable[[Tensor], Any]


@contextmanager
def standing_in(
    block: nn.Module, known: Mapping[str, Known], device: torch.device
) -> Iterator[None]:
    """Let what is known take the place of these modules, for one pass over all batches.

    Args: known: by name in the block. device: where the block computes.
    """
    replaced = {name: block.get_submodule(name) for name in known}
    try:
        for name, given in known.items():
            block.set_submodule(name, _StandIn(given, device))
        yield
    finally:
        for name, module in replaced.items():
            block.set_submodule(name, module)


class _StandIn(nn.Module):
    """Gives the outputs of the module that it stands for, one a call."""

    def __init__(self, known: Known, device: torch.device) -> None:
        super().__init__()
        self._known, self._device, self._calls = known, device, count()

    def forward(self, *_: Any, **__: Any) -> Any:
        output = self._known.outputs[next(self._calls)]
        return self._known.returns(output.to(self._device))
