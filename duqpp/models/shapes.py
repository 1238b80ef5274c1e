"""A model without weights: its decoder blocks run on tensors that have a shape and no memory.

What a pass takes, in operations and in memory, is then counted from what it really does, whatever
the family.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from duqpp.models.family import family_of
from duqpp.models.stack import TOKENS_PER_BATCH, DecoderStack
from duqpp.placement import HOST


@dataclass(frozen=True)
class Forward:
    """One pass of a float block over a batch. tokens: of the batch. bytes: the most that is in
    memory beside the weights. operations: floating-point ones.
    """

    tokens: int
    bytes: int
    operations: int


class ShapedModel:
    """A model by its configuration alone.

    config: transformers configuration. dtype: of every tensor. seq_len: tokens of the sequences
    that its blocks run on. family: of the model. blocks: on the meta device. kinds: what tells them
    apart, the names and shapes of what each has stored.

    Raises: InputError for a configuration of no model that duqpp knows.
    """

    def __init__(self, config: Any, dtype: torch.dtype, seq_len: int) -> None:
        self.config, self.dtype, self.seq_len = config, dtype, seq_len
        self.family = family_of(config)
        self._batch = max(1, TOKENS_PER_BATCH // seq_len), seq_len
        with _without_memory():
            self._stack = DecoderStack(_Shapes(config, dtype), dtype)
            self._inputs = self._stack.first_inputs(
                torch.zeros(self._batch, dtype=torch.int64, device=HOST)
            )
        for arguments in self._inputs.arguments[0]:
            arguments["attention_mask"] = None  # which real tokens without padding have not
        self.blocks = [self._stack.skeleton(index) for index in range(len(self._stack))]
        self.kinds = [
            tuple((name, tensor.shape) for name, tensor in block.state_dict().items())
            for block in self.blocks
        ]
        self._forwards: dict[Any, Forward] = {}

    def rest(self) -> dict[str, torch.Size]:
        """Shapes of what is outside of the blocks, by name."""
        return self._stack.rest_shapes

    def forward(self, index: int) -> Forward:
        """What one pass of block `index` over a batch takes."""
        kind = self.kinds[index]
        if kind not in self._forwards:
            self._forwards[kind] = self._counted(index)
        return self._forwards[kind]

    def _counted(self, index: int) -> Forward:
        with _without_memory():
            block = copy.deepcopy(self.blocks[index])
            stored = block.state_dict()
            empty = {name: torch.empty_like(t, device=HOST) for name, t in stored.items()}
            block.load_state_dict(empty, assign=True)
            with _Ledger() as ledger, _counter() as counter:
                self._inputs.run(block, index, 0)
        batch, seq_len = self._batch
        return Forward(batch * seq_len, ledger.peak, counter.get_total_flops())


def _counter() -> FlopCounterMode:
    """torch's own, which counts a GPU's attention by itself, and the CPU's not."""

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        count: int = sdpa_flop_count(q, k, v)
        return count

    own = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    return FlopCounterMode(display=False, custom_mapping=own)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Tensors that are made here have no memory, and compute nothing."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


class _Shapes:
    """A `Source` of tensors without memory."""

    names: frozenset[str] = frozenset()

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config, self._dtype = config, dtype

    def tensor(self, name: str) -> Tensor:
        """The embedding: nothing else is asked for."""
        shape = self.config.vocab_size, self.config.hidden_size
        return torch.empty(shape, dtype=self._dtype, device=HOST)

    def tokenizer(self) -> Any:
        raise NotImplementedError

    def generation_config(self) -> Any | None:
        raise NotImplementedError


class _Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive of those made inside. peak: the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._alive = 0, 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor) and id(made.untyped_storage()) not in given:
                self._add(made.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, count: int) -> None:
        self._alive -= count
