"""Orthogonal matrices that need no data: starts and baselines. All are float64 [n, n]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from duqpp.placement import HOST


def hadamard(n: int, device: torch.device = HOST) -> Tensor:
    """Sylvester's Hadamard matrix divided by sqrt(n), symmetric, its first row uniform.

    Raises: ValueError when n is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: n must be a power of two, got {n}")
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    pair = torch.ones(2, 2, dtype=torch.float64, device=device)
    pair[1, 1] = -1.0
    while matrix.shape[0] < n:
        matrix = torch.kron(pair, matrix)
    return matrix / n**0.5


def random_orthogonal(n: int, generator: torch.Generator, *, count: int | None = None) -> Tensor:
    """Haar-distributed orthogonal matrices, on the generator's device: [n, n], or [count, n, n].

    They are float64, and made where they are drawn, so that a seed gives the same bits everywhere.

    Source: F. Mezzadri, "How to generate random matrices from the classical compact groups".
    """
    shape = (n, n) if count is None else (count, n, n)
    gaussian = torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[..., None, :]


def random_signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """1 or -1 with equal chances, float32, on the generator's device."""
    bits = torch.randint(0, 2, tuple(shape), generator=generator, device=generator.device)
    return bits.float() * 2.0 - 1.0
