"""Where a job computes, and with whom; where its data rest; who draws its random numbers."""

from dataclasses import dataclass

import torch

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


ON_HOST = Placement()


def host_generator(seed: int) -> torch.Generator:
    """A generator of the host, wherever a job computes: so a seed means the same everywhere."""
    return torch.Generator(device=HOST).manual_seed(seed)
