"""Tables and plots from the JSON that benchmarks write, so that no page has figures typed by hand.

python benchmarks/render.py                   every section of the pages, anew, and their plots
python benchmarks/render.py FILE.json ...     these files' plots, and on standard output what
                                              to paste into a page that has no section of them

A section of a page lies between `<!-- figures: NAME.json -->`, a file of benchmarks/results, and
`<!-- end of figures -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shapes import MODELS

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
SECTION = re.compile(
    r"(?<=^<!-- figures: )(?P<name>[\w.-]+\.json) -->\n(?P<body>.*?)<!-- end of figures -->",
    re.MULTILINE | re.DOTALL,
)
Row = dict[str, Any]
CPU_ROWS, GPU_ROWS = (1, 16, 512, 2048), (1, 16, 64, 256, 2048, 16384)  # M of the tables
LINES = ("#1f6fb2", "#d1495b", "#2a9d5c", "#e08e0b", "#8e44ad")
INK, GRID = "#22303c", "#e3e7eb"


def bench_of(name: str, result: Row) -> str:
    """The benchmark that wrote a file; older files say so in their names alone."""
    return result.get("bench") or name.removesuffix(".json").partition("_")[2]


def markdown(name: str, result: Row) -> str:
    """The body of a file's section: where it was measured, tables, the plot.

    Raises: KeyError for a benchmark that has no table.
    """
    bench = bench_of(name, result)
    plot = f"{name.removesuffix('.json')}.svg"
    parts = [_where(result), *TABLES[bench](result)]
    if result.get("skipped"):
        whys = sorted({case["why"] for case in result["skipped"]})
        parts.append(f"{len(result['skipped'])} rows were not measured: {'; '.join(whys)}.")
    return "\n\n".join([*parts, f"![{bench}, all rows]({plot})"]) + "\n"


def section(name: str, result: Row) -> str:
    """What a page holds: the markers and the body."""
    return f"<!-- figures: {name} -->\n{markdown(name, result)}<!-- end of figures -->\n"


def rendered(page: str, results: dict[str, Row]) -> str:
    """A page with the sections of these files anew, others as they are."""

    def body(match: re.Match) -> str:
        if match["name"] not in results:
            return match[0]
        return f"{match['name']} -->\n{markdown(match['name'], results[match['name']])}" + (
            "<!-- end of figures -->"
        )

    return SECTION.sub(body, page)


def names_in(page: str) -> list[str]:
    """The files whose figures a page shows."""
    return [match["name"] for match in SECTION.finditer(page)]


def _where(result: Row) -> str:
    """One line: the machine, the software, the peaks of the run."""
    about = result["environment"]
    on_gpu = result.get("device") == "cuda"
    facts = [about["gpus"][0] if on_gpu else f"{about['cpu']}, {about['threads']} threads"]
    if on_gpu:
        facts += [f"driver {about['driver']}", f"CUDA {about['cuda']}"]
    facts += [f"torch {about['versions']['torch']}", f"commit {about['commit']}"]
    peaks = (result.get("runs") or [result])[-1]
    for name, value in sorted(peaks.get("peaks", peaks).items()):
        if name.endswith("_bytes_per_second"):
            peak = name.removesuffix("_bytes_per_second").replace("_", " ")
            facts.append(f"{peak} {value / 1e9:.0f} GB/s")
        elif name.endswith("_operations_per_second"):
            peak = name.removesuffix("_operations_per_second")
            facts.append(f"{peak} {value / 1e12:.3g} TOP/s")
    return "Measured on: " + "; ".join(facts) + "."


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
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
    on_gpu = result.get("device") == "cuda"
    if on_gpu:
        cells = (("vs_bf16", ".2f"), ("gemm_vs_bf16", ".2f"), ("vs_fp8", ".2f"), ("%roof", ".0f"))
        words = "times as fast as bfloat16 / without the quantization / as FP8 / % of the roof"
    else:
        cells = (("vs_bf16", ".1f"), ("vs_fp32", ".1f"), ("vs_ggml", ".1f"))
        words = "times as fast as torch's linear in bfloat16 / in float32 / as ggml's product"
    rows = _cache(result["rows"])
    tables = []
    for model in dict.fromkeys(row.get("model", "8b") for row in rows):
        found = {(r["linear"], r["M"]): r for r in rows if r.get("model", "8b") == model}
        ms = _shown(list(found.values()), GPU_ROWS if on_gpu else CPU_ROWS)
        lines = []
        for linear, (k, n) in MODELS[model].linears.items():
            of = [found.get((linear, m)) for m in ms]
            if any(of):
                texts = (" / ".join(_number(row, *cell) for cell in cells) for row in of)
                lines.append([f"{linear} {n}x{k}", *texts])
        tables.append(
            f"{MODELS[model].title}, {words}:\n\n" + _table(_heads("linear, N x K", ms), lines)
        )
    absent = sorted({row["fp8"] for row in rows if row.get("fp8")})
    return [*tables, *(f"FP8: {why}" for why in absent)]


def rotate_tables(result: Row) -> list[str]:
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
    return ["Microseconds / % of the copy bandwidth:\n\n" + _table(head, lines)]


def layer_tables(result: Row) -> list[str]:
    rows = _cache(result["rows"])
    lines = []
    for model, phase, launch in dict.fromkeys((r["model"], r["phase"], r["launch"]) for r in rows):
        for row in rows:
            if (row["model"], row["phase"], row["launch"]) == (model, phase, launch):
                figures = (("time_us", ".0f"), ("bf16_us", ".0f"), ("vs_bf16", ".2f"))
                texts = [_number(row, *figure) for figure in figures]
                lines.append([MODELS[model].title, phase, launch, str(row["M"]), *texts])
    head = ["model", "phase", "launch", "M", "duqpp, us", "bfloat16, us", "times as fast"]
    return [_table(head, lines)]


def route_tables(result: Row) -> list[str]:
    small, large = result["small"], result["large"]
    lines = [
        [MODELS[t["model"]].title, t["linear"], t["cache"], str(t["from_M"] or "none measured")]
        for t in result["thresholds"]
    ]
    tables = [_table(["model", "linear", "L2", f"{large} is ahead of {small} from M ="], lines)]
    if found := result.get("crossover"):
        rows, fixed = (found["fitted"][name] for name in ("rows", "fixed"))
        tables.append(f"Nearest to these, cold: from M = {rows} + {fixed} * 2**24 / (N K) on.")
    return tables


TABLES: dict[str, Callable[[Row], list[str]]] = {
    "mxfp4_gemm": gemm_tables,
    "rotate_quantize": rotate_tables,
    "decoder_layer": layer_tables,
    "gemm_routes": route_tables,
}


# Of each benchmark: what tells its panels apart, the lines of a panel, the y axis, and the fields
# that are drawn, with their labels.
AXES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, dict[str, str]]] = {
    "mxfp4_gemm": (
        ("model", "linear"),
        ("cache",),
        "times as fast as bfloat16",
        {"vs_bf16": "linear", "gemm_vs_bf16": "product alone", "fp8_vs_bf16": "FP8 product"},
    ),
    "rotate_quantize": (
        ("K",),
        ("form", "rotation", "cache"),
        "% of copy bandwidth",
        {"%roof": ""},
    ),
    "decoder_layer": (
        ("model", "phase"),
        ("launch", "cache"),
        "times as fast as bfloat16",
        {"vs_bf16": ""},
    ),
    "gemm_routes": (("model", "linear"), ("cache",), "microseconds", {}),
}


def draw(name: str, result: Row) -> Any:
    """A matplotlib figure of every row of a file against M; what is warm is dotted."""
    from matplotlib.figure import Figure

    bench = bench_of(name, result)
    panel_keys, line_keys, y, fields = AXES[bench]
    if bench == "gemm_routes":
        fields = {f"{route}_us": route for route in result["rows"][0]["routes"].split()}
    panels: dict[tuple, dict[tuple, list[Row]]] = {}
    for row in result["rows"]:
        lines = panels.setdefault(tuple(row.get(key, "8b") for key in panel_keys), {})
        lines.setdefault(tuple(row.get(key, "cold") for key in line_keys), []).append(row)
    columns = min(4, len(panels))
    high = -(-len(panels) // columns)
    figure: Any = Figure(figsize=(3.4 * columns, 2.7 * high + 0.5), layout="constrained")
    for axes, (panel, lines) in zip(
        figure.subplots(high, columns, squeeze=False).flat, panels.items(), strict=False
    ):
        _draw_panel(axes, lines, fields)
        title = " ".join(str(part) for part in panel)
        axes.set_title(f"K = {title}" if panel_keys == ("K",) else title, fontsize=9, color=INK)
        axes.set_ylabel(y, fontsize=8, color=INK)
        if bench == "gemm_routes":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if y.startswith("times"):
            axes.axhline(1, color=INK, linewidth=0.8, gid="one")
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_panel(axes: Any, lines: dict[tuple, list[Row]], fields: dict[str, str]) -> None:
    styles: dict[tuple, str] = {}  # a colour for each line but for its cache
    for line, rows in lines.items():
        rows = sorted(rows, key=lambda row: row["M"])
        for field, label in fields.items():
            points = [(row["M"], row[field]) for row in rows if row.get(field) is not None]
            if not points:
                continue
            what = tuple(part for part in line if part not in ("cold", "warm"))
            colour = styles.setdefault((*what, field), LINES[len(styles) % len(LINES)])
            text = " ".join(
                part for part in (*what, label, "warm" if "warm" in line else "") if part
            )
            style = {"color": colour, "linewidth": 1.3, "markersize": 2.5, "label": text}
            axes.plot(*zip(*points, strict=True), ":" if "warm" in line else "o-", **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    measured = sorted({row["M"] for rows in lines.values() for row in rows})
    axes.set_xticks(measured[:: -(-len(measured) // 5)], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("M", fontsize=8, color=INK)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.tick_params(labelsize=7, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def plot(name: str, result: Row, folder: Path) -> Path:
    """Write the figure as NAME.svg, the same bytes for the same rows, text as text."""
    from matplotlib import rc_context

    file = folder / f"{name.removesuffix('.json')}.svg"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        draw(name, result).savefig(file, metadata={"Date": None, "Creator": None})
    return file


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    options.add_argument("--pages", nargs="*", type=Path, help="default: docs/*.md")
    options.add_argument("--plots", type=Path, default=DOCS, help="folder of the plots")
    chosen = options.parse_args(arguments)
    pages = sorted(DOCS.glob("*.md")) if chosen.pages is None else chosen.pages
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    shown = [name for text in texts.values() for name in names_in(text)]
    files = chosen.files or [RESULTS / name for name in shown]
    results = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    for page, text in texts.items():
        page.write_text(rendered(text, results), encoding="utf-8")
    for name, result in results.items():
        if name not in shown:
            print(section(name, result))
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError:
        print(
            "skipped: the plots; they need matplotlib: pip install 'duqpp[plot]'", file=sys.stderr
        )
        return 0
    for name, result in results.items():
        print(f"wrote {plot(name, result, chosen.plots)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
