"""Decoder blocks that run one at a time, and the activations between them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.errors import InputError
from duqpp.models.family import Family, family_of
from duqpp.models.source import Source
from duqpp.models.weights import empty_model
from duqpp.placement import ON_HOST, Placement
from duqpp.placement.ranks import Ranks
from duqpp.placement.stages import stage

TOKENS_PER_BATCH = 2048  # of a forward pass through one block; more only leaves the cache


class DecoderStack:
    """The decoder blocks of a source, run one at a time; the stack keeps the weights of none.

    source, config, family: what the blocks are built from. dtype: what they compute in. placement:
    where they compute, and where activations rest.

    Args:
        source: the float model.
        dtype: None is the dtype of the embedding.
    Raises: InputError when there is no such model, or the source lacks its embedding.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype | None = None,
        placement: Placement = ON_HOST,
    ) -> None:
        self.source, self.config, self.placement = source, source.config, placement
        self.family = family_of(self.config)
        embedding = _stored(source, self.family, f"{self.family.body}.embed_tokens.weight")
        self.dtype = dtype or embedding.dtype
        skeleton: Any = empty_model(self.config, self.dtype)
        tied = getattr(skeleton, "all_tied_weights_keys", {})
        self._rest = {
            name: tensor
            for name, tensor in skeleton.state_dict().items()
            if not name.startswith(f"{self.family.blocks}.") and name not in tied
        }
        self._body = skeleton.get_submodule(self.family.body)
        self._blocks = self._body.layers
        # Its buffers are computed, not stored, and on the meta device they were not.
        self._rotary = type(self._body.rotary_emb)(config=self.config).to(placement.compute)
        self._embedding = embedding.to(placement.compute, self.dtype)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def device(self) -> torch.device:
        """Where blocks compute, as transformers calls it of a whole model."""
        return self.placement.compute

    def skeleton(self, index: int) -> nn.Module:
        """A block like `index` on the meta device, in eval mode, for weights from elsewhere."""
        return copy.deepcopy(self._blocks[index]).eval()

    def read(self, index: int) -> dict[str, Tensor]:
        """The float weights of block `index` on the host, by their names in it.

        They are in memory from which they are copied beside what a GPU computes. Another thread may
        call this.

        Raises: InputError when a tensor is missing, misshapen, or has NaN or infinite values.
        """
        prefix = self.family.block_name(index)
        expected = self._blocks[index].state_dict()
        with stage("reading", index):
            weights = {n: self._tensor(f"{prefix}.{n}", e) for n, e in expected.items()}
            return {name: self.placement.staged(weight) for name, weight in weights.items()}

    def block(self, index: int, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Block `index` with its weights, in eval mode; whoever has it keeps them.

        Args: weights: what `read` has given; None to read them now.
        Raises: as `read` does.
        """
        weights = self.read(index) if weights is None else weights
        block = self.skeleton(index)
        there = {name: self.placement.fetched(weight) for name, weight in weights.items()}
        block.load_state_dict(there, assign=True)
        return block.requires_grad_(False)

    @property
    def rest_shapes(self) -> dict[str, torch.Size]:
        """Shapes of what is outside the blocks, by name."""
        return dict(self._rest)

    @stage("reading")
    def rest(self) -> dict[str, Tensor]:
        """Everything outside the blocks: embeddings, the final norm, an untied lm_head.

        Raises: as `block` does.
        """
        return {name: self._tensor(name, expected) for name, expected in self._rest.items()}

    def head(self) -> nn.Module:
        """From the last block's outputs to logits: the final norm, and lm_head or its tied twin.

        Raises: as `block` does.
        """
        norm = copy.deepcopy(self._body.norm)
        weight = self._tensor(f"{self.family.body}.norm.weight", norm.weight)
        norm.load_state_dict({"weight": weight.to(self.placement.compute)}, assign=True)
        untied = "lm_head.weight" in self._rest
        rows = self._tensor("lm_head.weight", self._rest["lm_head.weight"]) if untied else None
        head = nn.Linear(*reversed(self._embedding.shape), bias=False, device="meta")
        rows = self._embedding if rows is None else rows.to(self.placement.compute)
        head.weight = nn.Parameter(rows)
        return nn.Sequential(norm, head).requires_grad_(False)

    def _tensor(self, name: str, expected: Tensor) -> Tensor:
        tensor = _stored(self.source, self.family, name).to(self.dtype)
        if tensor.shape != expected.shape:
            raise InputError(f"{name} must be {list(expected.shape)}, got {list(tensor.shape)}")
        check_finite(tensor, name)
        return tensor

    @stage("tokens")
    def first_inputs(
        self, tokens: Tensor, batch: int | None = None, placement: Placement | None = None
    ) -> "BlockInputs":
        """What block 0 reads for token sequences int64 [samples, seq_len], in batches.

        Args:
            batch: sequences in one forward pass; by default, those of `TOKENS_PER_BATCH` tokens.
            placement: where activations rest, if elsewhere than the stack's own says.
        Raises: InputError when there is not a batch for each rank.
        """
        batches = _own_batches(tokens, batch, self.placement.ranks)
        probes = nn.ModuleList(_Probe() for _ in self._blocks)
        layers, norm = self._body.layers, self._body.norm
        self._body.layers, self._body.norm = probes, nn.Identity()
        self._body.rotary_emb = self._rotary
        self._body.embed_tokens.weight = nn.Parameter(self._embedding, requires_grad=False)
        inputs = BlockInputs([], [], placement or self.placement)
        # Positions and masks depend on the shape alone: batches of one shape share them.
        arguments: dict[int, list[dict[str, Any]]] = {}
        with torch.no_grad():
            for part in batches:
                self._body(input_ids=part.to(self.placement.compute), use_cache=False)
                inputs.hidden.append(inputs.placement.rested(probes[0].hidden_states))
                own = [probe.arguments for probe in probes]
                inputs.arguments.append(arguments.setdefault(len(part), own))
        self._body.layers, self._body.norm = layers, norm
        self._body.embed_tokens.weight = nn.Parameter(
            torch.empty_like(self._embedding, device="meta"), requires_grad=False
        )
        return inputs


def _stored(source: Source, family: Family, name: str) -> Tensor:
    """A tensor of the model as the source has it."""
    stored = family.stored(name)
    return source.tensor(stored.name)[stored.part]


def _own_batches(tokens: Tensor, batch: int | None, ranks: Ranks) -> Sequence[Tensor]:
    """Sequences in batches: of several ranks each has a run of them, in their order."""
    batch = batch or max(1, TOKENS_PER_BATCH // tokens.shape[1])
    batches: Sequence[Tensor] = tokens.split(batch)
    if len(batches) < ranks.count:
        raise InputError(
            f"{ranks.count} ranks need {batch * (ranks.count - 1) + 1} calibration sequences, "
            f"{batch} a batch, and there are {len(tokens)}: start fewer ranks, or raise `samples` "
            "(with `refine`: `refine_samples`)"
        )
    return batches[ranks.share(len(batches))]


@dataclass
class BlockInputs:
    """Activations that enter a decoder block, in batches, with the block's other arguments.

    hidden: float [batch, seq_len, hidden_size] each, where activations rest. arguments: per batch
    and block, its keywords, where blocks compute. placement: both of these.
    """

    hidden: list[Tensor]
    arguments: list[list[dict[str, Any]]]
    placement: Placement = ON_HOST

    def run(self, block: nn.Module, index: int, batch: int) -> Tensor:
        """The output of block `index` for a batch, where blocks compute."""
        hidden = self.placement.fetched(self.hidden[batch])
        out = block(hidden, **self.arguments[batch][index])
        return out[0] if isinstance(out, tuple) else out

    def outputs(self, block: nn.Module, index: int) -> Iterator[Tensor]:
        """Run a block over the batches, one at a time; what it gives is put to rest."""
        with torch.no_grad():
            for batch in range(len(self.hidden)):
                yield self.placement.rested(self.run(block, index, batch))

    def joined(self, other: "BlockInputs") -> "BlockInputs":
        """These batches, and then those of `other`."""
        return replace(
            self,
            hidden=[*self.hidden, *other.hidden],
            arguments=[*self.arguments, *other.arguments],
        )

    def first(self, batches: int) -> "BlockInputs":
        """The first batches alone; the tensors are shared."""
        return replace(self, hidden=self.hidden[:batches], arguments=self.arguments[:batches])

    def after(self, batches: int) -> "BlockInputs":
        """Without the first batches; the tensors are shared."""
        return replace(self, hidden=self.hidden[batches:], arguments=self.arguments[batches:])

    def run_up_to(self, block: nn.Module, index: int, last: nn.Module) -> None:
        """Run a block over the batches only until `last` gets its input, for its hooks' sake."""

        def stop(*_: Any) -> None:
            raise _LastInputSeenError

        handle = last.register_forward_pre_hook(stop)  # runs after the hooks that are there already
        try:
            with torch.no_grad():
                for batch in range(len(self.hidden)):
                    with suppress(_LastInputSeenError):
                        self.run(block, index, batch)
        finally:
            handle.remove()

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the activations by the block's outputs for them."""
        for batch, out in enumerate(self.outputs(block, index)):
            self.hidden[batch] = out

    @property
    def tokens(self) -> int:
        """How many tokens there are in all."""
        return sum(h.shape[0] * h.shape[1] for h in self.hidden)


class _LastInputSeenError(Exception):
    """Ends a forward pass whose remaining work is not needed."""


class _Probe(nn.Module):
    """Stands in for a decoder block and remembers how it was called."""

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden_states, self.arguments = hidden_states, arguments
        return hidden_states


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise InputError, with the name, when a tensor has a NaN or an infinity."""
    # aminmax propagates NaN, and is one pass without a temporary of the tensor's size.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise InputError(f"{name} has NaN or infinite values")
