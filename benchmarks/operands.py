"""A weight and an activation in every form that is multiplied, in copies that no cache holds."""

from collections.abc import Callable, Container
from typing import Any

import torch
from roofline import attempt, fp8_mm, to_fp8
from shapes import mxfp4_bytes
from timing import Call, copied, in_turn
from torch import Tensor
from torch.nn.functional import linear

from duqpp.format import MXFP4Tensor, ScaleRule, dequantize
from duqpp.ops import mxfp4_gemm, mxfp4_linear, prepare_weight, quantize, rotate_quantize
from duqpp.rotation.basis import hadamard

RULE = ScaleRule.EVEN
ROTATION = hadamard(32).bfloat16().contiguous()
CHUNK = 4096  # rows of a weight that are quantized at a time: the reference needs much memory
CHECKED = 8  # rows of a result

# What a result may differ from the float32 product of what was multiplied: bfloat16 rounds by
# 2**-9, e4m3 each factor by up to 2**-4, and a rotation's sums in another order move few codes.
TOLERANCES = {"bf16": 0.01, "gemm": 0.02, "duqpp": 0.02, "fp32": 0.01, "fp8": 0.06, "ggml": 0.3}


def quantized_rows(values: Tensor) -> MXFP4Tensor:
    """A float tensor [N, K] in MXFP4, row-major, on its device."""
    parts = [quantize(part, rule=RULE) for part in values.split(CHUNK)]
    return MXFP4Tensor(*(torch.cat([getattr(p, n) for p in parts]) for n in ("codes", "scales")))


class Weight:
    """A random weight [N, K].

    values: what the float baselines multiply, float32; quantized: its MXFP4, not folded, so that
    what duqpp multiplies it with is x R. fp8_absent: why torch has no FP8 product here, or "".
    """

    def __init__(self, n: int, k: int, backend: str, generator: torch.Generator) -> None:
        device = generator.device
        self.backend, self.fp8_absent, self._generator = backend, "", generator
        self.values = torch.randn(n, k, generator=generator, device=device) / k**0.5
        self.quantized = quantized_rows(self.values)
        self.rotation = ROTATION.to(device)
        prepared = prepare_weight(self.quantized, backend=backend)
        bf16 = self.values.bfloat16()
        self._bf16 = list(copied(bf16.clone, bf16.nbytes))
        self._mxfp4 = list(copied(lambda: _clone(prepared), mxfp4_bytes(n, k)))
        self._fp8: list[tuple[Tensor, Tensor]] = []

    def activation(self, rows: int) -> Tensor:
        """Random x, bfloat16 [rows, K]."""
        shape, device = (rows, self.values.shape[1]), self.values.device
        return torch.randn(shape, generator=self._generator, device=device, dtype=torch.bfloat16)

    def calls(self, x: Tensor, *, cold: bool, fp8: bool = False) -> dict[str, Call]:
        """Products with x, bfloat16 [M, K], by name; the first is the baseline.

        bf16: torch's linear. duqpp: rotation and quantization of x, and the product. gemm: the
        product alone. fp8: torch's of e4m3 with one scale a tensor, x converted before.
        """
        w16, w4 = self.turning(self._bf16, cold), self.turning(self._mxfp4, cold)
        xs = in_turn(copied(x.clone, x.nbytes, cold=cold))
        options: dict[str, Any] = {"backend": self.backend}
        gemm_inputs = self.activations(x, cold=cold)
        calls = {
            "bf16": lambda: linear(xs(), w16()),
            "duqpp": lambda: mxfp4_linear(xs(), self.rotation, w4(), rule=RULE, **options),
            "gemm": lambda: mxfp4_gemm(gemm_inputs(), w4(), out_dtype=x.dtype, **options),
        }
        if fp8 and (call := self._fp8_call(x, cold)):
            calls["fp8"] = call
        return calls

    def activations(self, x: Tensor, *, cold: bool) -> Callable[[], MXFP4Tensor]:
        """Copies of x rotated and quantized, in turn."""
        a = rotate_quantize(x, self.rotation, rule=RULE, backend=self.backend)
        return in_turn(copied(lambda: _clone(a), mxfp4_bytes(*x.shape), cold=cold))

    def weights(self, *, cold: bool) -> Callable[[], MXFP4Tensor]:
        """Copies of the prepared weight, in turn."""
        return self.turning(self._mxfp4, cold)

    @staticmethod
    def turning(copies: list[Any], cold: bool) -> Callable[[], Any]:
        return in_turn(copies if cold else copies[:1])

    def _fp8_call(self, x: Tensor, cold: bool) -> Call | None:
        if not self._fp8:
            one = to_fp8(self.values)
            self._fp8 = list(copied(lambda: (one[0].clone(), one[1]), one[0].nbytes))
        weights = self.turning(self._fp8, cold)
        narrow, scale = to_fp8(x.float())
        xs = in_turn(copied(lambda: (narrow.clone(), scale), narrow.nbytes, cold=cold))
        call, self.fp8_absent = attempt(lambda: lambda: fp8_mm(xs(), weights()))
        return call

    def check(
        self, x: Tensor, calls: dict[str, Call], quantized: Container[str] = ("duqpp", "gemm")
    ) -> None:
        """Hold some rows of each call's result against the float32 product of what it multiplies.

        Args: quantized: names of those that multiply MXFP4, not x and `values`.
        Raises: AssertionError that names the call.
        """
        rows = torch.linspace(0, x.shape[0] - 1, min(CHECKED, x.shape[0])).long().to(x.device)
        some = x[rows]
        a = rotate_quantize(some, self.rotation, rule=RULE, backend="reference")
        plain = some.float() @ self.values.T
        exact = dequantize(a) @ self._dequantized().T
        turned = (some.float().unflatten(-1, (-1, 32)) @ self.rotation.float()).flatten(-2)
        distance = _relative(exact, turned @ self.values.T)
        assert 0.05 < distance < 0.3, f"MXFP4's own error is {distance}"  # 0.1 to 0.15, random data
        for name, call in calls.items():
            error = _relative(call()[rows].float(), exact if name in quantized else plain)
            assert error < TOLERANCES.get(name, 0.02), f"{name}: relative error {error}"

    def _dequantized(self) -> Tensor:
        both = zip(
            self.quantized.codes.split(CHUNK), self.quantized.scales.split(CHUNK), strict=True
        )
        return torch.cat([dequantize(MXFP4Tensor(*part)) for part in both])


def latest(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, its last result kept for the same arguments, and let go of before the next."""
    kept: dict[tuple, Any] = {}

    def get(*key: Any) -> Any:
        if key not in kept:
            kept.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            kept[key] = make(*key)
        return kept[key]

    return get


def _clone(tensor: MXFP4Tensor) -> MXFP4Tensor:
    return MXFP4Tensor(tensor.codes.clone(), tensor.scales.clone())


def _relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).norm() / exact.norm()).item()
