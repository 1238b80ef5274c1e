"""rotate_quantize and its fused forms, on the CPU or a GPU, against a copy of the same bytes.

The roof is the machine's copy bandwidth: what is read and written, once. On a GPU the inputs are
copied until they exceed its L2, and the copies used in turn.
"""

from collections.abc import Callable

import torch
from harness import Table, add_shapes, alternate, copies_for, in_turn, parser, report, start
from roofline import copy_bandwidth
from torch import Tensor

from duqpp.format import MXFP4Tensor, ScaleRule, dequantize
from duqpp.format.scale_layout import unswizzle_scales
from duqpp.ops import rmsnorm_rotate_quantize, rotate_quantize, silu_mul_rotate_quantize
from duqpp.ops.dispatch import available
from duqpp.rotation.basis import hadamard

RULE = ScaleRule.EVEN
SHARED = hadamard(32).bfloat16().contiguous()
COLUMNS = {
    "form": "s",
    "rotation": "s",
    "M": "d",
    "K": "d",
    "time_us": ".1f",
    "GB/s": ".1f",
    "vs_copy": ".2f",
    "%roof": ".0f",
}
Form = Callable[[Tensor, Tensor, str], MXFP4Tensor]  # of x, up and a backend's name


def forms(k: int, device: str) -> dict[tuple[str, str, int], Form]:
    """By name, rotation and number of inputs."""
    shared = SHARED.to(device)
    per_block = shared.expand(k // 32, 32, 32).contiguous()
    weight = torch.linspace(0.5, 2, k, device=device).bfloat16()

    def plain(rotation: Tensor | None) -> Form:
        return lambda x, up, backend: rotate_quantize(x, rotation, rule=RULE, backend=backend)

    return {
        ("plain", "none", 1): plain(None),
        ("plain", "shared", 1): plain(shared),
        ("plain", "per-block", 1): plain(per_block),
        ("rmsnorm", "shared", 1): lambda x, up, backend: rmsnorm_rotate_quantize(
            x, weight, shared, epsilon=1e-5, rule=RULE, backend=backend
        ),
        ("silu_mul", "shared", 2): lambda x, up, backend: silu_mul_rotate_quantize(
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


def main() -> None:
    options = parser(__doc__)
    add_shapes(options)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options, generator = start(options)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device")
        return
    backend = available("rotate_quantize", torch.device(device))[0]
    bandwidth = copy_bandwidth(device=device)
    table = Table(COLUMNS, options)
    for k in options.columns:
        for m in options.rows:
            x, up = (torch.randn(m, k, generator=generator).bfloat16().to(device) for _ in "xu")
            copies = range(copies_for(x.nbytes) if device == "cuda" else 1)
            xs, ups = (in_turn(t.clone() for _ in copies) for t in (x, up))
            target = torch.empty_like(x)
            for (form, rotation, inputs), call in forms(k, device).items():
                check(call, x[:256], up[:256], backend)
                candidates = {
                    "copy": lambda xs=xs, t=target: t.copy_(xs()),
                    "duqpp": lambda call=call, xs=xs, ups=ups: call(xs(), ups(), backend),
                }
                times, ratios = alternate(candidates, seconds=options.seconds / 4, device=device)
                moved = m * k * (2 * inputs + 17 / 32)
                median = times["duqpp"].median
                table.add(
                    {
                        "form": form,
                        "rotation": rotation,
                        "backend": backend,
                        "M": m,
                        "K": k,
                        "time_us": median * 1e6,
                        "q25_us": times["duqpp"].q25 * 1e6,
                        "q75_us": times["duqpp"].q75 * 1e6,
                        "GB/s": moved / median / 1e9,
                        "vs_copy": ratios["duqpp"],
                        "%roof": 100 * moved / bandwidth / median,
                    }
                )
    report(table.rows, options, copy_bandwidth_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
