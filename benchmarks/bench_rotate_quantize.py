"""rotate_quantize and its fused forms, on the CPU or a GPU, against a copy of the same bytes.

The roof is the machine's copy bandwidth: what is read and written, once. "vs_copy" is against a
copy of the input, x alone, in the same turns.
"""

from collections.abc import Callable
from itertools import product

import torch
from harness import Run, add_device, add_shapes, parser, skip, start
from roofline import Peaks, copy_bandwidth
from timing import alternate, clock_for, copied, in_turn
from torch import Tensor

from duqpp.format import MXFP4Tensor, ScaleRule, dequantize
from duqpp.format.scale_layout import unswizzle_scales
from duqpp.ops import rmsnorm_rotate_quantize, rotate_quantize, silu_mul_rotate_quantize
from duqpp.ops.dispatch import select
from duqpp.rotation.basis import hadamard

RULE = ScaleRule.EVEN
SHARED = hadamard(32).bfloat16().contiguous()
COLUMNS = {
    "form": "s",
    "rotation": "s",
    "cache": "s",
    "M": "d",
    "K": "d",
    "time_us": ".1f",
    "GB/s": ".1f",
    "vs_copy": ".2f",
    "%roof": ".0f",
}
Form = Callable[[Tensor, Tensor, str], MXFP4Tensor]  # of x, up and a backend's name
FORMS = (("plain", "none"), ("plain", "shared"), ("plain", "per-block"))
FORMS += (("rmsnorm", "shared"), ("silu_mul", "shared"))


def forms(k: int, device: str) -> dict[tuple[str, str], Form]:
    """By name and rotation."""
    shared = SHARED.to(device)
    per_block = shared.expand(k // 32, 32, 32).contiguous()
    weight = torch.linspace(0.5, 2, k, device=device).bfloat16()

    def plain(rotation: Tensor | None) -> Form:
        return lambda x, up, backend: rotate_quantize(x, rotation, rule=RULE, backend=backend)

    return {
        ("plain", "none"): plain(None),
        ("plain", "shared"): plain(shared),
        ("plain", "per-block"): plain(per_block),
        ("rmsnorm", "shared"): lambda x, up, backend: rmsnorm_rotate_quantize(
            x, weight, shared, epsilon=1e-5, rule=RULE, backend=backend
        ),
        ("silu_mul", "shared"): lambda x, up, backend: silu_mul_rotate_quantize(
            x, up, shared, rule=RULE, backend=backend
        ),
    }


def values(quantized: MXFP4Tensor) -> Tensor:
    """Float32 [M, K] of an op's result, whichever layout its scales have."""
    rows, k = quantized.shape
    scales = quantized.scales
    if scales.dim() == 1:
        scales = unswizzle_scales(scales, rows, k // 32)
    return dequantize(MXFP4Tensor(quantized.codes, scales))


def check(form: Form, x: Tensor, up: Tensor, backend: str) -> None:
    """What is timed is the op: float32 sums in another order move few codes."""
    one, two = values(form(x, up, backend)), values(form(x, up, "reference"))
    differ = (one != two).float().mean().item()
    assert differ <= max(1e-3, 8 / one.numel()), f"{differ:.2%} of the values differ"


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    add_shapes(options)
    add_device(options, cpu_cache="warm")
    options, generator = start(options, arguments)
    device = options.device
    backend = select("rotate_quantize", torch.device(device)).name
    if device == "cuda" and backend == "reference":
        skip("no kernel of rotate_quantize for this GPU; `duqpp doctor` says why")
    peaks = Peaks({"copy": copy_bandwidth(min(1.0, options.seconds), device)})
    clocks = {cache: clock_for(device, cold=cache == "cold") for cache in options.cache}
    run = Run("rotate_quantize", COLUMNS, options, {"peaks": peaks.to_dict()})

    def measured(
        *, seconds: float, form: str, rotation: str, cache: str, M: int, K: int
    ) -> dict[str, str | float]:
        call = forms(K, device)[form, rotation]
        inputs = 2 if form == "silu_mul" else 1
        x, up = (
            torch.randn(M, K, generator=generator, device=device, dtype=torch.bfloat16)
            for _ in "xu"
        )
        check(call, x[:256], up[:256], backend)
        cold = cache == "cold"
        xs, ups = (in_turn(copied(t.clone, t.nbytes, cold=cold)) for t in (x, up))
        targets = in_turn(copied(x.clone, x.nbytes, cold=cold))
        candidates = {
            "copy": lambda: targets().copy_(xs()),
            "duqpp": lambda: call(xs(), ups(), backend),
        }
        times, ratios = alternate(candidates, clocks[cache], seconds=seconds)
        moved = M * K * (2 * inputs + 17 / 32)
        median = times["duqpp"].median
        return {
            "backend": backend,
            **times["duqpp"].microseconds("time"),
            "copy_us": times["copy"].median * 1e6,
            "turns": times["duqpp"].turns,
            "GB/s": moved / median / 1e9,
            "vs_copy": ratios["duqpp"],
            "%roof": 100 * peaks.roof(moved, 0)[1] / median,
        }

    cases = [
        {"form": form, "rotation": rotation, "cache": cache, "M": m, "K": k}
        for k, m, (form, rotation), cache in product(
            options.columns, options.rows, FORMS, options.cache
        )
    ]
    run.measure(cases, measured)
    run.finish()


if __name__ == "__main__":
    main()
