"""Orthogonal matrices that need no data: starts and baselines. All are float64 [n, n]."""

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor:
    """Sylvester's Hadamard matrix divided by sqrt(n), symmetric, its first row uniform.

    Raises: ValueError when n is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: n must be a power of two, got {n}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.kron(matrix.new_tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / n**0.5


def random_orthogonal(n: int, generator: torch.Generator, *, count: int | None = None) -> Tensor:
    """Haar-distributed orthogonal matrices: float64 [n, n], or [count, n, n].

    Source: F. Mezzadri, "How to generate random matrices from the classical compact groups".
    """
    shape = (n, n) if count is None else (count, n, n)
    gaussian = torch.randn(shape, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[..., None, :]
