"""Weights that make up for the drift: what quantization has done to a linear's input before it.

Source: the target of GPTAQ (arXiv 2504.02692), the float model's output, here as a least-squares
step before GPTQ.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Added to the Hessian's diagonal, as a fraction of its mean: what the calibration tokens say about
# directions that they hardly excite is chance.
_DAMPING = 0.05


def making_up_for_drift(
    hessian: Tensor, drift: Tensor, *, share: float, rows: int
) -> Callable[[Tensor], Tensor]:
    """W -> W + share * W C H^-1: towards the outputs that the float model's inputs would give.

    With inputs x of the quantized model, x' of the float model and q of the product, H = 2 q.T q
    and C = 2 (x' - x).T q, means over tokens. The whole of it (share 1) is the least-squares
    solution of W q + W (x' - x); since the drift is in part noise, that also shrinks the weights,
    block after block, which is why a share does better.

    Args:
        hessian, drift: float32 [K, K], H and C.
        share: in [0, 1].
        rows: N of the whole W, whichever rows of it are asked for. The fewer equations are solved:
            for the K columns of C, or for those N rows.
    Returns: of some rows of W in the basis of q, float32 [n, K], to the same; the identity where H
        is not finite, or not positive definite even damped, which GPTQ then reports.
    """
    factor = _factor(hessian)
    if factor is None:
        return lambda weight: weight
    if rows > len(hessian):
        inverted = _solve_(factor, drift.double().T).T.float()  # C H^-1
        return lambda weight: torch.addmm(weight, weight, inverted, alpha=share)

    def made_up(weight: Tensor) -> Tensor:
        change = _solve_(factor, (weight @ drift).double().T)  # [K, n]
        return change.T.float().mul_(share).add_(weight)

    return made_up


def _factor(hessian: Tensor) -> Tensor | None:
    """The Cholesky factor of the damped H, float64 [K, K]; None where there is none."""
    if not torch.stack(hessian.aminmax()).isfinite().all():
        return None
    # Its columns are contiguous, as LAPACK wants them, so that it is factored where it is.
    matrix = torch.empty_like(
        hessian, dtype=torch.float64, memory_format=torch.contiguous_format
    ).mT
    matrix.copy_(hessian)
    matrix.diagonal().add_(_DAMPING * hessian.diagonal().double().mean())
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    return None if failed else matrix


def _solve_(factor: Tensor, right: Tensor) -> Tensor:
    """H^-1 right, [K, n], in the place of right, where `cholesky_solve` copies the factor, too.

    Args: factor: of H, lower triangular, [K, K]. right: its columns are contiguous.
    """
    torch.linalg.solve_triangular(factor, right, upper=False, out=right)
    torch.linalg.solve_triangular(factor.T, right, upper=True, out=right)
    return right
