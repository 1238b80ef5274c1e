"""Where a job computes, where its data rest, and which generator draws its random numbers."""

from dataclasses import dataclass

import torch

HOST = torch.device("cpu")  # where files are read, and random numbers are drawn


@dataclass(frozen=True)
class Placement:
    """compute: where decoder blocks are, and everything that is made of them. storage: where
    activations rest while no block reads them.

    Modules below the job take devices from here or from the tensors that they are given.
    """

    compute: torch.device = HOST
    storage: torch.device = HOST


ON_HOST = Placement()


def host_generator(seed: int) -> torch.Generator:
    """A generator of the host, wherever a job computes: so a seed means the same everywhere."""
    return torch.Generator(device=HOST).manual_seed(seed)
