"""The method learned: orthogonal rotations trained through the rounding; the weights stay theirs.

The learned-rotation baseline of the literature (SpinQuant, arXiv 2405.16406), decoder block by
decoder block: it shows what rotations alone can give.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE, ScaleRule
from duqpp.methods import costs
from duqpp.methods.base import Block
from duqpp.methods.group import group_generator, named
from duqpp.methods.independent import GroupInput, Independent
from duqpp.methods.options import LearnedOptions, Options
from duqpp.methods.refine.blocks import block_loss
from duqpp.methods.refine.latent import RoundedInput, round_straight_through
from duqpp.methods.refine.schedule import (
    EarlyStopping,
    LatentOptimizer,
    backward,
    batches_of_all,
    held_back,
    mean_loss,
    shuffled,
)
from duqpp.models.family import LinearGroup
from duqpp.models.stack import BlockInputs
from duqpp.ops.reference import rotate_blocks
from duqpp.rotation import BlockRotation, InputTransform
from duqpp.rotation.basis import hadamard, random_signs

_EPOCHS = 4
_RATE = 1e-2  # of Adam, for the entries of a skew-symmetric matrix: about the angle of a step


class Rotation(nn.Module):
    """A start, float32 [..., 32, 32], times an orthogonal matrix that can be trained."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        identity = torch.eye(BLOCK_SIZE, dtype=start.dtype, device=start.device)
        self.turn = nn.Parameter(identity.expand(start.shape).contiguous())
        orthogonal(self, "turn", orthogonal_map="cayley")

    def forward(self) -> Tensor:
        return self.start @ self.turn


class RotatedLinear(nn.Module):
    """A float linear with rotated and rounded input and weight; only the rotation can be trained.

    Args:
        linear: what it stands for; it is kept aside, unchanged.
        rotation, rounded_input: shared by the linears of a group.
        rule: scale rule of the weight.
    """

    def __init__(
        self, linear: nn.Linear, rotation: Rotation, rounded_input: RoundedInput, rule: ScaleRule
    ) -> None:
        super().__init__()
        self.rotation, self.rounded_input, self._rule = rotation, rounded_input, rule
        self.linear = (linear,)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in the dtype of x."""
        (linear,) = self.linear
        weight = rotate_blocks(linear.weight.detach().float(), self.rotation())  # R^-T is R
        y = F.linear(self.rounded_input(x), round_straight_through(weight, self._rule))
        return (y if linear.bias is None else y + linear.bias.detach().float()).to(x.dtype)


class Learned(Independent):
    """The learned-rotation baseline: trained with the block's other groups, in place of built."""

    name = "learned"
    summary = "one orthogonal matrix, trained through the rounding for each decoder block"
    Options = LearnedOptions
    options: LearnedOptions
    fitted = True

    def stages(self, shape: costs.BlockShape, text: costs.Text | None) -> list[costs.Cost]:
        stages = super().stages(shape, text)
        if text is not None:
            stages.insert(1, costs.learned_rotations(shape, text, epochs=_EPOCHS))
        return stages

    def transforms(
        self, block: Block, groups: Mapping[str, GroupInput], inputs: BlockInputs | None
    ) -> dict[str, InputTransform]:
        if inputs is None:
            raise InputError("learned trains on calibration activations, and there are none")
        generator = group_generator(self.options.seed, f"{block.name}.learned")
        matrices = learn_rotations(block, inputs, self.options, generator)
        made = {}
        for name, matrix in matrices.items():
            with named(f"{block.name}.{name}"):
                made[name] = InputTransform(BlockRotation.rounded(matrix))
        return made


def learn_rotations(
    block: Block, inputs: BlockInputs, options: Options, generator: torch.Generator
) -> dict[str, Tensor]:
    """One orthogonal matrix for each linear group, or one for each block of its input.

    They start as a Hadamard with random signs, and are trained together so that the block with
    rounded weights and activations gives the float block's outputs from the same inputs. The ones
    with the least loss on held-back batches are kept. The block is left as it was.

    Args:
        inputs: what the block reads. generator: of the signs, and of the order of batches.
    Returns: float64 [32, 32] or [K/32, 32, 32] by group name.
    Raises: InputError when there are fewer than two batches.
    """
    ranks = inputs.placement.ranks
    batches = batches_of_all(ranks, len(inputs.hidden))
    held = held_back(len(batches))
    if not block.groups:  # all skipped
        return {}
    module = block.module
    loss = block_loss(module, block.index, inputs, list(inputs.outputs(module, block.index)))
    rotations = {g.name: _start(module, g, options, generator) for g in block.groups}
    floats = {name: module.get_submodule(name) for g in block.groups for name in g.linears}
    for group in block.groups:
        rotation = rotations[group.name]
        rounded_input = RoundedInput(rotation, options.activation_rule, len(group.linears))
        for name in group.linears:
            linear = RotatedLinear(floats[name], rotation, rounded_input, options.weight_rule)
            module.set_submodule(name, linear)
    turns = [parameter for rotation in rotations.values() for parameter in rotation.parameters()]
    order = [shuffled(held.start, generator) for _ in range(_EPOCHS)]
    sizes = [1.0] * len(turns)
    optimizer = LatentOptimizer(turns, rate=_RATE, steps=_EPOCHS * held.start, sizes=sizes)

    def matrices() -> dict[str, Tensor]:
        return {name: rotation().detach().double() for name, rotation in rotations.items()}

    start = matrices()
    stopping = EarlyStopping(lambda: mean_loss(loss, batches[held.start :], ranks), matrices)
    with torch.enable_grad():
        for epoch in order:
            for batch in epoch:
                backward(loss, batches[batch], turns, ranks)
                optimizer.step()
            if not stopping.check():
                break
    for name, linear in floats.items():
        module.set_submodule(name, linear)
    return start if stopping.best is None else stopping.best


def _start(
    block: nn.Module, group: LinearGroup, options: Options, generator: torch.Generator
) -> Rotation:
    shape: tuple[int, ...] = (BLOCK_SIZE,)
    reader = block.get_submodule(group.linears[0])
    if options.rotation == "per-block":
        shape = (reader.in_features // BLOCK_SIZE, BLOCK_SIZE)
    signs = random_signs(shape, generator).to(reader.weight.device)
    return Rotation(signs[..., None] * hadamard(BLOCK_SIZE, signs.device).float())
