"""Where one way to multiply MXFP4 overtakes another: the crossover in M, for each linear.

python benchmarks/bench_gemm_routes.py --device cuda --route small=MODULE:FUNCTION --route large=...

A route is a function of (a, b): what `rotate_quantize` and `prepare_weight` return on the backend
of this device, x [M, K] and a weight [N, K], to their product [M, N] in bfloat16. The first route
that is given is expected to win at small M, the last at large M.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from itertools import product

import torch
from harness import Case, Run, add_device, parser, skip, start
from operands import Weight, latest
from shapes import MODELS
from timing import alternate, clock_for
from torch import Tensor

from duqpp.format import MXFP4Tensor
from duqpp.ops import mxfp4_gemm
from duqpp.ops.dispatch import select

Route = Callable[[MXFP4Tensor, MXFP4Tensor], Tensor]
AUTO = "auto"  # the public op, which chooses by itself
ROWS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
COLUMNS = {"model": "s", "linear": "s", "cache": "s", "M": "d", "N": "d", "K": "d", "best": "s"}


def route(text: str) -> tuple[str, Route]:
    """A route from NAME=MODULE:FUNCTION."""
    name, _, place = text.partition("=")
    module, _, function = place.partition(":")
    if not (name and module and function):
        raise argparse.ArgumentTypeError(f"must be NAME=MODULE:FUNCTION, got {text!r}")
    try:
        return name, getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{place}: {error}") from error


def thresholds(rows: Iterable[Case], small: str, large: str) -> list[Case]:
    """For each linear and cache, the least measured M from which `large` stays ahead of `small`.

    from_M is None where `large` is behind at the largest M.
    """
    groups: dict[tuple, list[Case]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["linear"], row["cache"]), []).append(row)
    found = []
    for (model, linear, cache), members in groups.items():
        from_m = None
        for row in sorted(members, key=lambda row: -row["M"]):
            if row[f"{large}_us"] > row[f"{small}_us"]:
                break
            from_m = row["M"]
        found.append({"model": model, "linear": linear, "cache": cache, "from_M": from_m})
    return found


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    add_device(options, cpu_cache="cold")
    options.add_argument("--route", type=route, action="append", default=[], dest="routes")
    options.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M")
    options.add_argument("--models", nargs="+", choices=MODELS, default=("8b", "70b"))
    options, generator = start(options, arguments)
    backend = select("mxfp4_gemm", torch.device(options.device)).name
    if len(options.routes) < 2:
        skip("routes are compared where --route names two of them or more")
    if options.device == "cuda" and backend == "reference":
        skip("no kernel of mxfp4_gemm for this GPU; `duqpp doctor` says why")
    op = partial(mxfp4_gemm, out_dtype=torch.bfloat16, backend=backend)
    ways: dict[str, Route] = dict(options.routes) | {AUTO: op}
    columns = COLUMNS | {f"{name}_us": ".1f" for name in ways}
    clocks = {cache: clock_for(options.device, cold=cache == "cold") for cache in options.cache}
    run = Run("gemm_routes", columns, options, {})
    weight = latest(lambda k, n: Weight(n, k, backend, generator))

    def measured(
        *, seconds: float, model: str, linear: str, cache: str, M: int, routes: str
    ) -> dict[str, str | float]:
        k, n = MODELS[model].linears[linear]
        one, cold = weight(k, n), cache == "cold"
        x = one.activation(M)
        inputs, weights = one.activations(x, cold=cold), one.weights(cold=cold)
        calls = {name: lambda way=way: way(inputs(), weights()) for name, way in ways.items()}
        one.check(x, calls, quantized=calls)
        times, _ = alternate(calls, clocks[cache], seconds=seconds)
        fastest = min(times.keys() - {AUTO}, key=lambda name: times[name].median)
        row: dict[str, str | float] = {"N": n, "K": k, "backend": backend, "best": fastest}
        for name, timing in times.items():
            row |= timing.microseconds(name)
        return row

    result = run.measure(
        [
            {"model": model, "linear": linear, "cache": cache, "M": m, "routes": " ".join(ways)}
            for model in options.models
            for linear, m, cache in product(MODELS[model].linears, options.rows, options.cache)
        ],
        measured,
    )
    small, large = options.routes[0][0], options.routes[-1][0]
    rows = [row for row in result["rows"] if {f"{small}_us", f"{large}_us"} <= row.keys()]
    run.add(small=small, large=large, thresholds=thresholds(rows, small, large))
    run.finish()


if __name__ == "__main__":
    main()
