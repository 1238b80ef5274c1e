"""rotate_quantize on the CPU and its fused forms, against a copy of the same bytes.

The roof is the machine's copy bandwidth: what is read and written, once.
"""

import torch
from harness import Table, alternate, parser, report
from roofline import copy_bandwidth

from duqpp.format import ScaleRule
from duqpp.ops import rmsnorm_rotate_quantize, rotate_quantize, silu_mul_rotate_quantize
from duqpp.rotation.basis import hadamard

COLUMNS = {
    "form": "s",
    "rotation": "s",
    "M": "d",
    "K": "d",
    "time_us": ".0f",
    "GB/s": ".1f",
    "vs_copy": ".2f",
    "%roof": ".0f",
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=(1, 16, 512, 2048))
    options.add_argument("--columns", type=int, nargs="+", default=(4096, 14336))
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(options.seed)
    bandwidth = copy_bandwidth()
    table = Table(COLUMNS, options)
    rule, shared = ScaleRule.EVEN, hadamard(32).bfloat16().contiguous()
    for k in options.columns:
        per_block = shared.expand(k // 32, 32, 32).contiguous()
        for m in options.rows:
            x, up = (torch.randn(m, k, generator=generator).bfloat16() for _ in range(2))
            forms = {
                ("plain", "none", 1): lambda x=x: rotate_quantize(x, None, rule=rule),
                ("plain", "shared", 1): lambda x=x: rotate_quantize(x, shared, rule=rule),
                ("plain", "per-block", 1): lambda x=x, r=per_block: rotate_quantize(
                    x, r, rule=rule
                ),
                ("rmsnorm", "shared", 1): lambda x=x: rmsnorm_rotate_quantize(
                    x, x[0], shared, epsilon=1e-5, rule=rule
                ),
                ("silu_mul", "shared", 2): lambda x=x, up=up: silu_mul_rotate_quantize(
                    x, up, shared, rule=rule
                ),
            }
            for (form, rotation, inputs), call in forms.items():
                target = torch.empty_like(x)
                candidates = {"copy": lambda x=x, t=target: t.copy_(x), "duqpp": call}
                times, ratios = alternate(candidates, seconds=options.seconds / 4)
                moved = m * k * (2 * inputs + 17 / 32)
                median = times["duqpp"].median
                table.add(
                    {
                        "form": form,
                        "rotation": rotation,
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
