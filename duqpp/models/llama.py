"""The LLaMA family: decoder blocks, and the groups of linears in them that share one input."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE
from duqpp.models.source import Source, check_family, first_line

_SIZES = ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
TOKENS_PER_BATCH = 2048  # of a forward pass through one block; more only leaves the cache


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a decoder block that read one input; they share the rotation and the Hessian.

    linears, producer: names inside the block. producer: the norm or linear whose output channels
    are the group's input channels, so that it can absorb a channel scale.
    """

    name: str
    linears: tuple[str, ...]
    producer: str

    @property
    def owner(self) -> str:
        """The module whose forward hands the input to each of the linears."""
        return self.linears[0].rpartition(".")[0]


# v_proj's channels reach o_proj through a weighted sum over tokens, up_proj's reach down_proj times
# silu(gate): both commute with a scale per channel.
GROUPS = (
    LinearGroup(
        "qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"
    ),
    LinearGroup("o", ("self_attn.o_proj",), "self_attn.v_proj"),
    LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    LinearGroup("down", ("mlp.down_proj",), "mlp.up_proj"),
)


def layer_prefix(index: int) -> str:
    """Name of a decoder block in the model."""
    return f"model.layers.{index}"


def is_skipped(name: str, skip: tuple[str, ...] | list[str]) -> bool:
    """Whether a skip list has a module: an entry is a run of whole components of its name."""
    return any(f".{entry}." in f".{name}." for entry in skip)


def quantized_groups(index: int, skip: tuple[str, ...] | list[str]) -> list[LinearGroup]:
    """The groups of block `index` with the linears that are quantized; empty groups left out."""
    groups = []
    for group in GROUPS:
        kept = tuple(n for n in group.linears if not is_skipped(f"{layer_prefix(index)}.{n}", skip))
        if kept:
            groups.append(LinearGroup(group.name, kept, group.producer))
    return groups


def is_whole(group: LinearGroup) -> bool:
    """Whether no linear of the group is skipped: then they can share input and smoothing."""
    return any(group.linears == whole.linears for whole in GROUPS)


def check_architecture(config: Any, skip: tuple[str, ...]) -> None:
    """Raise InputError unless the model is of the family, and each K a multiple of 32.

    Args: skip: must name linears of the model, and leave some.
    """
    check_family(config)
    for name in _SIZES:
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive integer, got {value!r}")
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": config.num_attention_heads * head_dim(config),
    }
    for name, width in widths.items():
        if width % BLOCK_SIZE:
            raise InputError(f"{name} is {width}; MXFP4 needs a multiple of {BLOCK_SIZE}")
    linears = {name for group in GROUPS for name in group.linears}
    for index in range(config.num_hidden_layers):
        linears |= {f"{layer_prefix(index)}.{n}" for g in GROUPS for n in g.linears}
    unknown = [s for s in skip if s != "lm_head" and not any(is_skipped(n, (s,)) for n in linears)]
    if unknown:
        raise InputError(f"--skip {unknown[0]} names no linear of the model")
    if not any(quantized_groups(index, skip) for index in range(config.num_hidden_layers)):
        raise InputError(f"--skip {' --skip '.join(skip)} leaves no linear to quantize; skip fewer")


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise InputError, with the name, when a tensor has a NaN or an infinity."""
    # aminmax propagates NaN, and is one pass without a temporary of the tensor's size.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise InputError(f"{name} has NaN or infinite values")


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class DecoderStack:
    """The decoder blocks of a source, run one at a time; only one has its weights in memory.

    Args:
        source: the float model.
        dtype: that the blocks compute in; None is the dtype of the embedding as stored.
    Raises: InputError when there is no such model, or the source lacks its embedding.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None = None) -> None:
        from transformers import AutoModelForCausalLM

        self.source, self.config = source, source.config
        embedding = source.tensor("model.embed_tokens.weight")
        self.dtype = dtype or embedding.dtype
        try:
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        except Exception as error:  # transformers: of any kind
            raise InputError(f"config.json describes no model: {first_line(error)}") from error
        tied = getattr(skeleton, "all_tied_weights_keys", {})
        self._rest = {
            name: tensor.shape
            for name, tensor in skeleton.state_dict().items()
            if not name.startswith("model.layers.") and name not in tied
        }
        self._body = skeleton.model
        self._blocks = self._body.layers
        self._rotary = type(self._body.rotary_emb)(
            config=self.config
        )  # buffers, off the meta device
        self._embedding = embedding.to(self.dtype)

    def __len__(self) -> int:
        return len(self._blocks)

    def skeleton(self, index: int) -> nn.Module:
        """Block `index` on the meta device, in eval mode, for weights from elsewhere."""
        return self._blocks[index].eval()

    def block(self, index: int) -> nn.Module:
        """Block `index` with its float weights, in eval mode.

        Raises: InputError when a tensor is missing, misshapen, or has NaN or infinite values.
        """
        prefix = layer_prefix(index)
        block = self.skeleton(index)
        weights = {}
        for name, expected in block.state_dict().items():
            weights[name] = self._tensor(f"{prefix}.{name}", expected.shape)
        block.load_state_dict(weights, assign=True)
        return block.requires_grad_(False)

    def rest(self) -> dict[str, Tensor]:
        """Everything outside the blocks: embeddings, the final norm, an untied lm_head.

        Raises: as `block` does.
        """
        return {name: self._tensor(name, shape) for name, shape in self._rest.items()}

    def head(self) -> nn.Module:
        """From the last block's outputs to logits: the final norm, and lm_head or its tied twin.

        Raises: as `block` does.
        """
        norm = self._body.norm
        weight = self._tensor("model.norm.weight", norm.weight.shape)
        norm.load_state_dict({"weight": weight}, assign=True)
        untied = "lm_head.weight" in self._rest
        rows = self._tensor("lm_head.weight", self._rest["lm_head.weight"]) if untied else None
        head = nn.Linear(*reversed(self._embedding.shape), bias=False, device="meta")
        head.weight = nn.Parameter(self._embedding if rows is None else rows)
        return nn.Sequential(norm, head).requires_grad_(False)

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        tensor = self.source.tensor(name).to(self.dtype)
        if tensor.shape != shape:
            raise InputError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        check_finite(tensor, name)
        return tensor

    def release(self, index: int) -> None:
        """Let go of block `index` and its weights."""
        self._blocks[index] = nn.Identity()

    def first_inputs(self, tokens: Tensor) -> "BlockInputs":
        """What block 0 reads for token sequences int64 [samples, seq_len]."""
        probes = nn.ModuleList(_Probe() for _ in self._blocks)
        layers, norm = self._body.layers, self._body.norm
        self._body.layers, self._body.norm = probes, nn.Identity()
        self._body.rotary_emb = self._rotary
        self._body.embed_tokens.weight = nn.Parameter(self._embedding, requires_grad=False)
        batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
        batches = []
        with torch.no_grad():
            for part in tokens.split(batch):
                self._body(input_ids=part, use_cache=False)
                batches.append((probes[0].hidden_states, [probe.arguments for probe in probes]))
        self._body.layers, self._body.norm = layers, norm
        self._body.embed_tokens.weight = nn.Parameter(
            torch.empty_like(self._embedding, device="meta"), requires_grad=False
        )
        return BlockInputs([h for h, _ in batches], [arguments for _, arguments in batches])


@dataclass
class BlockInputs:
    """Activations that enter a decoder block, in batches, with the block's other arguments.

    hidden: float [batch, seq_len, hidden_size] each. arguments: per batch and block, its keywords.
    """

    hidden: list[Tensor]
    arguments: list[list[dict[str, Any]]]

    def outputs(self, block: nn.Module, index: int) -> Iterator[Tensor]:
        """Run a block over the batches, one at a time."""
        with torch.no_grad():
            for hidden, arguments in zip(self.hidden, self.arguments, strict=True):
                out = block(hidden, **arguments[index])
                yield out[0] if isinstance(out, tuple) else out

    def joined(self, other: "BlockInputs") -> "BlockInputs":
        """These batches, and then those of `other`."""
        return BlockInputs([*self.hidden, *other.hidden], [*self.arguments, *other.arguments])

    def first(self, batches: int) -> "BlockInputs":
        """The first batches alone; the tensors are shared."""
        return BlockInputs(self.hidden[:batches], self.arguments[:batches])

    def after(self, batches: int) -> "BlockInputs":
        """Without the first batches; the tensors are shared."""
        return BlockInputs(self.hidden[batches:], self.arguments[batches:])

    def run_up_to(self, block: nn.Module, index: int, last: nn.Module) -> None:
        """Run a block over the batches only until `last` gets its input, for its hooks' sake."""

        def stop(*_: Any) -> None:
            raise _LastInputSeenError

        handle = last.register_forward_pre_hook(stop)  # runs after the hooks that are there already
        try:
            with torch.no_grad():
                for hidden, arguments in zip(self.hidden, self.arguments, strict=True):
                    with suppress(_LastInputSeenError):
                        block(hidden, **arguments[index])
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
