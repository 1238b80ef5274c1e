"""Weights that make up for the drift: what quantization has done to a linear's input before it.

Source: the target of GPTAQ (arXiv 2504.02692), the float model's output, here as a least-squares
step before GPTQ.
"""

import torch
from torch import Tensor

# Added to the Hessian's diagonal, as a fraction of its mean: what the calibration tokens say about
# directions that they hardly excite is chance.
_DAMPING = 0.05


def make_up_for_drift(weight: Tensor, hessian: Tensor, drift: Tensor, *, share: float) -> Tensor:
    """W + share * W C H^-1: towards the outputs that the float model's inputs would have given.

    With inputs x of the quantized model, x' of the float model and q of the product, H = 2 q.T q
    and C = 2 (x' - x).T q, means over tokens. The whole of it (share 1) is the least-squares
    solution of W q + W (x' - x); since the drift is in part noise, that also shrinks the weights,
    block after block, which is why a share does better.

    Args:
        weight: float32 [N, K], in the basis of q.
        hessian, drift: float32 [K, K], H and C.
        share: in [0, 1].
    Returns: float32 [N, K]; the weight itself where H is not finite, or not positive definite even
        damped, which GPTQ then reports.
    """
    if not torch.stack(hessian.aminmax()).isfinite().all():
        return weight
    # Its columns are contiguous, as LAPACK wants them, so that it is factored where it is.
    matrix = torch.empty_like(
        hessian, dtype=torch.float64, memory_format=torch.contiguous_format
    ).mT
    matrix.copy_(hessian)
    matrix.diagonal().add_(_DAMPING * hessian.diagonal().double().mean())
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    if failed:
        return weight
    change = torch.cholesky_solve((weight @ drift).double().T, matrix)  # [K, N]
    return weight + share * change.T.float()
