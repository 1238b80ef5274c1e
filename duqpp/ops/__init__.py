"""The two ops of a quantized linear and their fused forms: contracts and argument checks."""

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule
from duqpp.ops import library
from duqpp.ops.dispatch import available, select, warn_of_reference
from duqpp.ops.gptq_block import GptqBlock

__all__ = [
    "mxfp4_gemm",
    "mxfp4_linear",
    "prepare_weight",
    "quantize",
    "restore_weight",
    "rmsnorm_rotate_quantize",
    "rotate_quantize",
    "silu_mul_rotate_quantize",
]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def rotate_quantize(
    x: Tensor, rotation: Tensor | None, *, rule: ScaleRule, backend: str = "auto"
) -> MXFP4Tensor:
    """Rotate each 32-wide block of x, then quantize it to MXFP4.

    Equals ``quantize((x.float().view(M, -1, 1, 32) @ rotation.float()).view(M, K), rule=rule)`` up
    to the order of the rotation's float32 sums.

    Args:
        x: bfloat16, float16 or float32 [..., K], K a multiple of 32.
        rotation: bfloat16 [32, 32] for every block, or [K/32, 32, 32]; None is the identity. A
            constant: from sm_90 on, kernels may read it, and norm_weight, while the kernel that
            was launched just before them is running, which must not be writing it.
        rule: how a block's amax becomes its exponent.
        backend: a backend's name, or "auto".
    Returns: MXFP4Tensor [M, K] with M the product of the leading dimensions of x; scales are in the
        layout that this backend's GEMM reads.
    Raises: ValueError for other shapes or dtypes; BackendUnavailableError (see `duqpp doctor`).
    Source: OCP MX v1.0, section 6.3 (conversion), section 5.4.1 (E8M0).
    """
    _check_input("rotate_quantize", x)
    _check_rotation("rotate_quantize", rotation, x.shape[-1])
    _check_devices("rotate_quantize", x=x, rotation=rotation)
    rows = x.reshape(-1, x.shape[-1])
    if library.runs_directly(x):
        chosen = select("rotate_quantize", x.device, backend)
        return chosen.rotate_quantize(rows, rotation, ScaleRule(rule))
    return MXFP4Tensor(*library.rotate_quantize(rows, rotation, str(rule), backend))


def quantize(x: Tensor, *, rule: ScaleRule) -> MXFP4Tensor:
    """`duqpp.format.quantize` of a tensor, by the compiled kernel where it is there.

    Args:
        x: floating point [..., K], K a multiple of 32.
        rule: how a block's amax becomes its exponent.
    Returns: MXFP4Tensor [..., K] with row-major scales, byte for byte that of the definition, but
        for codes of blocks with NaN.
    """
    backend = available("rotate_quantize", x.device)[0]
    if backend == "reference" and x.device.type == "cpu":
        warn_of_reference(x.device)
    rows: MXFP4Tensor | GptqBlock
    if backend in ("cpu", "reference"):
        rows = rotate_quantize(x.float(), None, rule=rule, backend=backend)
    else:  # on a GPU it takes 16 bits, and puts scales where a product reads them
        _check_input("quantize", x)
        blocks = x.float().reshape(-1, BLOCK_SIZE)
        rows = select("rotate_quantize", x.device, backend).gptq_block(blocks, None, rule)
    # Not -1 for the last dimension: it is ambiguous where another one is 0.
    codes = rows.codes.view(*x.shape[:-1], x.shape[-1] // 2)
    return MXFP4Tensor(codes, rows.scales.view(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE))


def rmsnorm_rotate_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    rotation: Tensor | None,
    *,
    epsilon: float,
    rule: ScaleRule,
    backend: str = "auto",
) -> MXFP4Tensor:
    """`rotate_quantize` of the RMSNorm of x.

    ``x * rsqrt(mean(x**2) + epsilon) * norm_weight``, computed in float32 and rounded once to the
    dtype of x before it is rotated.

    Args:
        x, rotation, rule, backend: as of `rotate_quantize`; the mean is over the last dimension.
        norm_weight: [K] in the dtype of x; None is all ones.
        epsilon: added to the mean square.
    Returns, Raises: as `rotate_quantize`.
    """
    op = "rmsnorm_rotate_quantize"
    _check_input(op, x)
    _check_rotation(op, rotation, x.shape[-1])
    if norm_weight is not None and (
        norm_weight.dtype != x.dtype or list(norm_weight.shape) != [x.shape[-1]]
    ):
        raise ValueError(
            f"{op}: norm_weight must be {x.dtype} [{x.shape[-1]}], "
            f"got {norm_weight.dtype} {list(norm_weight.shape)}"
        )
    _check_devices(op, x=x, norm_weight=norm_weight, rotation=rotation)
    rows = x.reshape(-1, x.shape[-1])
    return MXFP4Tensor(
        *library.rmsnorm_rotate_quantize(rows, norm_weight, epsilon, rotation, str(rule), backend)
    )


def silu_mul_rotate_quantize(
    gate: Tensor,
    up: Tensor,
    rotation: Tensor | None,
    *,
    rule: ScaleRule,
    backend: str = "auto",
) -> MXFP4Tensor:
    """`rotate_quantize` of ``silu(gate) * up``, computed in float32 and rounded once to its dtype.

    Args:
        gate, up: [..., K], of one shape and dtype; as x of `rotate_quantize`.
        rotation, rule, backend: as of `rotate_quantize`.
    Returns, Raises: as `rotate_quantize`.
    """
    op = "silu_mul_rotate_quantize"
    _check_input(op, gate)
    _check_rotation(op, rotation, gate.shape[-1])
    if up.dtype != gate.dtype or up.shape != gate.shape:
        raise ValueError(
            f"{op}: up must be {gate.dtype} {list(gate.shape)} like gate, "
            f"got {up.dtype} {list(up.shape)}"
        )
    _check_devices(op, gate=gate, up=up, rotation=rotation)
    gate_rows, up_rows = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    return MXFP4Tensor(
        *library.silu_mul_rotate_quantize(gate_rows, up_rows, rotation, str(rule), backend)
    )


def mxfp4_gemm(
    a: MXFP4Tensor,
    b: MXFP4Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """Multiply quantized matrices: ``dequantize(a) @ dequantize(b).T + bias``.

    Every product and every 32-term block sum is exact; the sum over blocks is in float32. The
    reference and the CPU's kernels add in the order of csrc/format/block_sum.h and agree bit for
    bit. The exception to exact block sums is many rows on a GPU without block-scaled tensor cores:
    `duqpp.ops.large_gemm` says how near it is.

    Args:
        a: [M, K], from `rotate_quantize` on the same backend.
        b: [N, K], from `prepare_weight` on the same backend.
        bias: floating point [N], added in float32.
        out_dtype: bfloat16, float16 or float32.
    Returns: [M, N] in out_dtype, rounded once.
    Raises: ValueError for shapes or dtypes that do not fit; BackendUnavailableError.
    """
    _check_operand("mxfp4_gemm", "a", a)
    _check_operand("mxfp4_gemm", "b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"mxfp4_gemm: a has K = {a.shape[1]} but b has K = {b.shape[1]}")
    _check_bias("mxfp4_gemm", bias, b.shape[0])
    _check_devices("mxfp4_gemm", **_parts("a", a), **_parts("b", b), bias=bias)
    if out_dtype not in _FLOATS:
        raise ValueError(
            f"mxfp4_gemm: out_dtype must be bfloat16, float16 or float32, got {out_dtype}"
        )
    if library.runs_directly(a.codes, bias):
        return select("mxfp4_gemm", a.codes.device, backend).mxfp4_gemm(a, b, bias, out_dtype)
    return library.mxfp4_gemm(a.codes, a.scales, b.codes, b.scales, bias, out_dtype, backend)


def mxfp4_linear(
    x: Tensor,
    rotation: Tensor | None,
    weight: MXFP4Tensor,
    bias: Tensor | None = None,
    *,
    rule: ScaleRule,
    backend: str = "auto",
) -> Tensor:
    """`rotate_quantize` followed by `mxfp4_gemm`, differentiable in x and bias.

    The gradient is straight-through: rounding counts as the identity.

    Args: as of the two ops; x [..., K].
    Returns: [..., N], dtype of x.
    """
    _check_input("mxfp4_linear", x)
    _check_rotation("mxfp4_linear", rotation, x.shape[-1])
    _check_operand("mxfp4_linear", "weight", weight)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"mxfp4_linear: x has K = {x.shape[-1]}, weight has K = {weight.shape[1]}")
    _check_bias("mxfp4_linear", bias, weight.shape[0])
    _check_devices("mxfp4_linear", x=x, rotation=rotation, **_parts("weight", weight), bias=bias)
    rows = x.reshape(-1, x.shape[-1])
    if library.runs_directly(x, bias):
        chosen = select("mxfp4_gemm", x.device, backend)
        y = chosen.mxfp4_linear(rows, rotation, ScaleRule(rule), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    y = library.mxfp4_linear(rows, rotation, str(rule), weight.codes, weight.scales, bias, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


def prepare_weight(weight: MXFP4Tensor, *, backend: str = "auto") -> MXFP4Tensor:
    """A weight [N, K] as checkpoints hold it, in the layout that the backend's GEMM reads.

    Raises: ValueError when codes and scales are not uint8 [N, K/2] and [N, K/32].
    """
    _check_operand("prepare_weight", "weight", weight)
    _check_devices("prepare_weight", **_parts("weight", weight))
    rows, columns = weight.shape
    if list(weight.scales.shape) != [rows, columns // BLOCK_SIZE]:
        raise ValueError(
            f"prepare_weight: weight.scales must be [{rows}, {columns // BLOCK_SIZE}], "
            f"got {list(weight.scales.shape)}"
        )
    return MXFP4Tensor(*library.prepare_weight(weight.codes, weight.scales, backend))


def restore_weight(weight: MXFP4Tensor, *, backend: str) -> MXFP4Tensor:
    """The inverse of `prepare_weight` on the named backend."""
    _check_devices("restore_weight", **_parts("weight", weight))
    return select("mxfp4_gemm", weight.codes.device, backend).restore_weight(weight)


def _check_devices(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError where tensors, by the names that messages have, are on several devices."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        device = tensor.device
        if first is None:
            first = name, device
        elif device != first[1] and _place(device) != _place(first[1]):
            raise ValueError(
                f"{op}: {first[0]} and {name} must be on one device, got {first[1]} and {device}"
            )


def _place(device: torch.device) -> tuple[str, int]:
    """A device without the difference of "cpu" and "cpu:0"."""
    return device.type, device.index or 0


def _parts(name: str, operand: MXFP4Tensor) -> dict[str, Tensor]:
    return {f"{name}.codes": operand.codes, f"{name}.scales": operand.scales}


def _check_input(op: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(
            f"{op}: x must be bfloat16, float16 or float32, got {x.dtype}; "
            "convert with x.bfloat16()"
        )
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"{op}: x must be [..., K] with K a multiple of 32, got {list(x.shape)}")


def _check_rotation(op: str, rotation: Tensor | None, columns: int) -> None:
    if rotation is None:
        return
    shapes = ([32, 32], [columns // BLOCK_SIZE, 32, 32])
    if list(rotation.shape) not in shapes:
        raise ValueError(
            f"{op}: rotation must be {shapes[0]} or {shapes[1]}, got {list(rotation.shape)}"
        )
    if rotation.dtype != torch.bfloat16:
        raise ValueError(f"{op}: rotation must be bfloat16, got {rotation.dtype}")


def _check_operand(op: str, name: str, operand: MXFP4Tensor) -> None:
    codes, scales = operand.codes, operand.scales
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(
            f"{op}: {name}.codes must be uint8 [rows, K/2], got {codes.dtype} {list(codes.shape)}"
        )
    if codes.shape[1] == 0 or codes.shape[1] * 2 % BLOCK_SIZE:
        raise ValueError(
            f"{op}: {name}.codes must be uint8 [rows, K/2], K a multiple of 32, "
            f"got {list(codes.shape)}"
        )
    if scales.dtype != torch.uint8:
        raise ValueError(f"{op}: {name}.scales must be uint8, got {scales.dtype}")
    # The layout is the backend's own; every layout has at least a byte for each block.
    blocks = codes.shape[0] * (codes.shape[1] * 2 // BLOCK_SIZE)
    if scales.numel() < blocks:
        raise ValueError(
            f"{op}: {name}.scales must hold {blocks} blocks' scales, got {list(scales.shape)}"
        )


def _check_bias(op: str, bias: Tensor | None, columns: int) -> None:
    if bias is not None and (list(bias.shape) != [columns] or bias.dtype not in _FLOATS):
        raise ValueError(
            f"{op}: bias must be bfloat16, float16 or float32 [{columns}], "
            f"got {bias.dtype} {list(bias.shape)}"
        )
