"""The ops over the compiled library `duqpp._C`, or why it is absent."""

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule
from duqpp.ops.reference import OPS

try:
    import duqpp._C as _C
except ImportError as error:
    _C = None
    _ABSENT = f"the compiled library is not there ({error}); reinstall duqpp"

_RULES = {ScaleRule.FLOOR: 0, ScaleRule.EVEN: 1, ScaleRule.CEIL: 2, ScaleRule.MSE: 3}


class CpuBackend:
    """C++ kernels for this CPU; see `duqpp.ops.dispatch.Backend` for the contract.

    Scales stay row-major; `prepare_weight` reorders a weight into the tiles that the GEMM streams,
    in the same number of bytes.
    """

    name = "cpu"

    def unavailable_reason(self, op: str, device: torch.device) -> str | None:
        if op not in OPS:
            return f"no op named {op}"
        if device.type != "cpu":
            return f"needs a tensor on the CPU, not on {device.type}"
        return _ABSENT if _C is None else None

    def scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return rows, columns // BLOCK_SIZE

    def rotate_quantize(self, x: Tensor, rotation: Tensor | None, rule: ScaleRule) -> MXFP4Tensor:
        op = torch.ops.duqpp_native.rotate_quantize
        return MXFP4Tensor(*op(x.contiguous(), _contiguous(rotation), _RULES[rule]))

    def rmsnorm_rotate_quantize(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        epsilon: float,
        rotation: Tensor | None,
        rule: ScaleRule,
    ) -> MXFP4Tensor:
        op = torch.ops.duqpp_native.rmsnorm_rotate_quantize
        weight = _contiguous(norm_weight)
        return MXFP4Tensor(
            *op(x.contiguous(), weight, epsilon, _contiguous(rotation), _RULES[rule])
        )

    def silu_mul_rotate_quantize(
        self, gate: Tensor, up: Tensor, rotation: Tensor | None, rule: ScaleRule
    ) -> MXFP4Tensor:
        op = torch.ops.duqpp_native.silu_mul_rotate_quantize
        rotation = _contiguous(rotation)
        return MXFP4Tensor(*op(gate.contiguous(), up.contiguous(), rotation, _RULES[rule]))

    def prepare_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        op = torch.ops.duqpp_native.prepare_weight
        return MXFP4Tensor(*op(weight.codes.contiguous(), weight.scales.contiguous()))

    def restore_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        return MXFP4Tensor(*torch.ops.duqpp_native.restore_weight(weight.codes, weight.scales))

    def mxfp4_gemm(
        self, a: MXFP4Tensor, b: MXFP4Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return torch.ops.duqpp_native.mxfp4_gemm(
            a.codes.contiguous(),
            a.scales.contiguous(),
            b.codes.contiguous(),
            b.scales.contiguous(),
            _contiguous(bias),
            out_dtype,
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
