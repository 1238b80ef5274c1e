"""Tables and plots follow the JSON, and the pages hold what the JSON says."""

import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import product

import pytest
import render
from shapes import MODELS

ENVIRONMENT = {
    "gpus": ["NVIDIA H100, sm_90, 79 GiB"],
    "cpu": "a CPU",
    "threads": 2,
    "driver": "580.159.04",
    "cuda": "13.0",
    "versions": {"torch": "2.11.0"},
    "commit": "abc1234",
}
PEAKS = {"copy_bytes_per_second": 3e12, "bf16_operations_per_second": 8e14}


def result(bench: str, rows: list[dict], **others) -> dict:
    return {
        "bench": bench,
        "device": "cuda",
        "rows": rows,
        "skipped": [],
        "runs": [{"peaks": PEAKS}],
        "environment": ENVIRONMENT,
        **others,
    }


def gemm() -> dict:
    rows = []
    for model, linear, cache, m in product(
        ("8b", "70b"), MODELS["8b"].linears, ("cold", "warm"), (1, 16, 32, 16384)
    ):
        row = {"model": model, "linear": linear, "cache": cache, "M": m, "vs_bf16": 3 - m / 16384}
        row |= {
            "gemm_vs_bf16": 3.5,
            "fp8_vs_bf16": 1.7,
            "vs_fp8": 1.25 if cache == "cold" else 9.0,
            "%roof": 80.4,
        }
        rows.append(row)
    return result("mxfp4_gemm", rows)


def rotate() -> dict:
    return result(
        "rotate_quantize",
        [
            {"form": f, "rotation": r, "cache": c, "M": m, "K": k, "time_us": 7.25, "%roof": 91.2}
            for (f, r), c, k, m in product(
                (("plain", "none"), ("silu_mul", "shared")),
                ("cold", "warm"),
                (4096, 14336),
                (1, 2, 256),
            )
        ],
    )


def layer() -> dict:
    return result(
        "decoder_layer",
        [
            {"model": "70b", "phase": p, "launch": launch, "cache": c, "M": m, "time_us": 50.4}
            | {"bf16_us": 100.6, "vs_bf16": 1.996}
            for (p, launch), c, m in product(
                (("decode", "eager"), ("decode", "graph"), ("prefill", "eager")),
                ("cold", "warm"),
                (1, 64),
            )
        ],
    )


def routes() -> dict:
    rows = [
        {"model": "8b", "linear": "o", "cache": "cold", "M": m, "routes": "small large auto"}
        | {"small_us": m, "large_us": 20, "auto_us": min(m, 20)}
        for m in (1, 16, 64)
    ]
    found = [{"model": "8b", "linear": "o", "cache": "cold", "from_M": 64}]
    found += [{"model": "8b", "linear": "o", "cache": "warm", "from_M": None}]
    return result("gemm_routes", rows, small="small", large="large", thresholds=found)


MADE = {"gemm": gemm, "rotate": rotate, "layer": layer, "routes": routes}


def lines_of(made: dict) -> list[str]:
    return render.markdown(f"h100_{made['bench']}.json", made).splitlines()


def test_the_gemm_table_shows_cold_rows_of_some_m():
    lines = lines_of(gemm())
    assert " ".join(lines[:2]) == (
        "Measured on: NVIDIA H100, sm_90, 79 GiB; driver 580.159.04; CUDA 13.0; torch 2.11.0; "
        "commit abc1234; bf16 800 TOP/s; copy 3000 GB/s."
    )
    assert lines.count("| linear, N x K | M = 1 | 16 | 16384 |") == 2  # 32 is in the plot alone
    one = "| qkv 6144x4096 | 3.00 / 3.50 / 1.25 / 80 | 3.00 / 3.50 / 1.25 / 80 |"
    assert one + " 2.00 / 3.50 / 1.25 / 80 |" in lines
    assert any(line.startswith("LLaMA-3 70B, times as fast as bfloat16") for line in lines)
    assert lines[-1] == "![mxfp4_gemm, all rows](h100_mxfp4_gemm.svg)"


def test_what_was_not_measured_is_said():
    made = gemm()
    made["skipped"] = [{"M": 1, "why": "out of memory: x"}, {"M": 2, "why": "out of memory: x"}]
    for row in made["rows"]:
        del row["vs_fp8"]
        row["fp8"] = "not available: too old"
    text = "\n".join(lines_of(made))
    assert "2 rows were not measured: out of memory: x." in text
    assert "FP8: not available: too old" in text
    assert "3.00 / 3.50 / - / 80" in text


def test_the_other_tables():
    assert "| silu_mul | shared | 14336 | 7.2 / 91 | 7.2 / 91 |" in lines_of(rotate())
    lines = lines_of(layer())
    assert "| LLaMA-3 70B | decode | graph | 64 | 50 | 101 | 2.00 |" in lines
    assert sum(line.startswith("| LLaMA") for line in lines) == 6  # the cold ones
    lines = lines_of(routes())
    assert "| model | linear | L2 | large is ahead of small from M = |" in lines
    assert "| LLaMA-3 8B | o | cold | 64 |" in lines
    assert "| LLaMA-3 8B | o | warm | none measured |" in lines
    fitted = {"capability": "9.0", "fitted": {"rows": 140, "fixed": 56}}
    assert not any("Nearest to these" in line for line in lines)
    line = "Nearest to these, cold: from M = 140 + 56 * 2**24 / (N K) on."
    assert line in lines_of(routes() | {"crossover": fitted})


@pytest.mark.parametrize("kind", MADE)
def test_the_plot_draws_every_row(kind, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    made = MADE[kind]()
    name = f"h100_{made['bench']}.json"
    figure = render.draw(name, made)
    drawn = [x for axes in figure.axes for x in axes.get_lines() if x.get_gid() != "one"]
    points = sum(len(line.get_xdata()) for line in drawn)
    fields = {"gemm": 3, "rotate": 1, "layer": 1, "routes": 3}[kind]
    assert points == fields * len(made["rows"])
    assert all(axes.get_xlabel() == "M" and axes.get_title() for axes in figure.axes)
    styles = {line.get_linestyle() for line in drawn}
    assert styles == ({"-"} if kind == "routes" else {"-", ":"})  # warm is dotted
    (text,) = figure.legends
    labels = [entry.get_text() for entry in text.get_texts()]
    assert len(labels) == len(set(labels)) and all(labels)

    file = render.plot(name, made, tmp_path)
    first = file.read_bytes()
    assert len(first) < 150_000 and ElementTree.fromstring(first).tag.endswith("svg")
    if kind == "routes":  # one panel: the others take seconds
        assert render.plot(name, made, tmp_path).read_bytes() == first
    assert [f.name for f in tmp_path.iterdir()] == [f"h100_{made['bench']}.svg"]


def test_sections_are_written_anew_and_the_rest_stays(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    for name, made in (("h100_decoder_layer", layer()), ("h100_gemm_routes", routes())):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    page = tmp_path / "speed.md"
    old = "# Speed\n\n<!-- figures: {} -->\nold\n<!-- end of figures -->\n\nThe end.\n"
    other = old.format("other.json")
    page.write_text(old.format("h100_decoder_layer.json") + other)
    files = sorted(map(str, tmp_path.glob("*.json")))
    assert render.main([*files, "--pages", str(page), "--plots", str(tmp_path)]) == 0
    text = page.read_text()
    assert text.endswith(other)
    assert text.startswith("# Speed\n\n" + render.section("h100_decoder_layer.json", layer()))
    out, err = capsys.readouterr()
    assert out == render.section("h100_gemm_routes.json", routes()) + "\n"  # on no page: to paste
    assert err.count("wrote ") == 2
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    page.write_text(old.format("h100_decoder_layer.json"))
    render.main(["--pages", str(page), "--plots", str(tmp_path)])
    assert render.section("h100_decoder_layer.json", layer()) in page.read_text()


def test_tables_without_matplotlib(tmp_path, monkeypatch, capsys):
    (tmp_path / "h100_gemm_routes.json").write_text(json.dumps(routes()))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    file = str(tmp_path / "h100_gemm_routes.json")
    assert render.main([file, "--pages", "--plots", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "| LLaMA-3 8B | o | cold | 64 |" in out and err.startswith("skipped: the plots")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in render.PAGES])
def test_the_pages_hold_what_was_measured(page):
    text = page.read_text(encoding="utf-8")
    names = render.names_in(text)
    assert len(names) == text.count("<!-- figures: "), "a section without an end"
    results = {file: stored(file) for file in map(render.file_of, names)}
    assert render.rendered(text, results) == text, "run benchmarks/render.py"
    for plot in re.findall(r"!\[[^\]]*, all rows\]\(([^)]*)\)", text):
        assert (page.parent / plot).exists()


def test_the_pages_that_are_read_have_figures():
    """The test above would pass on nothing."""
    shown = {name for page in render.PAGES for name in render.names_in(page.read_text("utf-8"))}
    assert {"which_method.json", "cpu_mxfp4_gemm.json", "accuracy_smollm2.json#seeds"} <= shown


def figures_outside(text: str) -> list[str]:
    """The rows of tables with a cell that begins with a number, outside of sections and code."""
    outside = re.sub(r"^```.*?^```$", "", render.SECTION.sub("", text), flags=re.M | re.S)
    return re.findall(r"^\|(?:[^\n]*\|)? *[~<>-]? ?\d[^\n]*$", outside, re.MULTILINE)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in render.PAGES])
def test_no_table_of_figures_is_typed_by_hand(page):
    assert figures_outside(page.read_text(encoding="utf-8")) == []


def test_which_tables_are_typed_by_hand():
    table = "| method | ratio |\n|---|---|\n| `rtn` | {} |\n"
    inside = f"<!-- figures: a.json -->\n{table.format(2.6)}<!-- end of figures -->\n"
    code = f"```text\n{table.format(2.6)}```\n"
    assert figures_outside(inside + code + table.format("`2`, or sm_90")) == []
    for cell in ("2.6", "~2 min", "< 3 GB"):
        assert figures_outside(inside + table.format(cell)) == [f"| `rtn` | {cell} |"]
    assert figures_outside("| 1024 | x |\n") == ["| 1024 | x |"]


@pytest.mark.parametrize("file", [path.name for path in sorted(render.RESULTS.glob("*.json"))])
def test_each_result_says_where_it_is_from(file):
    result = stored(file)
    for name in render.views_of(file, result):
        first = render.markdown(name, result).splitlines()[0]
        assert first.startswith(("Measured on: ", "Computed, not measured: "))


def stored(file: str) -> dict:
    return json.loads((render.RESULTS / file).read_text(encoding="utf-8"))


def test_a_table_of_a_record():
    """Empty cells, the file's note and the table's, lines of at most 100 columns."""
    made = {
        "bench": "record",
        "note": "A note `that stays` whole. " * 9,
        "environment": {"machine": "a laptop", "commit": "not recorded", "date": "2026-11-28"},
        "tables": {"t": {"columns": ["a", "b"], "rows": [["`x`", None]], "note": "Its own."}},
    }
    assert render.views_of("r.json", made) == ["r.json#t"]
    lines = render.markdown("r.json#t", made).splitlines()
    assert lines[0] == "Measured on: a laptop; commit not recorded; 2026-11-28."
    assert lines[2:5] == ["| a | b |", "| --- | --- |", "| `x` |  |"]
    assert lines[-1] == "Its own." and max(map(len, lines)) <= 100
    assert "\n".join(lines).count("`that stays`") == 9


def accuracy(method: str, seed: int, ratio: float, **others) -> dict:
    text = {"ratio": ratio, "kl": ratio / 10, "agreement": 0.75}
    return {"method": method, "seed": seed, "texts": [text, text | {"ratio": 9.0}], **others}


def test_tables_of_accuracy():
    rows = [accuracy("duqpp", 1, 1.3), accuracy("duqpp", 0, 1.1), accuracy("other", 0, 5.0)]
    rows.append(accuracy("duqpp", 0, 7.0, calibration="builtin"))
    line = {"method": "duqpp"}
    tables = {
        "each": {"columns": ["each", "ratio", "agreement"], "rows": [line]},
        "range": {
            "columns": ["ratio", "seeds"],
            "range": True,
            "rows": [line, {"method": "rtn"}, {"method": "random"}],
        },
        "seeds": {
            "columns": ["seeds", "kl", "other"],
            "rows": [{"method": "duqpp", "label": "named", "seeds": [1]}],
        },
        "builtin": {"columns": ["ratio"], "rows": [line | {"calibration": "builtin"}]},
    }
    kept = [{"method": "rtn", "ratio": [2.6], "seeds": 0}]
    kept.append({"method": "random", "ratio": [2.6, 2.4, 2.8], "seeds": 3})
    made = {
        "bench": "accuracy",
        "environment": {"machine": "a laptop", "commit": "abc"},
        "rows": rows,
        "summaries": {"note": "Rows were not kept.", "rows": kept},
        "tables": tables,
    }

    def body(view: str) -> list[str]:
        return render.markdown(f"a.json#{view}", made).splitlines()[2:]

    assert body("each") == [
        "| method | seed | ratio | top-1, % |",
        "| --- | --- | --- | --- |",
        "| `duqpp` | 0 | 1.100 | 75.0 |",
        "| `duqpp` | 1 | 1.300 | 75.0 |",
        "| `duqpp` | mean | 1.200 | 75.0 |",
    ]
    assert body("range") == [
        "| method | ratio | seeds |",
        "| --- | --- | --- |",
        "| `duqpp` | 1.200 (1.100 to 1.300) | 2 |",
        "| `rtn` | 2.600 | needs none |",
        "| `random` | 2.600 (2.400 to 2.800) | 3 |",
        "",
        "Rows were not kept.",
    ]
    assert body("seeds")[2:] == ["| named | 1 | 0.130 | 9.000 | 0.130 | 75.0 |"]
    assert body("builtin")[2:] == ["| `duqpp` | 7.000 |"]
