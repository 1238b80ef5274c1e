"""`duqpp quantize --plan`: what it prints, and what it refuses."""

import json
import shutil

import pytest

from duqpp.cli.main import main
from duqpp.cli.plan import bytes_of, duration
from duqpp.errors import InputError


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A folder with config.json alone."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny_llama / "config.json", folder)
    return folder


def test_a_plan_needs_a_configuration_alone_and_writes_nothing(folder, capsys):
    before = sorted(folder.parent.rglob("*"))
    words = ["quantize", str(folder), "/no/such/place/out", "--plan", "--samples", "2"]
    words += ["--seq-len", "64", "--method", "duqpp", "--on", "H200"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in ("2 blocks", "on H200", "down: GPTQ", "down: report", "estimates"):
        assert part in text
    assert max(map(len, text.splitlines()[:3])) < 200
    assert main([*words, "--json", "--resume"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["machine"]["memory"] == 141e9 and values["rests"] == "device"
    assert values["total_seconds"] == sum(values["seconds"].values())
    assert sorted(folder.parent.rglob("*")) == before


def test_of_ranks_that_torchrun_starts_the_first_prints_the_plan(folder, capsys, monkeypatch):
    words = [
        "quantize",
        str(folder),
        "out",
        "--plan",
        "--on",
        "H100",
        "--method",
        "duqpp",
        "--json",
    ]
    monkeypatch.setenv("WORLD_SIZE", "4")
    printed = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        assert main(words) == 0
        printed.append(capsys.readouterr().out)
    assert json.loads(printed[0])["ranks"] == 4 and printed[1:] == ["", "", ""]


def test_the_cpu_is_what_is_planned_for_where_there_is_no_gpu(folder, capsys):
    words = ["quantize", str(folder), "out", "--plan", "--method", "rtn", "--json"]
    assert main([*words, "--on", "cpu"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["machine"]["source"] == "measured just now" and values["device"] == 0
    assert main([*words, "--device-memory", "80GB", "--flops", "5e14"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["machine"]["half"] == values["machine"]["double"] == 5e14


@pytest.mark.parametrize(
    "text, size",
    [("80GB", 80e9), ("80 GiB", 80 * 2**30), ("8e10", 8e10), ("1.5tb", 1.5e12), ("640k", 640e3)],
)
def test_sizes(text, size):
    assert bytes_of(text, "x") == size


@pytest.mark.parametrize("text", ["0", "abc", "", "-1GB", "1e99", "80 GB or so", "nan", "1QB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="`x` must be a size"):
        bytes_of(text, "x")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--ranks", "99"], "--ranks is 99, and there are 8 batches"),
        (["--device-memory", "abc"], "--device-memory must be a size"),
        (["--disk-bandwidth", "0"], "--disk-bandwidth must be a size"),
        (["--flops", "nan"], "--flops must be a number"),
        (["--on", "TPU"], "--on must be one of cpu, A100"),
    ],
)
def test_bad_options_are_one_line(folder, capsys, words, message):
    assert main(["quantize", str(folder), "out", "--plan", "--on", "H100", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_models_without_a_plan_are_one_line(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    for model in (folder, tmp_path / "empty", "/no/such/model"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(["quantize", str(model), "out", "--plan", "--on", "H100"]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1


def test_what_is_planned_for_is_no_option_of_a_job(folder, capsys):
    assert main(["quantize", str(folder), "out", "--ranks", "2"]) == 2
    assert capsys.readouterr().err == "error: --ranks is for --plan\n"


def test_durations():
    assert [duration(s) for s in (1, 119, 121, 7201, 1e6)] == [
        "1.0 s", "119.0 s", "2.0 min", "2.0 h", "11.6 days",
    ]  # fmt: skip
