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
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule
from duqpp.ops.backend import Backend
from duqpp.ops.dispatch import select
from duqpp.placement import HOST
from duqpp.placement.stages import stage

BlockOrder = Literal["diagonal", "channels"]

_DAMPING_ATTEMPTS = 6  # each ten times the damping of the one before
_COLUMNS_AT_A_TIME = 256  # whose errors are fed into all later columns by one product
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

    With the columns in the order in which they are rounded, the damped H is F diag(D) F.T, so that

        (W - Q) H (W - Q).T = sum over j of D_j ((W - Q) F)_j**2,

    with F upper triangular, and ones on its diagonal: term j has column j and those before it. Each
    column is rounded from what would make its term 0. Before any column of a block is rounded, that
    is W + (W - Q) F G, with (W - Q) F of the columns before the block, and G the inverse of its own
    part of F.

    blocks: int64 [K / 32], those of 32 columns in the order in which they are rounded. The others
    are in this order. factor: F, float32 [K, K]. corners: G of each block, float32
    [K / 32, 32, 32]. pivots: D, float32 [K].
    """

    blocks: Tensor
    factor: Tensor
    corners: Tensor
    pivots: Tensor

    @classmethod
    @stage("factor")
    def of(cls, hessian: Tensor, *, damping: float, order: BlockOrder = "diagonal") -> "Gptq":
        """Order and factor of a Hessian.

        Args:
            hessian: float32 [K, K], symmetric, from `duqpp.calibration.hessian`, K a multiple of
                32. Columns whose diagonal is 0 take no part in the others' errors, and are rounded
                to nearest.
            damping: added to the diagonal, as a fraction of its mean.
            order: in which blocks are rounded. diagonal: by falling sum of their diagonal in H, so
                that what is left of the errors ends up where it costs least; channels: as they
                come.
        Raises: InputError when H is not finite, or not positive definite even after more damping.
        """
        if not torch.stack(hessian.aminmax()).isfinite().all():  # of two values: no copy of H
            raise InputError("GPTQ: the Hessian has NaN or infinite values")
        if order == "diagonal":
            blocks = _by_falling_diagonal(hessian)
        else:
            blocks = torch.arange(len(hessian) // BLOCK_SIZE, device=hessian.device)
        return cls(blocks, *_factorized(hessian, _columns_of(blocks), damping))

    @stage("gptq")
    def round(self, weight: Tensor, rule: ScaleRule) -> GptqResult:
        """Quantize some rows of W, or all, so that (W - Q) H (W - Q).T is small.

        With a diagonal H this is round-to-nearest. No row has a larger error, by the damped H, than
        rounding it to nearest gives: where column by column would, it is rounded to nearest.

        Args: weight: float32 [N, K]. rule: how a block's exponent is chosen.
        """
        rows, width = weight.shape
        backend = select("rotate_quantize", weight.device)
        codes = weight.new_empty((rows, width // BLOCK_SIZE, BLOCK_SIZE // 2), dtype=torch.uint8)
        scales = weight.new_empty((rows, width // BLOCK_SIZE), dtype=torch.uint8)
        compensated = torch.empty_like(weight)
        loss = weight.new_zeros(rows)  # (W - Q) H (W - Q).T of each row
        fed = torch.zeros_like(weight)  # in this order, (W - Q) F of the columns before `done`
        differences = weight.new_empty(rows, _COLUMNS_AT_A_TIME)  # W - Q of those behind it
        for index, block in enumerate(self.blocks.to(HOST).tolist()):
            start, stop = BLOCK_SIZE * index, BLOCK_SIZE * (index + 1)
            own = slice(BLOCK_SIZE * block, BLOCK_SIZE * (block + 1))
            done = start - start % _COLUMNS_AT_A_TIME
            here = fed[:, start:stop]
            here.addmm_(differences[:, : start - done], self.factor[done:start, start:stop])
            values = torch.addmm(weight[:, own], here, self.corners[index])
            made = backend.gptq_block(values, self.corners[index], rule)
            codes[:, block], scales[:, block], compensated[:, own], rounded = made
            loss += (made.compensated - rounded).square() @ self.pivots[start:stop]
            differences[:, start - done : stop - done] = weight[:, own] - rounded
            if stop - done == _COLUMNS_AT_A_TIME:
                fed[:, stop:].addmm_(differences, self.factor[done:stop, stop:])
        del fed, here  # as large as the weight, before rows are compared
        result = GptqResult(MXFP4Tensor(codes.flatten(1), scales), compensated)
        self._round_to_nearest_where_better(weight, result, loss, rule, backend)
        return result

    def _round_to_nearest_where_better(
        self, weight: Tensor, result: GptqResult, loss: Tensor, rule: ScaleRule, backend: Backend
    ) -> None:
        """Put rows into the result that rounding to nearest serves better.

        Args: loss: of the result's rows, float32 [N].
        """
        columns = _columns_of(self.blocks)
        for first in range(0, len(weight), _ROWS_AT_A_TIME):
            part = weight[first : first + _ROWS_AT_A_TIME]
            blocks = part.reshape(-1, BLOCK_SIZE)
            nearest = backend.gptq_block(blocks, None, rule)
            errors = (part - nearest.rounded.view_as(part))[:, columns]
            better = self._with_less_loss(errors, loss[first : first + _ROWS_AT_A_TIME])
            result.weight.codes[first + better] = nearest.codes.view(len(part), -1)[better]
            result.weight.scales[first + better] = nearest.scales.view(len(part), -1)[better]
            result.compensated[first + better] = part[better]

    def _with_less_loss(self, errors: Tensor, loss: Tensor) -> Tensor:
        """Indices of the rows of `errors`, W - Q in this order, whose loss is below the one given.

        A loss is a sum of what is never negative: a row is let go of when it is reached.
        """
        rows = torch.arange(len(errors), device=errors.device)
        for start in range(0, errors.shape[1], _COLUMNS_AT_A_TIME):
            stop = start + _COLUMNS_AT_A_TIME
            fed = errors[:, :stop] @ self.factor[:stop, start:stop]
            loss = loss - fed.square() @ self.pivots[start:stop]
            below = loss > 0
            rows, errors, loss = rows[below], errors[below], loss[below]
        return rows


def _by_falling_diagonal(hessian: Tensor) -> Tensor:
    """Indices of the blocks of 32 columns by falling sum of their diagonal: int64 [K / 32]."""
    sums = hessian.diagonal().view(-1, BLOCK_SIZE).sum(1)
    return sums.argsort(descending=True, stable=True)


def _columns_of(blocks: Tensor) -> Tensor:
    """Indices of the columns of blocks, int64 [32 * number of blocks]."""
    inside = torch.arange(BLOCK_SIZE, device=blocks.device)
    return (blocks[:, None] * BLOCK_SIZE + inside).view(-1)


def _factorized(hessian: Tensor, columns: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factor, corners and pivots of H[columns][:, columns], damped: see `Gptq`.

    They are the Cholesky factor of the same matrix in the opposite order, turned around. One
    float64 matrix holds in turn the damped Hessian and its factor. Its columns are contiguous, as
    LAPACK wants them: of other matrices torch makes copies.
    """
    backwards = columns.flip(0)
    diagonal = hessian.diagonal()[backwards]
    dead = diagonal == 0
    mean = diagonal[~dead].double().mean() if (~dead).any() else diagonal.new_ones(())
    matrix = torch.empty_like(
        hessian, dtype=torch.float64, memory_format=torch.contiguous_format
    ).mT
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for attempt in range(_DAMPING_ATTEMPTS):
        _copy_in_order(hessian, backwards, matrix)
        matrix.diagonal().add_(dead.double() * mean + damping * 10.0**attempt * mean)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not failed:
            pivots = matrix.diagonal().square()
            matrix.div_(matrix.diagonal().clone())
            corners = _inverse_corners(matrix).float()
            factor = matrix.float()
            del matrix  # before the next copy of it
            return factor.flip(0, 1), corners.flip(0, 1, 2), pivots.float().flip(0)
    raise InputError(
        f"GPTQ: the Hessian is not positive definite with damping up to "
        f"{damping * 10.0 ** (_DAMPING_ATTEMPTS - 1):g}; give more calibration text"
    )


def _copy_in_order(hessian: Tensor, columns: Tensor, matrix: Tensor) -> None:
    """Copy H[columns][:, columns] into a matrix, part by part: H in order would be 4 K^2 more."""
    for rows, part in zip(matrix.mT.split(BLOCK_SIZE), columns.split(BLOCK_SIZE), strict=True):
        rows.copy_(hessian[part][:, columns])


def _inverse_corners(matrix: Tensor) -> Tensor:
    """Inverses of what is on the diagonal of a lower triangular [K, K]: [K / 32, 32, 32]."""
    tiles = matrix.unflatten(1, (-1, BLOCK_SIZE)).unflatten(0, (-1, BLOCK_SIZE))
    corners = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    identity = torch.eye(BLOCK_SIZE, dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(corners, identity, upper=False)
