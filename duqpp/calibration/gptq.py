"""GPTQ over 32-wide blocks: round a weight column by column, feeding each error to later columns.

Source: GPTQ (arXiv 2210.17323), in either order of its authors' code, by the channels or by falling
diagonal of H, for whole blocks, whose columns share a scale. It is chosen when the block is
reached, from its error-compensated values.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule, dequantize
from duqpp.format.e2m1 import decode_e2m1, encode_e2m1, pack_e2m1
from duqpp.format.e8m0 import decode_e8m0, inverse_scale
from duqpp.ops import quantize
from duqpp.placement.stages import stage
from duqpp.torch_state import single_thread

BlockOrder = Literal["diagonal", "channels"]

_DAMPING_ATTEMPTS = 6  # each ten times the damping of the one before
_ROWS_AT_A_TIME = 1024  # of W, compared with rounding to nearest


@dataclass(frozen=True)
class GptqResult:
    """weight: MXFP4Tensor [N, K], row-major scales. compensated: float32 [N, K], what each value
    was rounded from: W with the errors of the columns before it fed into it.
    """

    weight: MXFP4Tensor
    compensated: Tensor


@dataclass(frozen=True)
class Gptq:
    """What GPTQ makes of one Hessian, for weights whose rows are independent of each other.

    hessian: H, float32 [K, K]. blocks: int64 [K / 32], those of 32 columns in the order in which
    they are rounded; columns: int64 [K], the same of columns. factor: float32 [K, K], upper
    triangular U in this order, U.T U the inverse of the damped H. added: to the diagonal of H,
    float32 [K].
    """

    hessian: Tensor
    blocks: Tensor
    columns: Tensor
    factor: Tensor
    added: Tensor

    @classmethod
    @stage("factor")
    def of(cls, hessian: Tensor, *, damping: float, order: BlockOrder = "diagonal") -> "Gptq":
        """Order and factor of a Hessian; the arguments, and what is raised, are those of `gptq`."""
        if not torch.stack(hessian.aminmax()).isfinite().all():  # of two values: no copy of H
            raise InputError("GPTQ: the Hessian has NaN or infinite values")
        device = hessian.device
        if order == "diagonal":
            blocks = _by_falling_diagonal(hessian)
        else:
            blocks = torch.arange(len(hessian) // BLOCK_SIZE, device=device)
        inside = torch.arange(BLOCK_SIZE, device=device)
        columns = (blocks[:, None] * BLOCK_SIZE + inside).view(-1)
        factor, added = _inverse_cholesky(hessian, columns, damping)
        return cls(hessian, blocks, columns, factor, added[columns.argsort()].float())

    @stage("gptq")
    def round(self, weight: Tensor, rule: ScaleRule) -> GptqResult:
        """Quantize some rows of W, or all: float32 [N, K]."""
        rows, width = weight.shape
        remaining = weight[:, self.columns]  # until the end everything is in this order
        loss = weight.new_zeros(rows)  # (W - Q) H (W - Q).T of each row
        codes = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(rows, width // BLOCK_SIZE, dtype=torch.uint8, device=weight.device)
        for start in range(0, width, BLOCK_SIZE):
            stop = start + BLOCK_SIZE
            block = remaining[:, start:stop].T.contiguous()  # [32, N]: a column is contiguous
            exponent = quantize(block.T, rule=rule).scales[:, 0]  # [N]
            scale, inverse = decode_e8m0(exponent), inverse_scale(exponent)
            corner = self.factor[start:stop, start:stop]
            errors = torch.empty_like(block)
            with single_thread():
                for j in range(BLOCK_SIZE):
                    code = encode_e2m1(block[j] * inverse)
                    codes[:, start + j] = code
                    errors[j] = (block[j] - decode_e2m1(code) * scale) / corner[j, j]
                    block[j + 1 :].addr_(corner[j, j + 1 :], errors[j], alpha=-1.0)
            scales[:, start // BLOCK_SIZE] = exponent
            remaining[:, start:stop] = block.T
            remaining[:, stop:].addmm_(errors.T, self.factor[start:stop, stop:], alpha=-1.0)
            loss += errors.square().sum(0)
        back = self.columns.argsort()
        quantized = MXFP4Tensor(pack_e2m1(codes[:, back]), scales[:, self.blocks.argsort()])
        result = GptqResult(quantized, remaining[:, back])
        return self._better_of_nearest(weight, result, loss, rule)

    def _better_of_nearest(
        self, weight: Tensor, result: GptqResult, loss: Tensor, rule: ScaleRule
    ) -> GptqResult:
        """The result, with the rows that rounding to nearest serves better rounded to nearest.

        Args: loss: of the result's rows, float32 [N].
        """
        quantized, compensated = result.weight, result.compensated
        for first in range(0, len(weight), _ROWS_AT_A_TIME):
            rows = slice(first, first + _ROWS_AT_A_TIME)
            nearest = quantize(weight[rows], rule=rule)
            errors = weight[rows] - dequantize(nearest)
            own = (errors * torch.addcmul(errors @ self.hessian, errors, self.added)).sum(1)
            better = (own < loss[rows]).nonzero().flatten()
            quantized.codes[first + better] = nearest.codes[better]
            quantized.scales[first + better] = nearest.scales[better]
            compensated[first + better] = weight[first + better]
        return result


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    rule: ScaleRule,
    damping: float,
    order: BlockOrder = "diagonal",
) -> GptqResult:
    """Quantize W so that (W - Q) H (W - Q).T is small. With a diagonal H this is round-to-nearest.

    No row has a larger error, by the damped H, than rounding it to nearest gives: where column by
    column would, it is rounded to nearest.

    Args:
        weight: float32 [N, K], K a multiple of 32.
        hessian: float32 [K, K], symmetric, from `duqpp.calibration.hessian`. Columns whose diagonal
            is 0 take no part in the others' errors, and are rounded to nearest.
        rule: how a block's exponent is chosen.
        damping: added to the diagonal, as a fraction of its mean.
        order: in which blocks are rounded. diagonal: by falling sum of their diagonal in H, so that
            what is left of the errors ends up where it costs least; channels: as they come.
    Returns: GptqResult.
    Raises: InputError when H is not finite, or not positive definite even after more damping.
    """
    return Gptq.of(hessian, damping=damping, order=order).round(weight, rule)


def _by_falling_diagonal(hessian: Tensor) -> Tensor:
    """Indices of the blocks of 32 columns by falling sum of their diagonal: int64 [K / 32]."""
    sums = hessian.diagonal().view(-1, BLOCK_SIZE).sum(1)
    return sums.argsort(descending=True, stable=True)


def _inverse_cholesky(hessian: Tensor, columns: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper triangular U, float32 [K, K]: U.T U is the inverse of H[columns][:, columns], damped;
    and what was added to its diagonal, float64 [K].

    One float64 matrix holds in turn the damped Hessian, its factor, the inverse and that one's
    factor. Its columns are contiguous, as LAPACK wants them: of other matrices torch makes copies.
    """
    diagonal = hessian.diagonal()[columns]
    dead = diagonal == 0
    mean = diagonal[~dead].double().mean() if (~dead).any() else diagonal.new_ones(())
    matrix = torch.empty_like(
        hessian, dtype=torch.float64, memory_format=torch.contiguous_format
    ).mT
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for attempt in range(_DAMPING_ATTEMPTS):
        for rows, part in zip(matrix.mT.split(BLOCK_SIZE), columns.split(BLOCK_SIZE), strict=True):
            rows.copy_(hessian[part][:, columns])  # part by part: a second matrix would be 4 K^2
        added = dead.double() * mean + damping * 10.0**attempt * mean
        matrix.diagonal().add_(added)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not failed:
            torch.cholesky_inverse(matrix, out=matrix)
            torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, failed))
            if not failed:
                return matrix.float(), added
    raise InputError(
        f"GPTQ: the Hessian is not positive definite with damping up to "
        f"{damping * 10.0 ** (_DAMPING_ATTEMPTS - 1):g}; give more calibration text"
    )
