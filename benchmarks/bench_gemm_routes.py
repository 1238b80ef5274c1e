"""Where one way to multiply MXFP4 overtakes another: the crossover in M, for each linear.

python benchmarks/bench_gemm_routes.py --device cuda --out RESULT.json
python benchmarks/bench_gemm_routes.py --adopt RESULT.json    no GPU: into duqpp/ops/crossover.json
python benchmarks/bench_gemm_routes.py --device cuda --route small=MODULE:FUNCTION --route large=...

A route is a function of (a, b): what `rotate_quantize` and `prepare_weight` return on the backend
of this device, x [M, K] and a weight [N, K], to their product [M, N] in bfloat16. The first route
that is given is expected to win at small M, the last at large M. Without --route they are, on GPUs
from sm_80 to sm_90, the kernels for few rows and duqpp.ops.large_gemm.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
from harness import Case, Run, add_device, parser, skip, start, write_json
from operands import Weight, latest
from shapes import MODELS
from timing import alternate, clock_for
from torch import Tensor

from duqpp.format import MXFP4Tensor
from duqpp.ops import crossover, mxfp4_gemm
from duqpp.ops.dispatch import select
from duqpp.ops.large_gemm import large_gemm

Route = Callable[[MXFP4Tensor, MXFP4Tensor], Tensor]
AUTO = "auto"  # the public op, which chooses by itself
ROWS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
COLUMNS = {"model": "s", "linear": "s", "cache": "s", "M": "d", "N": "d", "K": "d", "best": "s"}


def few_rows(a: MXFP4Tensor, b: MXFP4Tensor) -> Tensor:
    """The kernels for few rows, however many rows there are."""
    op = torch.ops.duqpp_native.mxfp4_gemm
    return op(a.codes, a.scales, b.codes, b.scales, None, torch.bfloat16)


ROUTES = {"cuda-sm80": [("small", few_rows), ("large", large_gemm)]}  # by backend


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

    from_M is None where `large` is behind at the largest M. at_M is where both take equally long,
    on a line between that M and the one before; twice the largest M where `large` is behind there.
    """
    groups: dict[tuple, list[Case]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["linear"], row["cache"]), []).append(row)
    found = []
    for (model, linear, cache), members in groups.items():
        from_m, at = None, 2.0 * max(row["M"] for row in members)
        ahead = 0.0  # microseconds, at from_m
        for row in sorted(members, key=lambda row: -row["M"]):
            lead = row[f"{small}_us"] - row[f"{large}_us"]
            if lead < 0:
                if from_m is not None:
                    at = from_m - (from_m - row["M"]) * ahead / (ahead - lead)
                break
            from_m, at, ahead = row["M"], float(row["M"]), lead
        case = {"model": model, "linear": linear, "cache": cache}
        found.append({**case, "from_M": from_m, "at_M": at})
    return found


def fitted(found: list[Case]) -> dict[str, int]:
    """`rows` and `fixed` of duqpp/ops/crossover.py, nearest to what `thresholds` found.

    Least squares of the relative distance from at_M, neither number below zero; of cold inputs, as
    a model's weights are, where there are any.
    """
    cold = [case for case in found if case["cache"] == "cold"] or found
    at = torch.tensor([case["at_M"] for case in cold], dtype=torch.float64)
    shapes = (MODELS[case["model"]].linears[case["linear"]] for case in cold)
    per_fixed = torch.tensor([crossover.WEIGHTS / (n * k) for k, n in shapes], dtype=torch.float64)
    terms = torch.stack([torch.ones_like(at), per_fixed], dim=1) / at[:, None]
    answers = []
    for kept in ([0, 1], [0], [1]):  # both, or one of them zero
        answer = torch.zeros(2, dtype=torch.float64)
        answer[kept] = torch.linalg.lstsq(terms[:, kept], torch.ones(len(at), 1).double())[0][:, 0]
        if (answer >= 0).all():
            answers.append(answer)
    best = min(answers, key=lambda answer: (terms @ answer - 1).norm().item())
    rows, fixed = (round(value) for value in best.tolist())
    return {"rows": rows, "fixed": fixed}


def adopt(file: Path, table: Path) -> str:
    """Write what was measured into the table that the dispatch reads; returns the entry, as text.

    Raises: SystemExit where the file has no complete measurement of a GPU.
    """
    result = json.loads(file.read_text(encoding="utf-8"))
    if not (found := result.get("crossover")):
        raise SystemExit(f"{file} has no crossover: it is not of a GPU, or rows of it are left")
    about = result["environment"]
    where = (about["gpus"][0], f"torch {about['versions']['torch']}", f"commit {about['commit']}")
    entry = {**found["fitted"], "source": f"a measurement: {', '.join(where)}"}
    entries = json.loads(table.read_text(encoding="utf-8")) | {found["capability"]: entry}
    write_json(dict(sorted(entries.items())), table)
    return f"{table}: {found['capability']} is {json.dumps(entry)}"


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    add_device(options, cpu_cache="cold")
    options.add_argument("--route", type=route, action="append", default=[], dest="routes")
    options.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M")
    options.add_argument("--models", nargs="+", choices=MODELS, default=("8b", "70b"))
    options.add_argument(
        "--adopt", type=Path, metavar="RESULT.json", help="measure nothing; use what was found"
    )
    options, generator = start(options, arguments)
    if options.adopt:
        print(adopt(options.adopt, crossover.TABLE))
        return
    backend = select("mxfp4_gemm", torch.device(options.device)).name
    routes: list[tuple[str, Route]] = options.routes or ROUTES.get(backend, [])
    if options.device == "cuda" and backend == "reference":
        skip("no kernel of mxfp4_gemm for this GPU; `duqpp doctor` says why")
    if len(routes) < 2:
        skip(f"{backend} has one way to multiply; --route names two or more to be compared")
    op = partial(mxfp4_gemm, out_dtype=torch.bfloat16, backend=backend)
    ways: dict[str, Route] = dict(routes) | {AUTO: op}
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
    small, large = routes[0][0], routes[-1][0]
    rows = [row for row in result["rows"] if {f"{small}_us", f"{large}_us"} <= row.keys()]
    found = thresholds(rows, small, large)
    run.add(small=small, large=large, thresholds=found)
    if options.device == "cuda" and result["complete"] and found and not options.routes:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        run.add(crossover={"capability": capability, "fitted": fitted(found)})
        run.say(f"crossover: {result['crossover']}; to use it: {Path(__file__).name} --adopt FILE")
    run.finish()


if __name__ == "__main__":
    main()
