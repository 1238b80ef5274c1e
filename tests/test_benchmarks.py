"""The benchmarks run, and print what their readers parse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "bench_mxfp4_gemm": ["--linears", "o", "--rows", "1", "16", "--no-ggml"],
    "bench_rotate_quantize": ["--rows", "1", "16", "--columns", "64"],
    "bench_rotation_cost": ["--rows", "16", "--columns", "64"],
}
COLUMNS = {
    "bench_mxfp4_gemm": {"M", "N", "K", "time_us", "gemm_us", "vs_bf16", "roof", "%roof"},
    "bench_rotate_quantize": {"form", "rotation", "M", "K", "time_us", "vs_copy", "%roof"},
    "bench_rotation_cost": {"variant", "M", "K", "plain_us", "duquant_us", "duqpp_us", "half"},
}


def run(name: str, *options: str) -> str:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--seconds", "0.01", *SMALL[name]]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SMALL)
def test_benchmark_prints_one_json_object(name, tmp_path):
    file = tmp_path / "result.json"
    result = json.loads(run(name, "--json", "--out", str(file)))
    assert result == json.loads(file.read_text())
    assert result["environment"]["versions"]["torch"]
    assert result["environment"]["library"]["cpu_isa"]
    assert len(result["rows"]) >= 2
    for row in result["rows"]:
        assert COLUMNS[name] <= set(row)


def test_benchmark_prints_a_table():
    lines = run("bench_rotation_cost").splitlines()
    assert lines[0].split() == list(
        ("variant", "M", "K", "plain_us", "duquant_us", "duqpp_us", "half")
    )
    assert len(lines) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_benchmark_of_a_gpu_is_skipped_without_one():
    out = run("bench_rotate_quantize", "--device", "cuda")
    assert out == "skipped: torch sees no CUDA device\n"


@pytest.mark.parametrize("file", sorted((FOLDER / "results").glob("*.json")), ids=lambda f: f.stem)
def test_committed_results_name_their_machine(file):
    result = json.loads(file.read_text())
    assert result["environment"]["cpu"]
    assert result["environment"]["commit"]
    assert "/" not in result["environment"]["commit"]
    assert result["rows"]
