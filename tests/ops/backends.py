"""The backends that can run here, as parameters of a test, and what makes their results comparable.

A test takes `backend` from `BACKENDS`; one that cannot run here skips with its reason. A test of
rotate_quantize and its fused forms takes it from `QUANTIZERS` and calls the ops of this module, so
that the kernels of a GPU are among them where there is one.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from duqpp import ops
from duqpp.format import MXFP4Tensor
from duqpp.format.scale_layout import swizzle_scales, unswizzle_scales
from duqpp.ops import dispatch, native
from duqpp.ops.backend import Backend

CPU = torch.device("cpu")


def _parameter(backend: Backend):
    reasons = [backend.unavailable_reason(op, CPU) for op in ("rotate_quantize", "mxfp4_gemm")]
    reason = next((r for r in reasons if r is not None), None)
    skip = pytest.mark.skip(reason=f"{backend.name}: {reason}")
    return pytest.param(backend.name, marks=[] if reason is None else [skip])


# Those for tensors on the CPU.
BACKENDS = [
    _parameter(backend) for backend in dispatch.BACKENDS if not backend.name.startswith("cuda")
]
# And that of the GPU; the pytest header says why there is none.
_GPU = torch.device("cuda")
QUANTIZERS = [
    *BACKENDS,
    *(
        backend.name
        for backend in dispatch.BACKENDS
        if backend.name.startswith("cuda")
        and torch.cuda.is_available()
        and backend.unavailable_reason("rotate_quantize", _GPU) is None
    ),
]


def _on_its_device(op: Callable[..., MXFP4Tensor]) -> Callable[..., MXFP4Tensor]:
    """An op on tensors of the CPU, wherever its backend runs."""

    def call(*tensors: Tensor | None, backend: str, **options: object) -> MXFP4Tensor:
        device = _GPU if backend.startswith("cuda") else CPU
        moved = (None if tensor is None else tensor.to(device) for tensor in tensors)
        quantized = op(*moved, backend=backend, **options)
        return MXFP4Tensor(quantized.codes.cpu(), quantized.scales.cpu())

    return call


rotate_quantize = _on_its_device(ops.rotate_quantize)
rmsnorm_rotate_quantize = _on_its_device(ops.rmsnorm_rotate_quantize)
silu_mul_rotate_quantize = _on_its_device(ops.silu_mul_rotate_quantize)


def in_kernel_dtype(x: Tensor, backend: str) -> Tensor:
    """Float32 values in a dtype that a backend's kernels take: on a GPU, float32 is no kernel's."""
    return x.bfloat16() if backend.startswith("cuda") else x


def refuse_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail from now on where the reference computes what a GPU's kernels were asked for."""

    def refused(backend: native.CudaBackend) -> Backend:
        pytest.fail(f"the reference computes in the place of the kernels of {backend.name}")

    monkeypatch.setattr(native.CudaBackend, "_of_float32", refused)


def row_major_scales(quantized: MXFP4Tensor) -> Tensor:
    """Scales uint8 [M, K/32] of an op's result, whichever layout its backend keeps them in."""
    rows, k = quantized.shape
    if quantized.scales.shape == (rows, k // 32):
        return quantized.scales
    return unswizzle_scales(quantized.scales.flatten(), rows, k // 32)


def as_activation(operand: MXFP4Tensor, backend: str) -> MXFP4Tensor:
    """A row-major operand [M, K] as the backend's own rotate_quantize would have left it."""
    chosen = dispatch.select("mxfp4_gemm", CPU, backend)
    if chosen.scales_shape(*operand.shape) == tuple(operand.scales.shape):
        return operand
    return MXFP4Tensor(operand.codes, swizzle_scales(operand.scales))
