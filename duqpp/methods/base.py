"""Method: how a decoder block is quantized, and what every way to do it has in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from duqpp.checkpoint.layout import Layout
from duqpp.checkpoint.shard import Progress
from duqpp.errors import InputError
from duqpp.format import MXFP4Tensor
from duqpp.methods import costs
from duqpp.methods.options import Options
from duqpp.methods.reports import DistillReport, GroupReport, RefineReport
from duqpp.models.family import Family, LinearGroup
from duqpp.models.stack import BlockInputs
from duqpp.placement.ranks import ALONE, Ranks
from duqpp.placement.stages import stage
from duqpp.rotation import InputTransform


@dataclass(frozen=True)
class Needs:
    """What a method reads besides the weights, and what it wants done around it.

    seed: whether anything is drawn at random. inputs: activations that enter a block. float_stream:
    the float model's own activations, beside those of the quantized model. refining: calibration
    sequences that only refine, besides those that calibrate. whole_model: the latents of every
    block until all are quantized, and then a call of `Method.train`.
    """

    seed: bool = False
    inputs: bool = False
    float_stream: bool = False
    refining: bool = False
    whole_model: bool = False


@dataclass(frozen=True)
class Block:
    """A decoder block on its way: a method replaces its float linears by quantized ones, in place.

    index, name: in the model, as 3 and "model.layers.3". groups: those that are quantized, in the
    order of the forward pass; their linears are those that no skip list names.
    """

    module: nn.Module
    index: int
    name: str
    groups: Sequence[LinearGroup]

    @classmethod
    def of(cls, module: nn.Module, index: int, skip: Sequence[str], family: Family) -> "Block":
        """Block `index` of a model of this family."""
        return cls(module, index, family.block_name(index), family.quantized_groups(index, skip))


@dataclass
class Streams:
    """What enters a decoder block.

    inputs: where the blocks before it are quantized (with next_inputs="float": are not); None for a
    method that reads no activations. exact: in the float model; None for a method that asks for no
    float stream. calibrating: how many of the batches calibrate; the others only refine.
    """

    inputs: BlockInputs | None = None
    exact: BlockInputs | None = None
    calibrating: int = 0

    @property
    def ranks(self) -> Ranks:
        """The processes that share the batches, each of which has some."""
        return ALONE if self.inputs is None else self.inputs.placement.ranks

    def advance(self, block: Block, result: "BlockResult") -> None:
        """Move on to what enters the next block."""
        if self.exact is not None and result.exact_outputs is not None:
            self.exact.hidden = result.exact_outputs
        if self.inputs is None:
            return
        if result.outputs is not None:
            self.inputs.hidden = result.outputs
        else:
            with stage("quantized pass"):
                self.inputs.advance(block.module, block.index)


@dataclass
class BlockResult:
    """What a method has done to a block.

    groups, refined: reports. latents: by linear, what its codes were rounded from, float32 [N, K];
    for a method that trains the whole model. outputs: what the next block is calibrated
    on, batch by batch, where that is known: the quantized block's outputs for the inputs, with
    next_inputs="float" the float block's. exact_outputs: in the float stream, where there is one.
    """

    groups: list[GroupReport]
    refined: RefineReport | None = None
    latents: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] | None = None
    exact_outputs: list[Tensor] | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """All blocks of a model, quantized, for a method that trains them together.

    blocks: in order, each with the latents of its linears; to be read once. inputs: what enters
    block 0. exact: what leaves the float model's last block, batch by batch. head: hidden states
    [..., hidden] to logits [..., vocabulary]. ranks: that train it together; each has all of this.
    """

    blocks: Iterable[tuple[Block, Mapping[str, Tensor]]]
    inputs: BlockInputs
    exact: list[Tensor]
    head: nn.Module
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class TrainedModel:
    """What a training has made. codes: of each block by linear, [N, K], row-major scales; none of a
    block that stays as it was. Ranks read them together, once.
    """

    report: DistillReport
    codes: Iterable[dict[str, MXFP4Tensor]]


class Method(ABC):
    """A way to quantize decoder blocks. A subclass is named once in `duqpp.methods.METHODS`.

    name: as `--method` and checkpoints have it. summary: what it does to the inputs of the linears.
    permuted: whether its linears also have DuQuant's pre_rotation and permutation.

    Args: options: of the class's own `Options`, checked.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    permuted: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        options.check()
        self.options = options

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What must be there when `quantize` is called."""

    @property
    def rotates(self) -> bool:
        """Whether the linears have a rotation."""
        return True

    def layout(self, skip: Sequence[str] = (), provenance: dict[str, Any] | None = None) -> Layout:
        """The checkpoint layout that it leads to.

        Args: skip: modules that stay in floating point, besides lm_head.
        """
        return Layout(
            method=self.name,
            rotation=self.options.rotation.replace("-", "_") if self.rotates else "none",
            permuted=self.permuted,
            weight_rule=self.options.weight_rule,
            activation_rule=self.options.activation_rule,
            skip=tuple(dict.fromkeys(("lm_head", *skip))),
            provenance=provenance or {},
        )

    def stages(self, shape: costs.BlockShape, text: costs.Text | None) -> list[costs.Cost]:
        """What `quantize` takes for a block of this shape, stage by stage, for `duqpp.job.plan`.

        Args: text: None for a method that reads no activations.
        """
        return costs.rounding(shape, rotated=self.rotated)

    @property
    def rotated(self) -> costs.Rotated:
        """What the linears' rotation is, for `stages`."""
        return self.options.rotation if self.rotates else "none"

    @abstractmethod
    def quantize(self, block: Block, streams: Streams) -> BlockResult:
        """Replace the linears of a float block by quantized ones, in place.

        Args: streams: what enters the block; they are left as they are.
        Raises: InputError when an input is not finite or a weight cannot be quantized; it names the
            linear or its group.
        """

    def quantize_linear(
        self, block_name: str, group: LinearGroup, weight: Tensor
    ) -> tuple[MXFP4Tensor, InputTransform]:
        """One linear by itself, with no activations, as `quantize` does it in its block.

        Args:
            block_name: such as "model.layers.3". group: with this linear alone.
            weight: floating point [N, K].
        Returns: the folded weight, and what the linear does to its input.
        Raises: InputError when the method needs activations, or the weight cannot be quantized.
        """
        raise InputError(f"the method {self.name} needs calibration for {block_name}")

    def training(
        self, model: costs.ModelShape, text: costs.Text, *, on_host: bool
    ) -> costs.Training:
        """What `train` takes. Only of a method that trains the whole model: see `Needs`.

        Args: on_host: whether blocks compute there.
        """
        raise NotImplementedError(f"{self.name} trains no whole model: see Needs.whole_model")

    def train(self, model: QuantizedModel, state: Path, progress: Progress) -> TrainedModel:
        """Train all blocks together, once they are quantized.

        Args:
            state: file that an interrupted call goes on from; others are beside it that begin with
                its name.
            progress: called with ("distill", steps done, steps in all).
        """
        raise NotImplementedError(f"{self.name} trains no whole model: see Needs.whole_model")
