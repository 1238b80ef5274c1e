"""mxfp4_gemm on the CPU against torch's linear in bfloat16 and float32, and against ggml's MXFP4.

duqpp is timed with the rotation and quantization of its activations, and without. The weights are
copied until they exceed every cache, and the copies used in turn, as a model's layers are.
"""

from argparse import Namespace
from collections.abc import Callable

import ggml_product
import torch
from harness import Table, alternate, copies_for, in_turn, parser, report, start
from roofline import int8_rate, read_bandwidth
from shapes import LLAMA_3_8B, ROWS, mxfp4_bytes
from torch import Tensor
from torch.nn.functional import linear

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.ops import mxfp4_gemm, mxfp4_linear, prepare_weight, quantize, rotate_quantize
from duqpp.rotation.basis import hadamard

RULE = ScaleRule.EVEN
ROTATION = hadamard(32).bfloat16().contiguous()
COLUMNS = {
    "linear": "s",
    "M": "d",
    "N": "d",
    "K": "d",
    "time_us": ".0f",
    "gemm_us": ".0f",
    "vs_bf16": ".2f",
    "vs_fp32": ".2f",
    "vs_ggml": ".2f",
    "roof": "s",
    "%roof": ".0f",
}


class Linear:
    """One weight [N, K] in every form that is timed, and the calls that multiply with it."""

    def __init__(self, n: int, k: int, options: Namespace) -> None:
        generator = torch.Generator().manual_seed(options.seed)
        self.weight = torch.randn(n, k, generator=generator) / k**0.5
        prepared = prepare_weight(quantize(self.weight, rule=RULE), backend="cpu")
        bf16 = self.weight.bfloat16()
        self._bf16 = in_turn(bf16.clone() for _ in range(copies_for(bf16.nbytes)))
        self._mxfp4 = in_turn(
            MXFP4Tensor(prepared.codes.clone(), prepared.scales.clone())
            for _ in range(copies_for(mxfp4_bytes(n, k)))
        )
        self._fp32 = options.fp32
        self._ggml = None
        if ggml_product.AVAILABLE and not options.no_ggml:
            self._ggml = ggml_product.Product(self.weight, options.threads)

    def calls(self, x: Tensor) -> dict[str, Callable[[], Tensor]]:
        """By name; x is bfloat16 [M, K]."""
        a = rotate_quantize(x, ROTATION, rule=RULE, backend="cpu")
        wide = x.float()
        calls = {
            "bf16": lambda: linear(x, self._bf16()),
            "duqpp": lambda: mxfp4_linear(x, ROTATION, self._mxfp4(), rule=RULE, backend="cpu"),
            "gemm": lambda: mxfp4_gemm(a, self._mxfp4(), out_dtype=x.dtype, backend="cpu"),
        }
        if self._fp32:
            calls["fp32"] = lambda: linear(wide, self.weight)
        if self._ggml is not None:
            calls["ggml"] = self._ggml.bind(wide)
        return calls


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=ROWS, help="values of M")
    options.add_argument("--linears", nargs="+", default=[name for name, _, _ in LLAMA_3_8B])
    options.add_argument("--fp32", action="store_true", help="time float32 linears, too")
    options.add_argument("--no-ggml", action="store_true", help="even where it is installed")
    options, generator = start(options)
    bandwidth, rate = read_bandwidth(), int8_rate(options.threads)
    table = Table(COLUMNS, options)
    for name, k, n in LLAMA_3_8B:
        if name not in options.linears:
            continue
        one = Linear(n, k, options)
        for m in options.rows:
            x = torch.randn(m, k, generator=generator).bfloat16()
            calls = one.calls(x)
            check(rotated(x), one.weight, calls["duqpp"]())
            if "ggml" in calls:
                check(x.float(), one.weight, calls["ggml"]())
            times, ratios = alternate(calls, seconds=options.seconds)
            median = times["duqpp"].median
            least = {"bytes": mxfp4_bytes(n, k) / bandwidth}
            if rate:
                least["int8"] = 2 * m * n * k / rate
            roof = max(least, key=least.get)
            row = {
                "linear": name,
                "M": m,
                "N": n,
                "K": k,
                "time_us": median * 1e6,
                "q25_us": times["duqpp"].q25 * 1e6,
                "q75_us": times["duqpp"].q75 * 1e6,
                "gemm_us": times["gemm"].median * 1e6,
                "bf16_us": times["bf16"].median * 1e6,
                "roof": roof,
                "%roof": 100 * least[roof] / median,
            }
            for other in ("bf16", "fp32", "ggml"):
                if other in ratios:  # both against bf16 in the same turns
                    row[f"vs_{other}"] = ratios["duqpp"] / ratios[other]
            table.add(row)
    report(
        table.rows,
        options,
        read_bandwidth_bytes_per_second=bandwidth,
        int8_operations_per_second=rate,
    )


def rotated(x: Tensor) -> Tensor:
    """x R in float32: a weight that was not folded is multiplied by this, not by x."""
    return (x.float().unflatten(-1, (-1, 32)) @ ROTATION.float()).flatten(-2)


def check(x: Tensor, weight: Tensor, result: Tensor) -> None:
    """What is timed is the product: MXFP4's own error on random values is 0.1 to 0.15."""
    exact = x[:8] @ weight.T
    error = (result[:8].float() - exact).norm() / exact.norm()
    assert 0.05 < error < 0.3, f"relative error {error}"


if __name__ == "__main__":
    main()
