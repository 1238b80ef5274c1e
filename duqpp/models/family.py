"""The LLaMA family: which groups of linears share one input, and what of a model is quantized."""

from dataclasses import dataclass
from typing import Any

from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_SIZES = ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


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


def check_family(config: Any) -> None:
    """Raise InputError unless the configuration is of a family that duqpp knows."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise InputError(
            f"model_type {kind!r} is not supported; duqpp quantizes {', '.join(ARCHITECTURES)}"
        )


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


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
