"""Rotations of 32-wide blocks, what a linear group does to its input, the fold into weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE
from duqpp.ops.reference import rotate_blocks

# A folded weight is W R^-T, computed in float64: its relative error is the condition number of R
# times 2**-53, so this bound leaves 2**-37, far below float32. An orthogonal matrix rounded to
# bfloat16 is near 1; smoothing within its bounds (see `smoothing.py`) adds at most 2**14.
MAX_CONDITION = 2.0**16


@dataclass(frozen=True)
class BlockRotation:
    """An invertible matrix on the right of each block: y = x R.

    matrix: bfloat16, [32, 32] for every block, or [K/32, 32, 32].
    """

    matrix: Tensor

    @classmethod
    def rounded(cls, matrix: Tensor) -> "BlockRotation":
        """Round a float64 matrix to the bfloat16 that is stored and folded.

        Raises: InputError when a rounded matrix is singular, or too close to it to be inverted.
        """
        rounded = matrix.to(torch.bfloat16).contiguous()
        check_invertible(rounded, "rotation")
        return cls(rounded)

    def apply(self, x: Tensor) -> Tensor:
        """x R for x [..., K], in the dtype of x."""
        return rotate_blocks(x, self.matrix.to(x.dtype))

    def fold(self, weight: Tensor) -> Tensor:
        """W R^-T for W [N, K], so that (x R)(W R^-T).T equals x W.T; float64.

        The inverse is that of the rounded matrix, which is not quite orthogonal.
        """
        inverse = torch.linalg.inv(self.matrix.double())
        return rotate_blocks(weight.double(), inverse.transpose(-1, -2))


@dataclass(frozen=True)
class InputTransform:
    """What a linear group does to its input before quantizing it.

    ``x -> (x P)[permutation] R``. DuQuant++ and the fixed rotations have R alone; the original
    DuQuant has all three; rtn none.

    rotation: R. pre_rotation: P. permutation: int32 [K], the source channel of each position.
    """

    rotation: BlockRotation | None = None
    pre_rotation: BlockRotation | None = None
    permutation: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """The transformed input, [..., K] in the dtype of x (float32 or float64)."""
        if self.pre_rotation is not None:
            x = self.pre_rotation.apply(x)
        if self.permutation is not None:
            x = x[..., self.permutation.long()]
        return x if self.rotation is None else self.rotation.apply(x)

    def fold(self, weight: Tensor) -> Tensor:
        """The weight that undoes the transform: float64 [N, K]."""
        weight = weight.double()
        if self.pre_rotation is not None:
            weight = self.pre_rotation.fold(weight)
        if self.permutation is not None:
            weight = weight[:, self.permutation.long()]
        return weight if self.rotation is None else self.rotation.fold(weight)


def check_invertible(matrix: Tensor, name: str, error: type[Exception] = InputError) -> None:
    """Raise `error`, naming the matrix [32, 32] or [B, 32, 32], when it cannot be inverted."""
    if not torch.isfinite(matrix).all():
        raise error(f"{name} contains NaN or infinite values")
    values = torch.linalg.svdvals(matrix.double().view(-1, BLOCK_SIZE, BLOCK_SIZE))
    condition = (values[:, 0] / values[:, -1]).nan_to_num(nan=float("inf"))  # 0 / 0 is singular
    worst = int(condition.argmax())
    if condition[worst] > MAX_CONDITION:
        raise error(
            f"{name} is singular: condition number {condition[worst]:.3g} in block {worst}, "
            f"at most {MAX_CONDITION:.0f} allowed"
        )
