"""mxfp4_gemm against torch's linear: on a GPU bfloat16 and FP8, on the CPU bfloat16 and float32.

duqpp is timed with the rotation and quantization of its activations, and without; the CPU's other
baseline is ggml's MXFP4. Cold weights are copied until they exceed every cache, and the copies used
in turn, as a model's layers are.
"""

import functools
from itertools import product

import ggml_product
import torch
from harness import Run, add_device, parser, skip, start
from operands import Weight, latest
from roofline import SIZE, measured_peaks
from shapes import MODELS, POWERS, mxfp4_bytes
from timing import alternate, clock_for

from duqpp.ops.dispatch import select

CPU_ROWS = (1, 4, 16, 64, 512, 2048)
COLUMNS = {
    "model": "s",
    "linear": "s",
    "cache": "s",
    "M": "d",
    "N": "d",
    "K": "d",
    "time_us": ".1f",
    "gemm_us": ".1f",
    "vs_bf16": ".2f",
    "gemm_vs_bf16": ".2f",
    "vs_fp8": ".2f",
    "vs_fp32": ".2f",
    "vs_ggml": ".2f",
    "roof": "s",
    "%roof": ".0f",
}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    add_device(options, cpu_cache="cold")
    options.add_argument("--rows", type=int, nargs="+", help="M (default: powers of two to 16384)")
    options.add_argument(
        "--models", nargs="+", choices=MODELS, help="(default: 8b, and on a GPU 70b)"
    )
    options.add_argument("--linears", nargs="+", default=list(MODELS["8b"].linears))
    options.add_argument("--fp32", action="store_true", help="time float32 linears, too")
    options.add_argument("--fp8", action="store_true", help="time FP8 on the CPU, too")
    options.add_argument("--no-ggml", action="store_true", help="even where it is installed")
    options.add_argument("--peak-size", type=int, default=SIZE, help="of the products for peaks")
    options, generator = start(options, arguments)
    device = options.device
    on_gpu = device == "cuda"
    backend = select("mxfp4_gemm", torch.device(device)).name
    if on_gpu and backend == "reference":
        skip("no kernel of mxfp4_gemm for this GPU; `duqpp doctor` says why")
    peaks = measured_peaks(device, options.threads, min(1.0, options.seconds), options.peak_size)
    clocks = {cache: clock_for(device, cold=cache == "cold") for cache in options.cache}
    run = Run("mxfp4_gemm", COLUMNS, options, {"peaks": peaks.to_dict()})
    with_ggml = ggml_product.AVAILABLE and not on_gpu and not options.no_ggml

    weight = latest(lambda k, n: Weight(n, k, backend, generator))
    ggml = latest(lambda k, n: ggml_product.Product(weight(k, n).values, options.threads))

    def measured(
        *, seconds: float, model: str, linear: str, cache: str, M: int
    ) -> dict[str, str | float | None]:
        k, n = MODELS[model].linears[linear]
        one, cold = weight(k, n), cache == "cold"
        x = one.activation(M)
        calls = one.calls(x, cold=cold, fp8=on_gpu or options.fp8)
        if options.fp32:
            calls["fp32"] = functools.partial(torch.nn.functional.linear, x.float(), one.values)
        if with_ggml:
            calls["ggml"] = ggml(k, n).bind(x.float())
        one.check(x, calls)
        times, ratios = alternate(calls, clocks[cache], seconds=seconds)
        outputs, operations = 2 * M * n, 2 * M * n * k
        roof, least = peaks.roof(2 * M * k + mxfp4_bytes(n, k) + outputs, operations)
        gemm_roof, gemm_least = peaks.roof(mxfp4_bytes(M + n, k) + outputs, operations)
        row = {
            "N": n,
            "K": k,
            "backend": backend,
            "turns": times["duqpp"].turns,
            **times["duqpp"].microseconds("time"),
            "roof": roof,
            "%roof": 100 * least / times["duqpp"].median,
            "gemm_roof": gemm_roof,
            "gemm_%roof": 100 * gemm_least / times["gemm"].median,
        }
        if one.fp8_absent:
            row["fp8"] = one.fp8_absent
        for other in times.keys() - {"duqpp"}:
            row |= times[other].microseconds(other)
            row[f"{other}_vs_bf16"] = ratios[other]
            row[f"vs_{other}"] = ratios["duqpp"] / ratios[other]  # of the same turns
        return row

    cases = [
        {"model": model, "linear": linear, "cache": cache, "M": m}
        for model, linear, m, cache in product(
            options.models or (("8b", "70b") if on_gpu else ("8b",)),
            options.linears,
            options.rows or (POWERS if on_gpu else CPU_ROWS),
            options.cache,
        )
    ]
    run.measure(cases, measured)
    for name, why in peaks.absent.items():
        run.say(f"not measured: {name}: {why}")
    run.finish()


if __name__ == "__main__":
    main()
