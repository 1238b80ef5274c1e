"""Where a job computes, and with whom; where its data rest; who draws its random numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duqpp.placement.ranks import ALONE, Ranks

HOST = torch.device("cpu")  # where files are read, and random numbers are drawn


@dataclass(frozen=True)
class Placement:
    """compute: where decoder blocks are, and everything that is made of them. storage: where
    activations rest while no block reads them. ranks: the processes that share the work.

    Modules below the job take devices from here or from the tensors that they are given.
    """

    compute: torch.device = HOST
    storage: torch.device = HOST
    ranks: Ranks = ALONE

    def staged(self, x: Tensor) -> Tensor:
        """x of the host, where a GPU copies it from beside what it computes: in pinned memory."""
        return x.pin_memory() if self.compute.type == "cuda" else x

    def fetched(self, x: Tensor) -> Tensor:
        """x, where blocks compute. What a GPU is told to do next waits for the copy; this does not.

        torch keeps pinned memory from other use until it is copied, and copies other memory at
        once.
        """
        return x.to(self.compute, non_blocking=True)

    def rested(self, x: Tensor) -> Tensor:
        """x of a block, where activations rest: on the host, in memory that `fetched` is fast from.

        It is there when this returns.
        """
        if self.compute.type == "cuda" and self.storage == HOST:
            return torch.empty_like(x, device=HOST, pin_memory=True).copy_(x)
        return x.to(self.storage)


ON_HOST = Placement()


def host_generator(seed: int) -> torch.Generator:
    """A generator of the host, wherever a job computes: so a seed means the same everywhere."""
    return torch.Generator(device=HOST).manual_seed(seed)
