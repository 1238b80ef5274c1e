"""Families of models: which linears of a decoder block read one input, and what makes that input.

A family is a subclass of `Family`, registered in `FAMILIES`. Whatever depends on a family, the
tests included, asks that registry.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from duqpp.calibration.smoothing import (
    per_repeated_channel,
    per_source_channel,
    representable,
)
from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE

_MOST_BLOCKS = 2000  # the largest model that is released has 126


class Producer(Protocol):
    """What makes the input of a linear group, and can take up a scale for each of its channels."""

    def absorb(self, block: nn.Module, weights: dict[str, Tensor], scales: Tensor) -> Tensor | None:
        """Divide the channels by scales.

        Args:
            block: float; its norms and biases change in place, and keep their dtype.
            weights: of the block's linears that are to be quantized, float32 [N, K] by name. They
                change here, not in the block.
            scales: float64 [channels].
        Returns: the scales that the divided channels stand for, which may differ from those given
            by a rounding; None where the producer can take up none, and nothing has changed.
        """


@dataclass(frozen=True)
class Norm:
    """A norm that ends in a product with its weight: y = normalized(x) * weight."""

    name: str

    def absorb(self, block: nn.Module, weights: dict[str, Tensor], scales: Tensor) -> Tensor | None:
        """As `Producer.absorb`; a norm always can."""
        weight = block.get_submodule(self.name).weight
        scales = representable(scales, weight)
        weight.data = _divided(weight, scales)
        return scales


@dataclass(frozen=True)
class Rows:
    """Output rows of a linear, whose way to the group commutes with a scale for each of them.

    Only a linear that is quantized too can absorb, as the scale would round a stored weight.

    rows: the first, and the one past the last; all by default.
    """

    name: str
    rows: tuple[int | None, int | None] = (None, None)

    def absorb(self, block: nn.Module, weights: dict[str, Tensor], scales: Tensor) -> Tensor | None:
        """As `Producer.absorb`."""
        if self.name not in weights:
            return None
        weight, bias = weights[self.name], block.get_submodule(self.name).bias
        rows = slice(*self.rows)
        if bias is not None:
            scales = representable(scales, bias[rows])
        divisor = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
        divisor[rows] = scales
        weights[self.name] = (weight / divisor[:, None]).float()
        if bias is not None:
            bias.data = _divided(bias, divisor)
        return scales


def _divided(stored: Tensor, scales: Tensor) -> Tensor:
    return (stored.detach().double() / scales).to(stored.dtype)


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a decoder block that read one input; they share the rotation and the Hessian.

    linears: names inside the block.
    producer: of the input; None where nothing can take up a scale for each channel.
    repeats, width: the input is the producer's channels, each run of `width` of them `repeats`
        times, as several query heads read one value head.
    reads: what the configuration calls the number of the input's channels, as in `Family.widths`.
    expert: of a mixture, the one that the linears belong to: they see only the tokens that are sent
        there, perhaps none. None for linears that see every token.
    returns: what the owner returns for the output of the group's only linear, where that is the
        last thing that it computes; else None.
    is_whole: whether all linears that read the input are among `linears`: only then can they
        share it when it is quantized, and its channels be scaled.
    """

    name: str
    linears: tuple[str, ...]
    producer: Producer | None = None
    repeats: int = 1
    width: int = 1
    expert: int | None = None
    reads: str = ""
    returns: Callable[[Tensor], Any] | None = None
    is_whole: bool = True

    @property
    def owner(self) -> str:
        """The module whose forward hands the input to each of the linears."""
        return self.linears[0].rpartition(".")[0]

    @property
    def shares_input(self) -> bool:
        """Whether the input is quantized once for several linears."""
        return self.is_whole and len(self.linears) > 1

    @property
    def label(self) -> str:
        """The linears in few words, for people: "gate, up"."""
        leaves = (name.rpartition(".")[2] for name in self.linears)
        return ", ".join(leaf.removesuffix("_proj") for leaf in leaves)

    def per_source(self, amax: Tensor) -> Tensor:
        """From the largest magnitudes of the input's channels [K] to those of the producer's."""
        return per_source_channel(amax, repeats=self.repeats, head_dim=self.width)

    def per_reader(self, scales: Tensor) -> Tensor:
        """From scales of the producer's channels to those of the input's [K]."""
        return per_repeated_channel(scales, repeats=self.repeats, head_dim=self.width)


class Stored(NamedTuple):
    """Where a tensor of the model is kept in a source: the tensor `name` there, at `part` of it."""

    name: str
    part: slice | tuple[slice | int, ...] = ()


class Family(ABC):
    """The decoder blocks of one model, as its configuration describes them.

    model_types: of the configurations, as transformers names them.
    body: the module that holds the embedding, the blocks and the last norm.
    """

    model_types: ClassVar[tuple[str, ...]]
    body: ClassVar[str] = "model"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def groups(self, index: int) -> tuple[LinearGroup, ...]:
        """Every linear of decoder block `index`, by its input, in the order of the forward pass."""

    @abstractmethod
    def widths(self) -> dict[str, int]:
        """The numbers of input channels K of all linears, by what the configuration calls them."""

    def stored(self, name: str) -> Stored:
        """Where a source keeps a tensor of the model; here under its own name, whole."""
        return Stored(name)

    @property
    def blocks(self) -> str:
        """Name of the list of decoder blocks in the model."""
        return f"{self.body}.layers"

    def block_name(self, index: int) -> str:
        """Name of a decoder block in the model."""
        return f"{self.blocks}.{index}"

    def quantized_groups(self, index: int, skip: Sequence[str]) -> tuple[LinearGroup, ...]:
        """The groups of block `index` with the linears that are quantized, empty ones left out."""
        groups = []
        for group in self.groups(index):
            kept = tuple(
                linear
                for linear in group.linears
                if not is_skipped(f"{self.block_name(index)}.{linear}", skip)
            )
            if kept:
                groups.append(replace(group, linears=kept, is_whole=kept == group.linears))
        return tuple(groups)

    def quantized_linears(self, skip: Sequence[str]) -> Iterator[str]:
        """Names in the model of all linears that are quantized, in order of the forward pass."""
        for index in range(self.config.num_hidden_layers):
            for group in self.quantized_groups(index, skip):
                yield from (f"{self.block_name(index)}.{linear}" for linear in group.linears)

    def group_of(self, name: str) -> tuple[int, LinearGroup] | None:
        """The block and the group of a linear; None where this is the name of none.

        Args: name: in the model, or in one that wraps it, which has a prefix before it.
        """
        _, _, place = f".{name}".partition(f".{self.blocks}.")
        index, _, linear = place.partition(".")
        if not index.isdecimal():
            return None
        found = (group for group in self.groups(int(index)) if linear in group.linears)
        return next(((int(index), group) for group in found), None)

    def kinds(self) -> dict[str, str]:
        """The groups that occur in the model: name to label, in the order of the forward pass."""
        blocks = range(self.config.num_hidden_layers)
        return {group.name: group.label for index in blocks for group in self.groups(index)}

    def check_sizes(self, skip: Sequence[str]) -> None:
        """Raise InputError unless the sizes are positive, and each K is a multiple of 32.

        Args: skip: of the linears, those that are not quantized and may have any K.
        """
        for name in _SIZES:
            value = getattr(self.config, name, None)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        blocks = range(self.config.num_hidden_layers)
        read = {group.reads for index in blocks for group in self.quantized_groups(index, skip)}
        for name, width in self.widths().items():
            if name in read and width % BLOCK_SIZE:
                raise InputError(
                    f"{name} is {width}; MXFP4 needs a multiple of {BLOCK_SIZE} (`skip` leaves out "
                    "the linears that read it)"
                )

    def check(self, skip: Sequence[str]) -> None:
        """`check_sizes`, and that a skip list names linears of the model, and leaves some."""
        self.check_sizes(skip)
        linears = list(self.quantized_linears(()))
        for entry in skip:
            if entry != "lm_head" and not any(is_skipped(name, (entry,)) for name in linears):
                raise InputError(f"`skip`: {entry} names no linear of the model")
        if not any(self.quantized_linears(skip)):
            raise InputError(f"`skip`: {', '.join(skip)} leaves no linear to quantize; skip fewer")


_SIZES = ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a skip list has a module: an entry is a run of whole components of its name."""
    return any(f".{entry}." in f".{name}." for entry in skip)


def _as_it_is(output: Tensor) -> Tensor:
    return output


def _without_attention_weights(output: Tensor) -> tuple[Tensor, None]:
    return output, None


class Llama(Family):
    """Llama, and what is built like it: attention with separate projections, and a gated MLP."""

    model_types = ("llama", "mistral", "qwen2", "qwen3")

    def groups(self, index: int) -> tuple[LinearGroup, ...]:
        # v_proj's channels reach o_proj through a weighted sum over tokens, up_proj's reach
        # down_proj times silu(gate): both commute with a scale per channel.
        config = self.config
        return (
            LinearGroup(
                "qkv",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                Norm("input_layernorm"),
                reads="hidden_size",
            ),
            LinearGroup(
                "o",
                ("self_attn.o_proj",),
                Rows("self_attn.v_proj"),
                repeats=config.num_attention_heads // config.num_key_value_heads,
                width=self.head_dim,
                reads="num_attention_heads * head_dim",
                returns=_without_attention_weights,
            ),
            LinearGroup(
                "gate_up",
                ("mlp.gate_proj", "mlp.up_proj"),
                Norm("post_attention_layernorm"),
                reads="hidden_size",
            ),
            LinearGroup(
                "down",
                ("mlp.down_proj",),
                Rows("mlp.up_proj"),
                reads="intermediate_size",
                returns=_as_it_is,
            ),
        )

    def widths(self) -> dict[str, int]:
        config = self.config
        return {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads * head_dim": config.num_attention_heads * self.head_dim,
        }

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        config = self.config
        head_dim: int | None = getattr(config, "head_dim", None)
        return head_dim or int(config.hidden_size // config.num_attention_heads)


# By model_type of transformers.
FAMILIES: dict[str, type[Family]] = {
    model_type: family for family in (Llama,) for model_type in family.model_types
}


def check_blocks(count: Any) -> None:
    """Raise InputError for a number of decoder blocks that nobody could build in a day."""
    if isinstance(count, int) and count > _MOST_BLOCKS:
        raise InputError(f"num_hidden_layers of config.json is {count}, and at most {_MOST_BLOCKS}")


def is_known(kind: Any) -> TypeGuard[str]:
    """Whether a `model_type` is that of a family."""
    return isinstance(kind, str) and kind in FAMILIES


def family_of(config: Any) -> Family:
    """The family of a model. Raises: InputError for a configuration of none that duqpp knows."""
    kind = getattr(config, "model_type", None)
    if not is_known(kind):
        raise InputError(
            f"model_type {kind!r} is not supported; duqpp quantizes {', '.join(FAMILIES)}"
        )
    check_blocks(getattr(config, "num_hidden_layers", None))
    return FAMILIES[kind](config)
