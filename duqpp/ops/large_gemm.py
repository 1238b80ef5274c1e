"""Products of many rows for GPUs whose tensor cores know no block scales.

Both operands are expanded to a format that the tensor cores multiply (csrc/format/expand.h), the
weight a chunk of rows at a time in a bounded workspace, and torch multiplies them:

float8_e4m3fn, on compute capability 8.9 and 9.0: each row times one power of two, which
    `torch._scaled_mm` takes back as its row-wise scale. Exact while a row's block exponents span at
    most 15 binades; beyond, an error of at most 2**-16 of the row's largest scale. `inexact_rows`
    counts the rows of a weight where that happens; those of activations are not looked at: the host
    would have to wait for them. A row's largest scale is to lie in 2**-100 .. 2**100: a sum is
    multiplied by two powers of two in turn, and between them it must neither overflow nor vanish.
bfloat16, on other 8.x, and for results that the first cannot give: exact wherever float32 is.

Products of two expanded values are exact, and they are summed in float32 in an order that is the
library's own, so that the result is near the other backends' and not equal to it. With
``s = sum(|a_k b_k|)`` of an output, before the rounding to out_dtype it is off by at most

    bfloat16        2**-22 * K * s: float32, truncated at each addition.
    float8_e4m3fn   2**-5 * s, and in practice near 2**-10 of the result's root mean square: Hopper
                    aligns the 32 products of an instruction and the sum so far to the largest of
                    them and keeps 13 bits below its leading one; after 4 instructions the sum is
                    added to a float32. So each of 4 * 33 addends loses up to 2**-13 of the sum of
                    magnitudes of 128 products.

Sources: of the 14 bits, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), section 3.3.2; of the
interval, CUTLASS's mainloop for FP8 on sm_90 without fast accumulation. cuBLASLt's interval and
Ada's alignment are not published.
"""

import contextlib
import enum
import functools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE, MXFP4Tensor
from duqpp.format.e2m1 import decode_packed_e2m1
from duqpp.format.weight_fragment import row_exponents

WORKSPACE_BYTES = 64 << 20  # of the expanded weight, and of its products before rounding
_CHUNK_ROWS = 256  # chunks are multiples of it: of the widest GEMM tiles
_SCALED_MM_ROWS = 16  # torch._scaled_mm wants multiples of it
_TOP_SHIFT, _LEAST_SHIFT = 6, -8  # as in csrc/format/expand.h
_ZERO_SHIFT = -13  # from here down every value rounds to zero

logger = logging.getLogger(__name__)


class Route(enum.Enum):
    """What multiplies the expanded operands.

    BFLOAT16: `torch.mm`.
    CUBLASLT: `torch._scaled_mm` where it calls cuBLASLt, which writes into columns of a matrix.
    CUTLASS: `torch._scaled_mm` where it calls CUTLASS, which takes its result for contiguous, and
        before torch 2.14 writes bfloat16 into float16 unless there is a float16 bias.
    """

    BFLOAT16 = "torch.mm"
    CUBLASLT = "torch._scaled_mm, cuBLASLt"
    CUTLASS = "torch._scaled_mm, CUTLASS"

    @property
    def dtype(self) -> torch.dtype:
        """What both operands are expanded to."""
        return torch.bfloat16 if self is Route.BFLOAT16 else torch.float8_e4m3fn


def route_for(capability: tuple[int, int], cuda: str | None) -> Route:
    """The route on GPUs of a compute capability under a torch built with CUDA version `cuda`."""
    if capability not in ((8, 9), (9, 0)):
        return Route.BFLOAT16
    # torch's own condition: row-wise scales came to cuBLASLt with CUDA 12.9, for Hopper.
    version = tuple(int(part) for part in (cuda or "0.0").split(".")[:2])
    return Route.CUBLASLT if capability == (9, 0) and version >= (12, 9) else Route.CUTLASS


@functools.cache
def route_on(device: torch.device) -> Route:
    """The route on a CUDA device that is here."""
    return route_for(torch.cuda.get_device_capability(device), torch.version.cuda)


def large_gemm(
    a: MXFP4Tensor,
    b: MXFP4Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    route: Route | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor:
    """``dequantize(a) @ dequantize(b).T + bias`` within the bounds above, rounded once.

    No synchronization, and no memory but torch's: a CUDA graph can capture it.

    Args:
        a: [M, K] as rotate_quantize leaves it on a GPU: codes row-major, scales swizzled.
        b: [N, K], as `prepare_weight` of the backend cuda-sm80 leaves it.
        bias: floating point [N], added in float32; or None.
        out_dtype: bfloat16, float16 or float32.
        route: of `route_on` the device where None.
        workspace_bytes: bound on the expanded rows of b and their unrounded products in use at a
            time; at least 256 rows are.
    Returns: [M, N] in out_dtype.
    """
    route = route_on(a.codes.device) if route is None else route
    rows, k = a.shape
    bias = None if bias is None else bias.contiguous()
    out = a.codes.new_empty((rows, b.shape[0]), dtype=out_dtype)
    if rows == 0:
        return out
    if out_dtype == torch.float32 or (bias is not None and bias.dtype != out_dtype):
        route = Route.BFLOAT16  # torch._scaled_mm takes a bias of the dtype of a 16-bit result
    multiply = _multiply_bfloat16 if route is Route.BFLOAT16 else _multiply_e4m3
    expanded = torch.ops.duqpp_native.expand_activation(
        a.codes.contiguous(), a.scales.contiguous(), route.dtype
    )
    in_place = writes_in_place(route, bias, out)
    row_bytes = bytes_per_row(route, rows, k, in_place=in_place)
    for columns in chunks(b.shape[0], row_bytes, workspace_bytes):
        multiply(expanded, b, columns, bias, out, route)
    return out


def bytes_per_row(route: Route, m: int, k: int, *, in_place: bool) -> int:
    """What a row of b takes of the workspace: values, scale, and a column not yet in place."""
    return k * int(route.dtype.itemsize) + 4 + (0 if in_place else 4 * m)


def writes_in_place(route: Route, bias: Tensor | None, out: Tensor) -> bool:
    """Whether products go straight into columns of out; else they are rounded or copied there."""
    if route is Route.BFLOAT16:
        # With a bias torch rounds twice into columns of a matrix: the product, then the sum.
        return out.dtype == torch.bfloat16 and bias is None
    return route is Route.CUBLASLT and out.shape[1] % _SCALED_MM_ROWS == 0


def chunks(rows: int, bytes_per_row: int, workspace_bytes: int) -> Iterator[slice]:
    """Ranges that cover `rows`, of one length but the last, as few as the workspace allows."""
    most = max(1, workspace_bytes // (bytes_per_row * _CHUNK_ROWS)) * _CHUNK_ROWS
    count = -(-rows // most)
    length = -(-rows // (count * _CHUNK_ROWS)) * _CHUNK_ROWS if count else 1
    for first in range(0, rows, length):
        yield slice(first, min(first + length, rows))


def _multiply_e4m3(
    a: tuple[Tensor, Tensor],
    b: MXFP4Tensor,
    columns: slice,
    bias: Tensor | None,
    out: Tensor,
    route: Route,
) -> None:
    """Columns of out = a b.T + bias, where bias is of the dtype of out."""
    width = columns.stop - columns.start
    padded = -(-width // _SCALED_MM_ROWS) * _SCALED_MM_ROWS
    values, scales = torch.ops.duqpp_native.expand_weight(
        b.codes, b.scales, columns.start, padded, torch.float8_e4m3fn
    )
    if bias is not None:
        bias = torch.nn.functional.pad(bias[columns], (0, padded - width))
    elif route is Route.CUTLASS and out.dtype == torch.float16:
        bias = out.new_zeros(padded)
    target = out[:, columns]
    in_place = width == padded and (writes_in_place(route, bias, out) or target.is_contiguous())
    product = target if in_place else out.new_empty((len(out), padded))
    torch._scaled_mm(
        a[0],
        values.t(),
        scale_a=a[1],
        scale_b=scales.t(),
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=False,
        out=product,
    )
    if not in_place:
        target.copy_(product[:, :width])


def _multiply_bfloat16(
    a: tuple[Tensor, Tensor],
    b: MXFP4Tensor,
    columns: slice,
    bias: Tensor | None,
    out: Tensor,
    route: Route,
) -> None:
    """Columns of out = a b.T + bias, whatever their dtypes."""
    values, _ = torch.ops.duqpp_native.expand_weight(
        b.codes, b.scales, columns.start, columns.stop - columns.start, torch.bfloat16
    )
    target, bias = out[:, columns], None if bias is None else bias[columns]
    with _float32_sums():
        if not writes_in_place(route, bias, out):
            product = _float32_mm(a[0], values.t())
            target.copy_(product if bias is None else product.add_(bias))
        else:
            torch.mm(a[0], values.t(), out=target)


def _float32_mm(a: Tensor, b: Tensor) -> Tensor:
    """The product of bfloat16 matrices in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


@contextlib.contextmanager
def _float32_sums() -> Iterator[None]:
    """Keep cuBLAS from adding parts of a sum in bfloat16, which torch allows it by default.

    A boolean restores split-k with it: torch refuses to allow the former without the latter.
    """
    settings = torch.backends.cuda.matmul
    if not settings.allow_bf16_reduced_precision_reduction:
        yield
        return
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = True


def inexact_rows(weight: MXFP4Tensor) -> int:
    """How many rows of a row-major weight [N, K] float8_e4m3fn holds only rounded.

    Reads the device's memory: for when a model is loaded.
    """
    largest = row_exponents(weight.scales).short()
    shifts = weight.scales.short() - largest[:, None] + _TOP_SHIFT
    low = shifts < _LEAST_SHIFT  # [N, K/32]; in most weights none, and never a NaN
    codes = weight.codes.unflatten(-1, (-1, BLOCK_SIZE // 2))[low]
    factors = torch.exp2(shifts[low].clamp(min=_ZERO_SHIFT).float())
    values = decode_packed_e2m1(codes) * factors[:, None]
    rounded = (values.to(torch.float8_e4m3fn).float() != values).any(-1)
    return int(low.nonzero()[:, 0][rounded].unique().numel())


def report_inexact_rows(weight: MXFP4Tensor, route: Route) -> None:
    """Log how many rows of a weight are rounded, where some are and the route rounds them."""
    if route is Route.BFLOAT16 or not (rows := inexact_rows(weight)):
        return
    logger.warning(
        "duqpp: %d of %d rows of a weight %s have blocks whose scales are more than 2**14 apart. "
        "Products of many rows round the smallest on this GPU, with an error of at most 2**-16 of "
        "the row's largest scale.",
        rows,
        weight.shape[0],
        list(weight.shape),
    )
