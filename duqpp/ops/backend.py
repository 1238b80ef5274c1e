"""What a backend is: the public ops, over the few functions in which backends differ."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule
from duqpp.ops.gptq_block import GptqBlock, gptq_block

OPS = ("rotate_quantize", "mxfp4_gemm")  # those that a backend is chosen for


class RMSNorm(NamedTuple):
    """The RMSNorm of x is rotated; weight [K] in the dtype of x, None is all ones."""

    weight: Tensor | None
    epsilon: float


class SiluMul(NamedTuple):
    """``silu(x) * up`` is rotated; up has the shape and dtype of x."""

    up: Tensor


class Quantization(NamedTuple):
    """What a `rotate_quantize` is asked: x [M, K], and what comes before its rotation, if anything.

    The C++ sources call it RotateQuantizeProblem (csrc/problem.h).
    """

    x: Tensor
    rotation: Tensor | None
    rule: ScaleRule
    prologue: RMSNorm | SiluMul | None = None


class DirectOps(NamedTuple):
    """Ops of a backend without the checks of `duqpp.ops`, for who has settled what they are given.

    They check what memory safety needs, take contiguous tensors, and refuse others, and dtypes that
    they have no kernel for, with a RuntimeError.

    linear: (x [..., K], rotation, rule, codes, scales, bias) to [..., N] in the dtype of x.
    quantize: (x [..., K], rotation, rule) to codes and scales of [M, K].
    gemm: (codes, scales, the weight's codes and scales, bias, out_dtype) to [M, N].
    rules: the number by which they know a scale rule.
    most_values: of x, for which they are what the backend would run.
    whole_rows: weights of so many rows, or a multiple, can be concatenated along N once they are
        prepared; 0 is none.
    """

    linear: Callable[..., Tensor]
    quantize: Callable[..., tuple[Tensor, Tensor]]
    gemm: Callable[..., Tensor]
    rules: Mapping[ScaleRule, int]
    most_values: float = float("inf")
    whole_rows: int = 0


class Backend(ABC):
    """The functions behind the public ops; arguments arrive checked, x as [M, K].

    A backend says where it runs (`_unavailable`), quantizes (`run_quantization`) and multiplies
    (`mxfp4_gemm`). What it says no more of is as in a checkpoint: scales row-major, weights as they
    are.
    """

    name: str

    def unavailable_reason(self, op: str, device: torch.device) -> str | None:
        """Why `op` cannot run on `device` here, in a few words; None when it can."""
        return self._unavailable(device) if op in OPS else f"no op named {op}"

    def scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of an activation [rows, columns] that this GEMM reads."""
        return rows, columns // BLOCK_SIZE

    def weight_scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of a prepared weight [rows, columns]."""
        return rows, columns // BLOCK_SIZE

    def rotate_quantize(self, x: Tensor, rotation: Tensor | None, rule: ScaleRule) -> MXFP4Tensor:
        """See `duqpp.ops.rotate_quantize`; scales in the layout that this backend's GEMM reads."""
        return self.run_quantization(Quantization(x, rotation, rule))

    def rmsnorm_rotate_quantize(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        epsilon: float,
        rotation: Tensor | None,
        rule: ScaleRule,
    ) -> MXFP4Tensor:
        """See `duqpp.ops.rmsnorm_rotate_quantize`."""
        return self.run_quantization(Quantization(x, rotation, rule, RMSNorm(norm_weight, epsilon)))

    def silu_mul_rotate_quantize(
        self, gate: Tensor, up: Tensor, rotation: Tensor | None, rule: ScaleRule
    ) -> MXFP4Tensor:
        """See `duqpp.ops.silu_mul_rotate_quantize`."""
        return self.run_quantization(Quantization(gate, rotation, rule, SiluMul(up)))

    def prepare_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        """A weight as checkpoints hold it, in the layout that this backend's GEMM reads."""
        return weight

    def restore_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        """The inverse of `prepare_weight`."""
        return weight

    @abstractmethod
    def mxfp4_gemm(
        self, a: MXFP4Tensor, b: MXFP4Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """See `duqpp.ops.mxfp4_gemm`."""

    def mxfp4_linear(
        self,
        x: Tensor,
        rotation: Tensor | None,
        rule: ScaleRule,
        weight: MXFP4Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """`rotate_quantize`, then `mxfp4_gemm`, to the dtype of x."""
        return self.run_linear(Quantization(x, rotation, rule), weight, bias)

    def gptq_block(self, values: Tensor, factor: Tensor | None, rule: ScaleRule) -> GptqBlock:
        """See `duqpp.ops.gptq_block`."""
        return gptq_block(values, factor, rule)

    def direct_ops(self, rows: int, columns: int, device: torch.device) -> DirectOps | None:
        """What a linear with a prepared weight [rows, columns] there may call; None: nothing."""
        return None

    @abstractmethod
    def _unavailable(self, device: torch.device) -> str | None:
        """Why no op can run on `device` here, in a few words; None when all can."""

    @abstractmethod
    def run_quantization(self, asked: Quantization) -> MXFP4Tensor:
        """`rotate_quantize` and its fused forms."""

    def run_linear(self, asked: Quantization, weight: MXFP4Tensor, bias: Tensor | None) -> Tensor:
        """`mxfp4_linear`; what is asked has no prologue."""
        quantized = self.rotate_quantize(asked.x, asked.rotation, asked.rule)
        return self.mxfp4_gemm(quantized, weight, bias, asked.x.dtype)
