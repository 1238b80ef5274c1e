"""The methods rtn, hadamard and random: no transform, or a fixed orthogonal matrix."""

from torch import Tensor

from duqpp.format import BLOCK_SIZE
from duqpp.methods.independent import GroupInput, OneMatrix
from duqpp.rotation.basis import hadamard, random_orthogonal


class RoundToNearest(OneMatrix):
    """Inputs as they are; with smoothing per block, a diagonal matrix."""

    name = "rtn"
    summary = "none"

    @property
    def rotates(self) -> bool:
        return self.per_block and self.options.smooth_alpha > 0

    def matrix(self, group: GroupInput) -> Tensor | None:
        return None


class Hadamard(OneMatrix):
    """The normalized 32x32 Hadamard matrix."""

    name = "hadamard"
    summary = "one fixed orthogonal 32x32 matrix, the Hadamard matrix"

    def matrix(self, group: GroupInput) -> Tensor | None:
        return hadamard(BLOCK_SIZE, group.device)


class Random(OneMatrix):
    """A random orthogonal matrix, drawn from the Haar measure."""

    name = "random"
    summary = "one random orthogonal 32x32 matrix"
    random = True

    def matrix(self, group: GroupInput) -> Tensor | None:
        count = group.blocks if self.per_block else None
        return random_orthogonal(BLOCK_SIZE, group.generator, count=count).to(group.device)
