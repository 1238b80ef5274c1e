"""The ops over the compiled library `duqpp._C`, or why it is absent."""

import functools
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule
from duqpp.format.scale_layout import swizzle_scales, swizzled_size, unswizzle_scales
from duqpp.format.weight_fragment import from_fragments, prepared_scales_size, to_fragments
from duqpp.ops.backend import Backend, DirectOps, Quantization, RMSNorm, SiluMul
from duqpp.ops.crossover import crossover
from duqpp.ops.gptq_block import GptqBlock
from duqpp.ops.large_gemm import large_gemm, report_inexact_rows, route_on
from duqpp.ops.reference import ReferenceBackend

try:
    import duqpp._C as _C
except ImportError as error:
    _C = None
    _ABSENT = f"the compiled library is not there ({error}); reinstall duqpp"

logger = logging.getLogger(__name__)

TILE_ROWS = 16  # of a weight as the CPU's GEMM reads it; kTileRows of csrc/cpu/gemm_kernels.h
_RULES = {ScaleRule.FLOOR: 0, ScaleRule.EVEN: 1, ScaleRule.CEIL: 2, ScaleRule.MSE: 3}


def compiled_library() -> ModuleType | None:
    """`duqpp._C`, or None where it is absent."""
    module: ModuleType | None = _C
    return module


def library_info() -> dict[str, Any]:
    """The compiled library: compiler, cuda_architectures ("" without CUDA), cpu_isa and cpu_isas.

    Returns: JSON-ready; {"error": why} where the library is absent.
    """
    if _C is None:
        return {"error": _ABSENT}
    return {**_C.build_info(), "cpu_isa": _C.cpu_isa(), "cpu_isas": _C.cpu_isas()}


def driver_refusal() -> str | None:
    """Why this machine's driver does not serve the library's own CUDA runtime; None where it does.

    torch may bring an older runtime, which such a driver serves, so that torch sees the GPU.
    """
    versions = getattr(_C, "cuda_versions", None)  # a build without CUDA lacks it
    if versions is None:
        return None
    runtime, driver = versions()
    if driver // 1000 >= runtime // 1000:
        return None
    has, wants = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
    return (
        f"this build's runtime of CUDA {wants} needs a driver for CUDA {runtime // 1000}, "
        f"this machine's is for {has}; update the driver, or build duqpp with that CUDA's nvcc"
    )


class _NativeBackend(Backend):
    """What the kernels of every device share: the ops, which torch sends to the device's own."""

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

    def run_quantization(self, asked: Quantization) -> MXFP4Tensor:
        ops, rule = torch.ops.duqpp_native, _RULES[asked.rule]
        match asked.prologue:
            case None:
                x, (rotation,) = _with_constants(asked.x, asked.rotation)
                return MXFP4Tensor(*ops.rotate_quantize(x, rotation, rule))
            case SiluMul(up):
                x, (rotation,) = _with_constants(asked.x, asked.rotation)
                quantized = ops.silu_mul_rotate_quantize(x, up.contiguous(), rotation, rule)
                return MXFP4Tensor(*quantized)
            case RMSNorm(weight, epsilon):
                x, (weight, rotation) = _with_constants(asked.x, weight, asked.rotation)
                quantized = ops.rmsnorm_rotate_quantize(x, weight, epsilon, rotation, rule)
                return MXFP4Tensor(*quantized)

    def gptq_block(self, values: Tensor, factor: Tensor | None, rule: ScaleRule) -> GptqBlock:
        op = torch.ops.duqpp_native.gptq_block
        return GptqBlock(*op(values.contiguous(), _contiguous(factor), _RULES[rule]))

    def direct_ops(self, rows: int, columns: int, device: torch.device) -> DirectOps:
        ops = torch.ops.duqpp_native
        return DirectOps(
            ops.mxfp4_linear.default, ops.rotate_quantize.default, ops.mxfp4_gemm.default, _RULES
        )

    def run_linear(self, asked: Quantization, weight: MXFP4Tensor, bias: Tensor | None) -> Tensor:
        x, (rotation,) = _with_constants(asked.x, asked.rotation)
        return torch.ops.duqpp_native.mxfp4_linear(
            x,
            rotation,
            _RULES[asked.rule],
            weight.codes.contiguous(),
            weight.scales.contiguous(),
            _contiguous(bias),
        )


class CpuBackend(_NativeBackend):
    """C++ kernels for this CPU.

    Scales stay row-major; `prepare_weight` reorders a weight into the tiles that the GEMM streams,
    in the same number of bytes.
    """

    name = "cpu"

    def prepare_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        op = torch.ops.duqpp_native.prepare_weight
        return MXFP4Tensor(*op(weight.codes.contiguous(), weight.scales.contiguous()))

    def restore_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        return MXFP4Tensor(*torch.ops.duqpp_native.restore_weight(weight.codes, weight.scales))

    def direct_ops(self, rows: int, columns: int, device: torch.device) -> DirectOps:
        return super().direct_ops(rows, columns, device)._replace(whole_rows=TILE_ROWS)

    def _unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"needs a tensor on the CPU, not on {device.type}"
        return _ABSENT if _C is None else None


class _ReferenceInLayoutOf(ReferenceBackend):
    """The reference in the layouts of a CUDA backend."""

    def __init__(self, backend: "CudaBackend"):
        self._backend = backend

    def mxfp4_gemm(
        self, a: MXFP4Tensor, b: MXFP4Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return super().mxfp4_gemm(_unswizzled(a), self._backend.restore_weight(b), bias, out_dtype)

    def run_quantization(self, asked: Quantization) -> MXFP4Tensor:
        quantized = super().run_quantization(asked)
        return MXFP4Tensor(quantized.codes, swizzle_scales(quantized.scales))


@functools.cache
def _warn_of_float32(backend: str) -> None:
    logger.warning(
        "duqpp runs on float32 activations by its reference, which is slow: the kernels of %s take "
        "bfloat16 and float16. Load the model with dtype=torch.bfloat16.",
        backend,
    )


class CudaBackend(_NativeBackend):
    """CUDA kernels; scales are swizzled, for activations and, on Blackwell, prepared weights alike.

    The kernels read and write 16-bit floats. Float32 activations and results are the reference's,
    on the same device and in the same layouts: slow, but what the op promises.

    Args:
        name: of the backend.
        code: by compute capability, the architectures of a build whose code runs there.
    """

    def __init__(self, name: str, code: dict[tuple[int, int], tuple[str, ...]]):
        self.name, self._code = name, code
        self._float32 = _ReferenceInLayoutOf(self)

    def unavailable_on(self, capability: tuple[int, int]) -> str | None:
        """`unavailable_reason` for any GPU of a compute capability, where there is a library."""
        if not any(map(self.code_for, self._code)):
            first = next(iter(self._code.values()))[0]
            return f"this build has no kernels for sm_{first}"
        major, minor = capability
        if capability not in self._code:
            wanted = " or ".join(".".join(map(str, able)) for able in self._code)
            return f"needs compute capability {wanted}, the device has {major}.{minor}"
        if self.code_for(capability) is None:
            return f"this build has no kernels for compute capability {major}.{minor}"
        return None

    def code_for(self, capability: tuple[int, int]) -> str | None:
        """The architecture of this build whose code runs on such a GPU, as in "100f"."""
        built = _C.build_info()["cuda_architectures"].split(",")
        return next((name for name in self._code.get(capability, ()) if name in built), None)

    def scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return (swizzled_size(rows, columns // BLOCK_SIZE),)

    def weight_scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return self.scales_shape(rows, columns)

    def prepare_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        return MXFP4Tensor(weight.codes.contiguous(), swizzle_scales(weight.scales))

    def restore_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        return _unswizzled(weight)

    def mxfp4_gemm(
        self, a: MXFP4Tensor, b: MXFP4Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        if out_dtype == torch.float32:
            return self._of_float32().mxfp4_gemm(a, b, bias, out_dtype)
        return super().mxfp4_gemm(a, b, bias, out_dtype)

    def _unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"needs a tensor on a CUDA device, not on {device.type}"
        if _C is None:
            return _ABSENT
        reason = self.unavailable_on(torch.cuda.get_device_capability(device))
        return driver_refusal() if reason is None else reason

    def run_quantization(self, asked: Quantization) -> MXFP4Tensor:
        if asked.x.dtype == torch.float32:
            return self._of_float32().run_quantization(asked)
        return super().run_quantization(asked)

    def run_linear(self, asked: Quantization, weight: MXFP4Tensor, bias: Tensor | None) -> Tensor:
        if asked.x.dtype == torch.float32:
            return self._of_float32().run_linear(asked, weight, bias)
        return super().run_linear(asked, weight, bias)

    def _of_float32(self) -> Backend:
        """What runs an op on float32, which the kernels do not take."""
        _warn_of_float32(self.name)
        return self._float32


class Sm80Backend(CudaBackend):
    """CUDA kernels for GPUs whose tensor cores do not know MXFP4.

    Weights are in fragment order, in the bytes that they have in a checkpoint and one more a row.
    Products of many rows are those of `duqpp.ops.large_gemm`.
    """

    def weight_scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return (prepared_scales_size(rows, columns),)

    def prepare_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        if weight.scales.is_cuda:
            report_inexact_rows(weight, route_on(weight.scales.device))
        return to_fragments(weight)

    def restore_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        return from_fragments(weight)

    def mxfp4_gemm(
        self, a: MXFP4Tensor, b: MXFP4Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        if out_dtype == torch.float32 or not _is_large(a.shape[0], b):
            return super().mxfp4_gemm(a, b, bias, out_dtype)
        return large_gemm(a, b, bias, out_dtype)

    def run_linear(self, asked: Quantization, weight: MXFP4Tensor, bias: Tensor | None) -> Tensor:
        x = asked.x
        if x.dtype == torch.float32 or not _is_large(x.shape[0], weight):
            return super().run_linear(asked, weight, bias)
        return large_gemm(self.run_quantization(asked), weight, bias, x.dtype)

    def direct_ops(self, rows: int, columns: int, device: torch.device) -> DirectOps:
        ops = super().direct_ops(rows, columns, device)
        return ops._replace(most_values=(_large_rows(rows, columns, device) - 1) * columns)


def _is_large(rows: int, weight: MXFP4Tensor) -> bool:
    """Whether a product of so many rows of x is one for `large_gemm`."""
    return rows >= _large_rows(*weight.shape, weight.codes.device)


@functools.cache
def _large_rows(n: int, k: int, device: torch.device) -> float:
    known = crossover(torch.cuda.get_device_capability(device))
    return float("inf") if known is None else known.at(n, k)


# Code for a family (f) runs on every capability of it, code for sm_80 on every 8.x, other code on
# its own capability only.
CUDA_BACKENDS = (
    CudaBackend("cuda-sm100", {(10, 0): ("100f", "100a"), (10, 3): ("100f",)}),
    CudaBackend("cuda-sm120", {(12, 0): ("120f", "120a"), (12, 1): ("120f",)}),
    Sm80Backend("cuda-sm80", {**{(8, minor): ("80",) for minor in (0, 6, 7, 9)}, (9, 0): ("90a",)}),
)


def _unswizzled(tensor: MXFP4Tensor) -> MXFP4Tensor:
    rows, columns = tensor.shape
    scales = unswizzle_scales(tensor.scales, rows, columns // BLOCK_SIZE)
    return MXFP4Tensor(tensor.codes, scales)


def _with_constants(x: Tensor, *constants: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """All of them contiguous, no constant's copy being the last kernel that is launched.

    On a GPU a kernel may read a model's constants while the kernel just before it is running
    (csrc/cuda/rotate_quantize.h): where one had to be copied, x is copied after it.
    """
    kept = [_contiguous(constant) for constant in constants]
    copied = any(one is not other for one, other in zip(kept, constants, strict=True))
    return x.clone(memory_format=torch.contiguous_format) if copied else x.contiguous(), kept


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
