"""Per-block transforms that balance activations against weights, then spread both evenly.

Rounding a block of 32 to MXFP4 makes noise in proportion to the block's energy, whichever channel
that is in. With y = x R and W' = W R^-T, the noise of x reaches the output through W', and that of
W' through y: both grow with tr(R.T Sx R) tr(R^-1 Sw R^-T), where Sx and Sw are the second moments
of the block's activations and of the weight rows that read it. The least value of that product,
the square of the sum of the singular values of Lx.T Lw, is reached where both matrices become the
same diagonal one. An orthogonal matrix behind it changes nothing in this count, and a Hadamard
gives every channel an equal share. Smoothing is the special case of a diagonal R.

Source: the closed form is that of WUSH (arXiv 2512.00956), for single blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE
from duqpp.rotation.basis import hadamard, random_signs

# Added to both moments, as a fraction of their mean diagonal: directions that calibration hardly
# excites keep a bounded inverse. The condition number of R then stays below 32 / RIDGE.
RIDGE = 1e-3


def second_moments(x: Tensor, parts: Sequence[int] = ()) -> Tensor:
    """x.T x of each block of 32 columns, for rows x [n, K]: float64 [K/32, 32, 32].

    Args: parts: how many rows are summed up in float32 at a time; none for all.
    """
    total = x.new_zeros(x.shape[1] // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE, dtype=torch.float64)
    for rows in x.split(list(parts) or len(x)):
        blocks = rows.unflatten(-1, (-1, BLOCK_SIZE)).transpose(0, 1)  # [K/32, n, 32]
        total += blocks.mT @ blocks
    return total


def balanced_transform(activations: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """R = Lx^-T U S^(1/2) D H for each block, where Lx Lx.T = Sx, Lw Lw.T = Sw, Lx.T Lw = U S V.T.

    R.T Sx R and R^-1 Sw R^-T are then equal up to a factor, with equal diagonals. D is a diagonal
    of random signs, H a Hadamard, and R is scaled to the norm of an orthogonal matrix.

    Args:
        activations, weights: Sx and Sw, float64 [K/32, 32, 32], symmetric, positive semidefinite,
            of any scale. A moment of zeros is taken for the identity.
        generator: of the signs.
    Returns: float64 [K/32, 32, 32].
    """
    factor_x, factor_w = _factor(activations), _factor(weights)
    left, singular, _ = torch.linalg.svd(factor_x.mT @ factor_w)
    balance = torch.linalg.solve_triangular(factor_x.mT, left, upper=True)
    balance = balance * singular[:, None, :].sqrt()
    signs = random_signs(singular.shape, generator).to(singular.device)
    matrix = (balance * signs[:, None, :].double()) @ hadamard(BLOCK_SIZE, singular.device)
    norm = matrix.square().sum((-2, -1), keepdim=True)
    return matrix * (BLOCK_SIZE / norm).sqrt()


def _factor(moment: Tensor) -> Tensor:
    """Lower triangular L with L L.T the moment, its mean diagonal scaled to 1, plus the ridge."""
    eye = torch.eye(BLOCK_SIZE, dtype=torch.float64, device=moment.device)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    scaled = torch.where(mean > 0, moment / mean, eye)
    return torch.linalg.cholesky(scaled + RIDGE * eye)
