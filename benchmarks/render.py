"""Tables and plots from the JSON that benchmarks write, so that no page has figures typed by hand.

python benchmarks/render.py                   every section of the pages, anew, and their plots
python benchmarks/render.py FILE.json ...     these files' plots, and on standard output what
                                              to paste into a page that has no section of them

A section of a page lies between `<!-- figures: NAME.json -->`, a file of benchmarks/results, or
`<!-- figures: NAME.json#TABLE -->`, a table of it, and `<!-- end of figures -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from figures import RESULTS, Row, bench_of, paragraphs, views_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
SECTION = re.compile(
    r"(?<=^<!-- figures: )(?P<name>[\w.-]+\.json(#[\w-]+)?) -->\n(?P<body>.*?)"
    r"<!-- end of figures -->",
    re.MULTILINE | re.DOTALL,
)
LINES = ("#1f6fb2", "#d1495b", "#2a9d5c", "#e08e0b", "#8e44ad")
INK, GRID = "#22303c", "#e3e7eb"


def markdown(name: str, result: Row) -> str:
    """The body of a section: where it was measured, tables, and the plot of a benchmark's rows.

    Raises: KeyError for a benchmark, or a table, that there is not.
    """
    parts = paragraphs(name, result)
    if (bench := bench_of(name, result)) in AXES:
        parts.append(f"![{bench}, all rows]({name.removesuffix('.json')}.svg)")
    return "\n\n".join(parts) + "\n"


def section(name: str, result: Row) -> str:
    """What a page holds: the markers and the body."""
    return f"<!-- figures: {name} -->\n{markdown(name, result)}<!-- end of figures -->\n"


def rendered(page: str, results: dict[str, Row]) -> str:
    """A page with the sections of these files anew, others as they are."""

    def body(match: re.Match) -> str:
        name = match["name"]
        if (file := file_of(name)) not in results:
            return match[0]
        return f"{name} -->\n{markdown(name, results[file])}<!-- end of figures -->"

    return SECTION.sub(body, page)


def names_in(page: str) -> list[str]:
    """The files, or tables of files, that a page shows."""
    return [match["name"] for match in SECTION.finditer(page)]


def file_of(name: str) -> str:
    """FILE.json of FILE.json#TABLE."""
    return name.partition("#")[0]


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
    options.add_argument("--pages", nargs="*", type=Path, help="default: *.md and docs/*.md")
    options.add_argument("--plots", type=Path, default=DOCS, help="folder of the plots")
    chosen = options.parse_args(arguments)
    pages = PAGES if chosen.pages is None else chosen.pages
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    shown = {file_of(name): None for text in texts.values() for name in names_in(text)}
    files = chosen.files or [RESULTS / name for name in shown]
    results = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    for page, text in texts.items():
        page.write_text(rendered(text, results), encoding="utf-8")
    for name, result in results.items():
        if name not in shown:
            print("\n".join(section(view, result) for view in views_of(name, result)))
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError:
        print("skipped: the plots; they need matplotlib: pip install matplotlib", file=sys.stderr)
        return 0
    for name, result in results.items():
        if bench_of(name, result) in AXES:
            print(f"wrote {plot(name, result, chosen.plots)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
