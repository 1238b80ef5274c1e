"""The benchmarks run, and write what their readers parse: small, on the CPU."""

import contextlib
import json
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import bench_decoder_layer
import bench_gemm_routes
import pytest
import torch
from bench_decoder_layer import FixedCache, Layers
from bench_gemm_routes import fitted, thresholds
from figures import stage_tables
from roofline import Peaks
from shapes import MODELS
from timing import Timing

from duqpp.format import MXFP4Tensor, dequantize
from duqpp.ops import crossover
from duqpp.ops.large_gemm import large_gemm

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "bench_mxfp4_gemm": "--models tiny --rows 1 16 --linears o --fp8 --fp32 --cache cold warm",
    "bench_rotate_quantize": "--rows 1 16 --columns 64 --cache cold warm",
    "bench_decoder_layer": "--models tiny --decode 2 --prefill 32 --context 32 --cache cold warm",
    "bench_gemm_routes": "--models tiny --rows 1 4 --route one=r:one --route two=r:two",
    "bench_rotation_cost": "--rows 16 32 --columns 64",
    "bench_call": "--sizes 64",
}
COLUMNS = {
    "bench_mxfp4_gemm": "model linear cache M N K time_us time_q25_us time_q75_us gemm_us bf16_us "
    "vs_bf16 gemm_vs_bf16 vs_fp32 roof %roof gemm_roof gemm_%roof turns run",
    "bench_rotate_quantize": "form rotation cache M K time_us time_q25_us vs_copy %roof run",
    "bench_decoder_layer": "model phase launch cache M time_us time_q25_us bf16_us vs_bf16 run",
    "bench_gemm_routes": "model linear cache M N K one_us two_us auto_us best routes run",
    "bench_rotation_cost": "variant M K plain_us duquant_us duqpp_us half",
    "bench_call": "sources linears size dtype time_us time_q25_us torch_us times_torch",
}
ROWS = {
    "bench_mxfp4_gemm": 4,
    "bench_rotate_quantize": 20,
    "bench_decoder_layer": 4,
    "bench_gemm_routes": 8,
    "bench_rotation_cost": 4,
    "bench_call": 4,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Peaks that are not measured, and routes to compare."""
    peaks = Peaks({"read": 1e10}, {"int8": 1e12})
    monkeypatch.setattr("bench_mxfp4_gemm.measured_peaks", lambda *_: peaks)
    monkeypatch.setattr("timing.MOST_CALLS", 3)  # no more copies than that are made
    monkeypatch.setattr("bench_rotate_quantize.copy_bandwidth", lambda *_: 1e10)
    routes = SimpleNamespace(one=product, two=lambda a, b: product(a, b))
    monkeypatch.setitem(sys.modules, "r", routes)


def product(a: MXFP4Tensor, b: MXFP4Tensor) -> torch.Tensor:
    from duqpp.ops import mxfp4_gemm

    return mxfp4_gemm(a, b, out_dtype=torch.bfloat16)


def run(name: str, *options: str) -> None:
    words = ["--seconds", "0.001", "--threads", "1", *SMALL[name].split(), *options]
    import_module(name).main(words)


@pytest.mark.parametrize("name", SMALL)
def test_benchmark_prints_and_writes_one_json_object(name, tmp_path, capsys):
    file = tmp_path / "result.json"
    run(name, "--json", "--out", str(file))
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(file.read_text())
    assert result["environment"]["versions"]["torch"]
    assert result["environment"]["library"]["cpu_isa"]
    assert len(result["rows"]) == ROWS[name]
    for row in result["rows"]:
        assert set(COLUMNS[name].split()) <= set(row)
        assert all(v > 0 for k, v in row.items() if k.endswith("_us"))


@pytest.mark.slow
def test_stages_of_two_folders_of_sources(tiny_llama, tmp_path, capsys):
    file = tmp_path / "stages.json"
    words = ["--model", str(tiny_llama), "--methods", "hadamard --gptq --samples 2 --seq-len 32"]
    sources = [f"{name}={FOLDER.parent}" for name in ("before", "after")]
    options = ["--blocks", "1", "--rounds", "1", "--threads", "1", "--out", str(file)]
    import_module("bench_quantize").main([*words, *options, "--sources", *sources])
    assert "before" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert [row["sources"] for row in result["rows"]] == ["before", "after"]
    for row in result["rows"]:
        assert {"reading", "float pass", "factor", "gptq", "writing"} <= set(row["by_stage"])
        assert row["CPU s/block"] == pytest.approx(sum(row["by_stage"].values()))
        assert row["CPU s/block"] < row["CPU s"]
    (prose, made) = stage_tables(result)
    assert "mean of the first 1 blocks" in prose
    lines = [line.strip("| ").split(" | ") for line in made.splitlines()]
    assert lines[0] == ["stage", "before", "after"]
    shares = next(line for line in lines if line[0] == "share")
    before, after = (row["CPU s/block"] for row in result["rows"])
    assert shares[1:] == ["1.00", f"{after / before:.2f}"]


def test_formats_without_a_product_are_named(monkeypatch, capsys):
    peaks = Peaks({"read": 1e10}, absent={"fp4": "not available: too old"})
    monkeypatch.setattr("bench_mxfp4_gemm.measured_peaks", lambda *_: peaks)
    run("bench_mxfp4_gemm")
    head, *_, last = capsys.readouterr().out.splitlines()
    assert head == "4 rows to measure, 0 are there already"
    assert last == "not measured: fp4: not available: too old"


def test_benchmark_runs_as_a_script_and_prints_a_table(monkeypatch, capsys):
    """In this process, which has imported everything already."""
    words = ["--seconds", "0.001", "--threads", "1", *SMALL["bench_rotation_cost"].split()]
    monkeypatch.setattr(sys, "argv", ["bench_rotation_cost.py", *words])
    runpy.run_path(str(FOLDER / "bench_rotation_cost.py"), run_name="__main__")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == COLUMNS["bench_rotation_cost"].split()
    assert len(lines) == 4


def test_the_roof_is_that_of_the_peaks(capsys):
    run("bench_mxfp4_gemm", "--json")
    for row in json.loads(capsys.readouterr().out)["rows"]:
        m, n, k = row["M"], row["N"], row["K"]
        moved = 2 * m * (k + n) + n * k * 17 / 32
        least = {"read": moved / 1e10, "int8": 2 * m * n * k / 1e12}
        assert row["roof"] == max(least, key=least.get)
        assert row["%roof"] == pytest.approx(100 * max(least.values()) / row["time_us"] * 1e6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", [*SMALL][:-2])  # the last two have no such option
def test_benchmark_of_a_gpu_is_skipped_without_one(name, capsys):
    with pytest.raises(SystemExit) as ended:
        run(name, "--device", "cuda")
    assert ended.value.code == 0
    assert capsys.readouterr().out == "skipped: torch sees no CUDA device\n"


@pytest.mark.parametrize(
    "name", ["bench_mxfp4_gemm", "bench_rotate_quantize", "bench_decoder_layer"]
)
def test_a_gpu_without_a_kernel_is_skipped(name, monkeypatch, capsys):
    """The reference's time on a GPU is nobody's question."""
    monkeypatch.setattr("harness.why_no_gpu", lambda: None)
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    reference = SimpleNamespace(name="reference")
    monkeypatch.setattr(f"{name}.select", lambda op, device: reference)
    with pytest.raises(SystemExit) as ended:
        run(name, "--device", "cuda")
    assert ended.value.code == 0
    assert "no kernel of" in capsys.readouterr().out


def test_one_route_is_nothing_to_compare(capsys):
    with pytest.raises(SystemExit) as ended:
        bench_gemm_routes.main(["--models", "tiny", "--route", "one=r:one"])
    assert ended.value.code == 0
    assert "skipped: cpu has one way to multiply" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["one", "one=r", "=r:one", "one=r:three", "one=absent.module:f"])
def test_a_route_that_is_not_there(text, capsys):
    with pytest.raises(SystemExit) as ended:
        bench_gemm_routes.main(["--route", text])
    assert ended.value.code == 2
    assert "--route" in capsys.readouterr().err


def test_a_wrong_route_is_noticed(monkeypatch):
    monkeypatch.setattr(sys.modules["r"], "two", lambda a, b: product(a, b) * 1.1)
    with pytest.raises(AssertionError, match="two: relative error"):
        run("bench_gemm_routes")


def test_thresholds_are_where_the_large_route_stays_ahead():
    def rows(cache: str, small: list[float], large: list[float]) -> list[dict]:
        return [
            {"model": "8b", "linear": "o", "cache": cache, "M": 2**i, "s_us": s, "l_us": l_}
            for i, (s, l_) in enumerate(zip(small, large, strict=True))
        ]

    found = thresholds(
        [
            *rows("cold", [1, 5, 3, 9, 9], [4, 4, 4, 4, 4]),  # ahead at 2, not at 4
            *rows("warm", [1, 1, 1], [2, 2, 2]),
            *rows("none", [3, 3], [2, 2]),
        ],
        "s",
        "l",
    )
    assert [(t["cache"], t["from_M"]) for t in found] == [("cold", 8), ("warm", None), ("none", 1)]
    assert [t["at_M"] for t in found] == [pytest.approx(4 + 4 / 6), 8, 1]


def test_the_crossover_is_fitted_to_cold_inputs():
    """Of LLaMA-3's linears on a GPU where it is 140 + 56 * 2**24 / (N K)."""
    found = [
        {"model": m, "linear": linear, "cache": cache, "from_M": 0, "at_M": at}
        for m in ("8b", "70b")
        for linear, (k, n) in MODELS[m].linears.items()
        for cache, at in (("cold", 140 + 56 * 2**24 / (n * k)), ("warm", 2048.0))
    ]
    assert fitted(found) == {"rows": 140, "fixed": 56}
    assert fitted([{**case, "at_M": 300.0} for case in found]) == {"rows": 300, "fixed": 0}
    warm = [case for case in found if case["cache"] == "warm"]
    assert fitted(warm) == {"rows": 2048, "fixed": 0}
    # More for large weights than for small ones is no product of the model: no number is negative.
    wrong = [{**case, "at_M": 2 * 300 - case["at_M"]} for case in found if case not in warm]
    assert fitted(wrong)["fixed"] == 0 < fitted(wrong)["rows"]


@pytest.fixture
def hopper(monkeypatch, tmp_path) -> Path:
    """bench_gemm_routes on a GPU that is played: large is ahead from M = 5.6. Returns --out."""
    monkeypatch.setattr("harness.why_no_gpu", lambda: None)
    monkeypatch.setattr("harness.device_slug", lambda device: "h100")
    about = {"gpus": ["H100"], "versions": {"torch": "3"}, "commit": "abc"}
    monkeypatch.setattr("harness.environment", lambda commit: about)
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cpu = SimpleNamespace(name="cpu")
    monkeypatch.setattr("bench_gemm_routes.select", lambda op, device: cpu)
    ways = [("small", bench_gemm_routes.few_rows), ("large", product)]
    monkeypatch.setitem(bench_gemm_routes.ROUTES, "cpu", ways)
    monkeypatch.setattr("bench_gemm_routes.clock_for", lambda device, cold: None)

    def alternate(calls, clock, *, seconds):
        rows = next(iter(calls.values()))().shape[0]
        return {
            name: Timing({"small": 100.0 * rows}.get(name, 560.0), 0, 0, 1) for name in calls
        }, {}

    monkeypatch.setattr("bench_gemm_routes.alternate", alternate)
    return tmp_path / "h100_gemm_routes.json"


ON_HOPPER = ["--device", "cuda", "--models", "tiny", "--rows", "1", "2", "8", "--out"]


def test_the_crossover_that_a_gpu_shows_is_adopted(hopper, tmp_path, monkeypatch, capsys):
    bench_gemm_routes.main([*ON_HOPPER, str(hopper)])
    result = json.loads(hopper.read_text())
    assert {t["at_M"] for t in result["thresholds"]} == {5.6}
    assert result["crossover"] == {"capability": "9.0", "fitted": {"rows": 6, "fixed": 0}}
    assert "bench_gemm_routes.py --adopt" in capsys.readouterr().out

    before = json.loads(crossover.TABLE.read_text())
    copy = tmp_path / "crossover.json"
    copy.write_text(crossover.TABLE.read_text())
    monkeypatch.setattr(crossover, "TABLE", copy)
    bench_gemm_routes.main(["--adopt", str(hopper)])
    assert "9.0 is" in capsys.readouterr().out
    measured = {"rows": 6, "fixed": 0, "source": "a measurement: H100, torch 3, commit abc"}
    assert json.loads(copy.read_text()) == before | {"9.0": measured}


@pytest.mark.parametrize(
    "words", [["--route", "one=r:one", "--route", "two=r:two"], ["--budget=0"]]
)
def test_other_ways_and_some_of_the_rows_are_no_crossover(words, hopper):
    with contextlib.suppress(SystemExit):  # rows are left
        bench_gemm_routes.main([*ON_HOPPER, str(hopper), *words])
    assert json.loads(hopper.read_text())["bench"] == "gemm_routes"
    with pytest.raises(SystemExit, match="has no crossover"):
        bench_gemm_routes.main(["--adopt", str(hopper)])


def test_on_older_tensor_cores_the_ways_of_the_backend_are_compared():
    ((backend, ways),) = bench_gemm_routes.ROUTES.items()
    assert backend == "cuda-sm80"
    assert ways == [("small", bench_gemm_routes.few_rows), ("large", large_gemm)]


@pytest.fixture(scope="module")
def layers() -> Layers:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timing.MOST_CALLS", 2)
        return Layers(MODELS["tiny"], "cpu", seed=0)


def test_a_layer_over_the_fixed_cache_is_one_over_that_of_transformers(layers):
    from transformers import DynamicCache

    x, arguments = layers.inputs("decode", 3, 32)
    fixed = arguments["past_key_values"]
    growing = DynamicCache()
    growing.update(fixed._keys[:, :, :-1], fixed._values[:, :, :-1], 0)
    with torch.no_grad():
        expected = layers.floats[0](x, **arguments | {"past_key_values": growing}) - x
    assert growing.get_seq_length() == 32
    for _ in range(2):  # the second finds its own keys in the last place
        assert torch.equal(layers.calls(x, arguments, cold=False)["bf16"](), expected)


def test_the_fixed_cache_replaces_the_last_tokens():
    cache = FixedCache(1, 1, 4, torch.zeros(1))
    before = cache._keys.clone()
    new = torch.ones(1, 1, 2, before.shape[-1])
    keys, values = cache.update(new, 2 * new, 0, {})
    assert torch.equal(keys[:, :, :2], before[:, :, :2])
    assert (keys[:, :, 2:] == 1).all() and (values[:, :, 2:] == 2).all()


def test_layers_turn_when_cold_and_a_wrong_one_is_noticed(layers):
    assert len(layers.floats) == len(layers.quantized) == 2
    calls = layers.calls(*layers.inputs("prefill", 16, 32), cold=True)
    bench_decoder_layer.check(calls)
    assert torch.equal(calls["duqpp"](), calls["duqpp"]())  # another copy, the same weights
    for wrong in (lambda: calls["bf16"](), lambda: -calls["duqpp"](), lambda: calls["duqpp"]() * 0):
        with pytest.raises(AssertionError, match="relative error"):
            bench_decoder_layer.check({**calls, "duqpp": wrong})


def test_the_quantized_weights_are_folded(layers):
    linear, q_proj = layers.quantized[0].self_attn.q_proj, layers.floats[0].self_attn.q_proj
    error = (linear.float_weight() - q_proj.weight.float()).norm() / q_proj.weight.float().norm()
    assert 0.05 < error < 0.2
    unfolded = dequantize(linear.weight) - q_proj.weight.float()
    assert unfolded.norm() > q_proj.weight.float().norm()


@pytest.mark.parametrize("file", sorted((FOLDER / "results").glob("*.json")), ids=lambda f: f.stem)
def test_committed_results_name_their_machine(file):
    """Those that a benchmark wrote name the processor; those kept by hand say it in words, or that
    their figures were computed."""
    result = json.loads(file.read_text())
    environment = result["environment"]
    if not environment.get("computed"):
        assert any(environment.get(name) for name in ("cpu", "gpus", "machine"))
        assert environment["commit"]
    assert "/" not in environment.get("commit", "")
    assert result.get("rows") or result["tables"]
    assert result.get("complete", True), "measured in part"
    if result.get("device") == "cuda":
        assert environment["gpus"] and environment["driver"]
