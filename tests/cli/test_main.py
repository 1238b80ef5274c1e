"""The `duqpp` command: what each subcommand prints, and the one line of every error."""

import importlib
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import duqpp
from duqpp.calibration.tokens import builtin_text, tokenize
from duqpp.checkpoint import shard as shards
from duqpp.cli.main import main
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.evaluation.perplexity import CONVENTION, perplexity, perplexity_and_reference
from duqpp.ops import kernels
from duqpp.ops.crossover import crossover
from duqpp.ops.dispatch import BACKENDS
from duqpp.placement import devices
from tests.cuda.library import full_extension
from tests.forked import Forked, duqpp_command

SMALL = ["--samples", "2", "--seq-len", "64", "--max-steps", "16"]
NAMES = "auto, " + ", ".join(backend.name for backend in BACKENDS)
COMMANDS = ("quantize", "eval", "export", "generate", "doctor", "selfcheck", "inspect", "compare")


@pytest.fixture(autouse=True)
def fast_machine(monkeypatch):
    """What these tests do is short: no line of progress, however busy the machine is."""
    monkeypatch.setattr("duqpp.cli.progress.PATIENCE", 1000.0)


@pytest.fixture
def run(capsys):
    """Run a command line that succeeds: (stdout, stderr)."""

    def run_command(*arguments: object) -> tuple[str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return run_command


@pytest.fixture
def fail(capsys):
    """Run a command line that fails: its one line on stderr, less "error: "."""

    def run_command(*arguments: object) -> str:
        capsys.readouterr()  # of what fixtures have printed
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2, (code, out, err)
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err.removeprefix("error: ")

    return run_command


@pytest.fixture(scope="module")
def quantized(tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama, quantized by the command."""
    out = tmp_path_factory.mktemp("cli") / "out"
    assert main(["quantize", str(tiny_llama), str(out), *SMALL, "--json"]) == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_help_lists_the_commands(run):
    for arguments in ([], ["--help"]):
        out, err = run(*arguments)
        assert err == ""
        assert all(f" {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out, _ = run(command, "--help")
    assert f"Usage: duqpp {command}" in " ".join(out.split())
    assert "--json" in out


def test_version_of_the_module_and_exit_codes_of_the_process(tmp_path):
    """The one run that starts from nothing, and one that has all imported."""
    command = [sys.executable, "-m", "duqpp", "--version"]
    version = subprocess.run(command, capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, f"duqpp {duqpp.__version__}\n")
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        wrong = Forked(duqpp_command("eval", "nowhere.gguf"), [None, out.fileno(), err.fileno()])
        assert wrong.wait() == 2
    assert (tmp_path / "out").read_text() == ""
    assert (tmp_path / "err").read_text() == "error: no such file: nowhere.gguf\n"


@pytest.mark.parametrize("command", ["quantize", "inspect"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--method", "duquant", "--rotation", "per-block"], {"method": "duquant"}),
        (["--rotation", "per-block"], {"rotation": "per-block"}),
        (["--gptq", "--damping", "0.1"], {"gptq": True, "damping": 0.1}),
        (["--smooth-alpha", "0"], {"smooth_alpha": 0.0}),
        (["--scale-rule", "floor"], {"activation_rule": "floor"}),
        (["--weight-rule", "ceil"], {"weight_rule": "ceil"}),
        (["--max-steps", "7", "--hessian", "quantized"], {"max_steps": 7, "hessian": "quantized"}),
        (["--samples", "3", "--seq-len", "5"], {"samples": 3, "seq_len": 5}),
        (["--seed", "11"], {"seed": 11}),
        (["--skip", "q_proj", "--skip", "down_proj"], {"skip": ("q_proj", "down_proj")}),
    ],
)
def test_options_and_defaults_reach_the_config(command, arguments, expected, fail, monkeypatch):
    got = []

    def record(*positional, **named):
        got.extend(value for value in positional if isinstance(value, QuantizeConfig))
        raise InputError("recorded")

    # Which must not import the replacement, for good.
    importlib.import_module("duqpp.evaluation.compare")
    monkeypatch.setattr("duqpp.job.quantize.quantize_model", record)
    monkeypatch.setattr("duqpp.tools.inspection.inspect_model", record)
    places = ["model", "out"] if command == "quantize" else ["model"]
    assert fail(command, *places, *arguments) == "recorded\n"
    if "--method" in arguments:
        expected = {**expected, "rotation": "per-block"}
    assert got == [QuantizeConfig(**expected)]


def test_next_inputs_reach_the_config(tiny_llama, tmp_path, run):
    arguments = [tiny_llama, tmp_path / "out", *SMALL, "--next-inputs", "float", "--json"]
    out, _ = run("quantize", *arguments)
    assert json.loads(out)["config"]["next_inputs"] == "float"


def test_quantize_summary(tiny_llama, tmp_path, run):
    out, err = run("quantize", tiny_llama, tmp_path / "a", *SMALL, "--json")
    summary = json.loads(out)
    assert err == ""
    shards = (tmp_path / "a").glob("*.safetensors")
    assert summary["bytes"] == sum(file.stat().st_size for file in shards)
    assert summary["config"] == QuantizeConfig(samples=2, seq_len=64, max_steps=16).to_dict()
    report = json.loads((tmp_path / "a" / "quantization_report.json").read_text())["groups"]
    for name, mean in summary["mean_errors"].items():
        values = [group[name] for group in report]
        assert mean == pytest.approx(sum(values) / len(values))
    weights = 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 96)  # q k v o and gate up down, two layers
    rotations = 2 * 7 * 32 * 32 * 2
    assert summary["linear_bytes"] == weights * (4 + 8 / 32) / 8 + rotations
    assert summary["bits_per_weight"] == 8 * summary["linear_bytes"] / weights

    text, err = run("quantize", tiny_llama, tmp_path / "b", *SMALL)
    assert err == ""
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert f"{summary['bits_per_weight']:.2f} bits per weight" in text
    assert f"outputs {100 * summary['mean_errors']['output_error']:.2f} %" in text


def test_rtn_summary_without_activations(tiny_llama, tmp_path, run):
    out, _ = run("quantize", tiny_llama, tmp_path / "out", "--method", "rtn")
    assert "mean relative error: weights " in out and "activations" not in out


def test_quantize_reads_a_calibration_file(tiny_llama, tmp_path, run):
    text = tmp_path / "text.txt"
    text.write_text(builtin_text()[:3000], encoding="utf-8")
    run("quantize", tiny_llama, tmp_path / "out", *SMALL, "--calib", text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["calibration"] == "text.txt"


def test_a_calibration_text_that_is_not_used(tiny_llama, tmp_path, run, fail):
    """Said where it is there; where it is not, it is a mistake all the same."""
    text = tmp_path / "text.txt"
    text.write_text("some text", encoding="utf-8")
    _, err = run("quantize", tiny_llama, tmp_path / "out", "--method", "rtn", "--calib", text)
    assert err == "--calib is not used: the method reads no activations\n"
    missing = "cannot read text file none.txt"
    for command in (
        ["quantize", tiny_llama, tmp_path / "again", "--method", "rtn"],
        ["compare", tiny_llama, "--method", "rtn", "--method", "hadamard"],
    ):
        assert missing in fail(*command, "--calib", "none.txt")


def test_eval_equals_the_library(quantized, run):
    arguments = ["eval", quantized, "--seq-len", "96", "--windows", "3", "--device", "cpu"]
    out, err = run(*arguments, "--json")
    result = json.loads(out)
    assert err == ""
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    tokens = tokenize(tokenizer, builtin_text("evaluation"))
    expected = perplexity(duqpp.from_pretrained(quantized), tokens, seq_len=96, windows=3)
    assert result["perplexity"] == expected.perplexity
    assert result["window_nll"] == expected.window_nll
    assert result["windows"] == 3
    text, _ = run(*arguments)
    assert f"perplexity {expected.perplexity:.4f} over 3 windows of 96 tokens" in text
    assert f"convention: {CONVENTION}\n" in text


def test_eval_of_a_text_file_and_a_float_model(tiny_llama, tmp_path, run):
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. " * 40, encoding="utf-8")
    arguments = ["--text", text, "--seq-len", "64", "--device", "cpu"]
    out, _ = run("eval", tiny_llama, *arguments, "--json")
    result = json.loads(out)
    tokens = tokenize(AutoTokenizer.from_pretrained(tiny_llama), text.read_text())
    assert result["windows"] == tokens.numel() // 64
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    assert result["perplexity"] == perplexity(model, tokens, seq_len=64).perplexity


def test_eval_against_a_reference(tiny_llama, quantized, run):
    arguments = ["eval", quantized, "--seq-len", "96", "--windows", "3", "--device", "cpu"]
    out, err = run(*arguments, "--reference", tiny_llama, "--json")
    result, alone = json.loads(out), json.loads(run(*arguments, "--json")[0])
    assert err == ""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokens = tokenize(AutoTokenizer.from_pretrained(tiny_llama), builtin_text("evaluation"))
    options = {"seq_len": 96, "windows": 3}
    _, reference = perplexity_and_reference(model, tokens, **options)
    expected = perplexity(
        duqpp.from_pretrained(quantized), tokens, **options, reference=reference
    ).divergence
    assert result["divergence"] == asdict(expected)
    assert (result["reference"], alone["reference"]) == (str(tiny_llama), None)
    assert alone["divergence"] is None
    for name in ("perplexity", "window_nll"):
        assert result[name] == alone[name], "a reference changes no perplexity"
    text, _ = run(*arguments, "--reference", tiny_llama)
    assert f"{expected.kl:.4f} nats per token" in text
    assert f"agreement {100 * expected.agreement:.2f} %" in text
    itself, _ = run("eval", tiny_llama, *arguments[2:], "--reference", tiny_llama)
    assert "0.0000 nats per token, top-1 agreement 100.00 %" in itself


def test_generate_streams_what_json_holds(quantized, run):
    arguments = ["generate", quantized, "The capital of France", "--max-new-tokens", "12"]
    streamed, speed = run(*arguments)
    out, _ = run(*arguments, "--json")
    result = json.loads(out)
    assert streamed == result["text"] + "\n"
    assert result["tokens"] == 12
    assert speed.startswith("12 tokens in ") and speed.endswith("tokens/s\n")
    assert f" s on {result['device']}, " in speed


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as far as choosing one of them goes."""
    monkeypatch.setattr(devices, "gpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("DUQPP_BACKEND", raising=False)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1"])
@pytest.mark.parametrize("command", [["generate", "MODEL", "x"], ["eval", "MODEL"]])
def test_the_device_reaches_the_model(command, name, gpus, fail, monkeypatch):
    got = []

    def record(model, **options):
        got.append(options["device"])
        raise InputError("recorded")

    monkeypatch.setattr("duqpp.integrations.transformers.load_model", record)
    monkeypatch.setattr("duqpp.evaluation.models.open_model", record)
    given = [] if name == "auto" else ["--device", name]
    assert fail(*command, *given) == "recorded\n"
    assert got == [torch.device("cuda" if name == "auto" else name)]


@pytest.mark.parametrize("command", [["generate", "MODEL", "x"], ["eval", "MODEL"]])
def test_a_device_map_takes_the_place_of_the_device(command, fail, monkeypatch):
    def record(model, **options):
        del options["progress"]
        raise InputError(str(options))

    monkeypatch.setattr("duqpp.integrations.transformers.load_model", record)
    monkeypatch.setattr("duqpp.evaluation.models.open_model", record)
    assert fail(*command, "--device-map", "auto") == "{'device_map': 'auto'}\n"
    message = "--device and --device-map exclude each other: give one of them\n"
    assert fail(*command, "--device-map", "auto", "--device", "cpu") == message


def test_the_reference_runs_on_the_device_of_the_model(gpus, fail, monkeypatch):
    def record(model, **options):
        raise InputError(f"{model} on {options['device']}")

    monkeypatch.setattr("duqpp.evaluation.models.open_model", record)
    assert fail("eval", "MODEL", "--reference", "FLOAT") == "FLOAT on cuda\n"


@pytest.mark.parametrize(
    "command", [["quantize", "MODEL", "OUT"], ["inspect", "MODEL"], ["compare", "MODEL"]]
)
def test_the_device_reaches_the_job(command, tiny_llama, gpus, fail, monkeypatch):
    def record(*_, device, **options):
        raise InputError(f"on {device}")

    monkeypatch.setattr("duqpp.job.quantize.quantize_model", record)
    monkeypatch.setattr("duqpp.tools.inspection.inspect_model", record)
    monkeypatch.setattr("duqpp.evaluation.compare.compare", record)
    command = [tiny_llama if word == "MODEL" else word for word in command]
    # `quantize` chooses at once: with ranks it depends on which this is.
    assert fail(*command) == ("on cuda\n" if command[0] == "quantize" else "on auto\n")
    assert fail(*command, "--device", "cuda:1") == "on cuda:1\n"


@pytest.mark.parametrize("command", ["quantize", "inspect", "eval", "generate", "compare"])
def test_a_device_that_is_not_here(command, tiny_llama, tmp_path, gpus, fail):
    more = {"quantize": [tmp_path / "out"], "generate": ["x"]}.get(command, [])
    message = fail(command, tiny_llama, *more, "--device", "gpu")
    assert message == "--device must be auto, cpu, cuda or cuda:N, got 'gpu'\n"
    message = fail(command, tiny_llama, *more, "--device", "cuda:2")
    assert message == (
        "--device cuda:2: the last CUDA device here is cuda:1; --device cpu runs anywhere\n"
    )
    assert not list(tmp_path.iterdir())


def test_doctor(run, monkeypatch):
    monkeypatch.delenv("DUQPP_BACKEND", raising=False)
    facts = json.loads(run("doctor", "--json")[0])
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["DUQPP_BACKEND"] is None
    cells = {(entry["op"], entry["device"]): entry for entry in facts["ops"]}
    for op in kernels.OPS:
        entry = cells[op, "cpu"]
        assert {entry["selected"], *entry["others"]} == {backend.name for backend in BACKENDS}
        assert entry["selected"] not in entry["others"]
    text, _ = run("doctor")
    assert f"duqpp {duqpp.__version__}" in text and "DUQPP_BACKEND: not set" in text


def test_doctor_says_why_the_backend_asked_for_cannot_run(run, monkeypatch):
    monkeypatch.setenv("DUQPP_BACKEND", "cuda-sm100")
    assert json.loads(run("doctor", "--json")[0])["error"] is None, "there is such a backend"


@pytest.mark.parametrize("name", ["quantum", ""])
def test_doctor_fails_where_the_variable_names_no_backend(name, capsys, monkeypatch):
    monkeypatch.setenv("DUQPP_BACKEND", name)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert f"rotate_quantize on cpu: none: backend '{name}'" in out
    assert err == f"error: DUQPP_BACKEND='{name}' names no backend; there are {NAMES}\n"
    assert main(["doctor", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["DUQPP_BACKEND"] == name
    assert all(entry["selected"] is None for entry in facts["ops"])
    assert "no such backend" in facts["ops"][0]["error"]


def test_doctor_names_the_kernels_of_a_shape(run):
    full_extension()
    shapes = ("--shape", "1,4096,4096", "--shape", "4096,28672,4096")
    ops = json.loads(run("doctor", *shapes, "--arch", "100", "--json")[0])["ops"]
    assert [entry["op"] for entry in ops] == list(kernels.OPS)
    assert {entry["device"] for entry in ops} == {"sm_100 (148 SMs)"}
    few, many = ops[-1]["kernels"]
    assert (few["M"], few["N"], few["K"]) == (1, 4096, 4096)
    assert few["name"].startswith("sm100_swapped") and "K in 4 parts" in few["name"]
    assert many["name"].startswith("sm100_256x256, GEMM tile 256x256")
    text, _ = run("doctor", "--shape", "64,4096,4096", "--arch", "120", "--sm-count", "170")
    assert "sm120_128x128" in text
    text, _ = run("doctor", "--shape", "32,4096,4096", "--arch", "90")
    assert "sm80_32x32 of N x M, 128 CTAs of 8 warps, K in 8 segments, 1 round" in text
    assert "1 rounds" not in text
    least = crossover((9, 0)).at(4096, 4096)
    assert f"more than 16 rows of x, 32 at a time; from {least} on, torch multiplies" in text
    text, _ = run("doctor", "--shape", "64,4100,4096", "--arch", "100")
    assert "N must be a multiple of 8" in text


def test_doctor_of_a_build_without_cuda(run, monkeypatch):
    """Every op of a GPU falls to the reference, and the backend with kernels for it says why."""
    library = importlib.import_module("duqpp._C")
    without = {**library.build_info(), "cuda_architectures": ""}
    monkeypatch.setattr(library, "build_info", lambda: without)
    text, _ = run("doctor", "--shape", "64,4096,4096", "--arch", "100")
    for op in kernels.OPS:
        assert f"{op} on sm_100 (148 SMs): reference" in text
    assert "not cuda-sm100 for any op on sm_100 (148 SMs): this build has no kernels for" in text


@pytest.mark.parametrize("shape", ["16", "16,0,32", "a,b,c", "1,2,3,4"])
def test_doctor_refuses_a_shape_that_is_none(shape, fail):
    message = fail("doctor", "--shape", shape)
    assert f"--shape must be M,N,K, as in 16,4096,4096, got '{shape}'" in message


def test_inspect_table_and_json(quantized, run):
    found = json.loads(run("inspect", quantized, "--json")[0])
    assert len(found["groups"]) == 8
    table, _ = run("inspect", quantized)
    line = next(line for line in table.splitlines() if line.split()[:2] == ["1", "down"])
    group = next(g for g in found["groups"] if g["name"] == "model.layers.1.down")
    assert line.split()[2:4] == [
        f"{max(group[name]):.4g}" for name in ("block_amax_before", "block_amax")
    ]
    errors = ("activation_error_before", "activation_error", "weight_error", "output_error")
    assert line.split()[4::2] == [f"{100 * group[name]:.2f}" for name in errors]


def test_inspect_a_float_model_with_a_plot(tiny_llama, tmp_path, run):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    picture = tmp_path / "plot.png"
    arguments = [tiny_llama, "--layers", "1", *SMALL, "--plot", picture, "--json"]
    out, err = run("inspect", *arguments)
    assert len(json.loads(out)["groups"]) == 4
    assert err == f"plot: {picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [picture]


def compare_arguments(model: Path, *methods: str) -> list[str]:
    calibration = ["--samples", "2", "--calib-seq-len", "64", "--max-steps", "16"]
    evaluation = ["--seq-len", "64", "--windows", "2"]
    specs = [word for method in methods for word in ("--method", method)]
    return ["compare", str(model), *specs, *calibration, *evaluation]


def test_compare_table_and_json_agree(tiny_llama, run):
    arguments = compare_arguments(tiny_llama, "rtn", "duquant++ --smooth-alpha 0.5", "random")
    out, table = run(*arguments, "--seeds", "0,1", "--json")
    found = json.loads(out)
    header, *lines = table.splitlines()
    assert header.startswith("method ")
    for row, line in zip(found["rows"], lines, strict=True):
        assert line.startswith(row["method"] + " ")
        cells = ["", *line.removeprefix(row["method"]).replace("+-", "").split()]
        spread = row["spread"] is not None
        assert cells[1] == f"{row['perplexity']:.2f}"
        assert cells[2 + spread] == f"{row['ratio']:.3f}"
        assert cells[3 + 2 * spread] == f"{row['kl']:.3f}"
        assert cells[4 + 3 * spread] == f"{100 * row['agreement']:.1f}"
        assert cells[-1] == f"{row['bits_per_weight']:.2f}"
        assert spread == (row["method"] not in ("float", "rtn"))
    assert found["seeds"] == [0, 1]
    assert found["calibration_seq_len"] == 64 and found["seq_len"] == 64


def test_compare_is_interrupted_and_resumed(tiny_llama, tmp_path, run, monkeypatch, capsys):
    work = tmp_path / "kept work"
    arguments = [*compare_arguments(tiny_llama, "rtn", "hadamard"), "--work", str(work)]
    expected = json.loads(run(*compare_arguments(tiny_llama, "rtn", "hadamard"), "--json")[0])
    module = importlib.import_module("duqpp.evaluation.compare")

    def stop_at_the_second(source, out, config, **options):
        if config.method == "hadamard":
            raise KeyboardInterrupt
        return quantize_model(source, out, config, **options)

    quantize_model = module.quantize_model
    monkeypatch.setattr(module, "quantize_model", stop_at_the_second)
    assert main(arguments) == 130
    again = shlex.join(["duqpp", *arguments, "--resume"])
    assert f"go on at the last whole block with {again}" in capsys.readouterr().err
    monkeypatch.setattr(module, "quantize_model", quantize_model)
    found = json.loads(run(*arguments, "--resume", "--json")[0])
    for made, wanted in zip(found["rows"], expected["rows"], strict=True):
        for name in ("method", "perplexity", "kl", "agreement", "weight_bytes"):
            assert made[name] == wanted[name]


def test_compare_on_several_texts(tiny_llama, tmp_path, run):
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. " * 40, encoding="utf-8")
    arguments = [*compare_arguments(tiny_llama, "rtn"), "--text", "builtin", "--text", str(text)]
    out, table = run(*arguments, "--json")
    found = json.loads(out)
    assert (found["text"], found["texts"]) == ("builtin", ["builtin", str(text)])
    lines = [line.split() for line in table.splitlines()]
    assert [line[0] for line in lines] == ["method", "float", "on", "rtn", "on"]
    for row, first, second in zip(found["rows"], lines[1::2], lines[2::2], strict=True):
        ours, other = row["texts"]
        assert first[1] == f"{ours['perplexity']:.2f}" == f"{row['perplexity']:.2f}"
        assert second[1:3] == ["text.txt", f"{other['perplexity']:.2f}"]
        assert second[4] == f"{other['kl']:.3f}"
    printed, _ = run(*arguments)
    assert "evaluated on 2 windows of 64 tokens from builtin\n" in printed
    assert f"evaluated on 2 windows of 64 tokens from {text}\n" in printed


def test_compare_prints_the_table_and_the_convention(tiny_llama, run):
    out, err = run(*compare_arguments(tiny_llama, "hadamard"))
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == [
        "method",
        "float",
        "hadamard",
        "evaluated",
        "convention:",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "No such command 'quantise'"),
        (["--loud"], "No such option: --loud"),
        (["quantize", "MODEL"], "Missing argument 'OUT'"),
        (["quantize", "MODEL", "OUT", "--method", "best"], "'best' is not one of 'rtn'"),
        (["quantize", "MODEL", "OUT", "--samples", "many"], "Invalid value for '--samples'"),
        (["quantize", "MODEL", "OUT", "--smooth-alpha", "2"], "--smooth-alpha must lie in [0, 1]"),
        (["quantize", "MODEL", "OUT", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["quantize", "nowhere.gguf", "OUT"], "no such file: nowhere.gguf"),
        (["quantize", "MODEL", "FULL"], "exists and is not an empty folder"),
        (["quantize", "MODEL", "OUT", "--calib", "none.txt"], "cannot read text file none.txt"),
        (["quantize", "MODEL", "OUT", "--samples", "9999"], "lower --samples or --seq-len"),
        (["quantize", "MODEL", "OUT", "--skip", "z_proj"], "--skip: z_proj names no linear"),
        (["quantize", "QUANTIZED", "OUT"], "is quantized already (duqpp)"),
        (["eval", "MODEL", "--text", "none.txt"], "cannot read text file none.txt"),
        (["eval", "MODEL", "--seq-len", "9999999"], "lower --seq-len"),
        (["eval", "MODEL"], "windows of 2048 tokens exceed the model's 512 positions"),
        (["compare", "MODEL", "--method", "rtn"], "exceed the model's 512 positions"),
        (["eval", "MODEL", "--seq-len", "32", "--windows", "0"], "--windows must be at least 1"),
        (["eval", "QUANTIZED", "--reference", "WIDER"], "vocabulary has 330 tokens, the model's"),
        (["eval", "QUANTIZED", "--reference", "nowhere.gguf"], "no such file: nowhere.gguf"),
        (["eval", "MODEL", "--limit", "3"], "--tasks-dir and --limit are for --tasks"),
        (["eval", "MODEL", "--tasks-dir", "OUT"], "--tasks-dir and --limit are for --tasks"),
        (["eval", "MODEL", "--tasks", "a,,b"], "--tasks must be names with commas between"),
        (["eval", "MODEL", "--tasks", "a", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["generate", "MODEL", "x", "--temperature", "-1"], "--temperature must be 0"),
        (
            ["generate", "MODEL", "x", "--max-new-tokens", "0"],
            "--max-new-tokens must be at least 1",
        ),
        (["generate", "MODEL", "x", "--max-new-tokens", "512"], "exceeds the model's 512"),
        (["generate", "MODEL", "x", "--chat"], "has no chat template"),
        (["generate", "MODEL", ""], "the prompt is empty"),
        (["inspect", "MODEL", "--layers", "0"], "--layers must be at least 1, got 0"),
        (["inspect", "MODEL", "--plot", "plot.doc"], "must end in .png, .pdf or .svg"),
        (["inspect", "MODEL", "--plot", "none/plot.png"], "none is no folder"),
        (["compare", "MODEL", "--method", "best"], "--method best: Invalid value for '--method'"),
        (["compare", "MODEL", "--method", "rtn", "--method", "rtn"], "--method names rtn twice"),
        (["compare", "MODEL", "--method", "rtn --drift 0.3"], "for the method duqpp, not rtn"),
        (
            ["compare", "MODEL", "--samples", "9999", "--seq-len", "64"],
            "lower --samples or --seq-len",
        ),
        (["compare", "MODEL", "--seeds", "0,x"], "--seeds must be whole numbers"),
        (["compare", "MODEL", "--text", "builtin", "--text", "builtin"], "text is named twice"),
        (["compare", "MODEL", "--resume"], "--resume needs --work"),
        (["compare", "MODEL", "--seeds", "0,0"], "--seeds names a seed twice"),
    ],
)
def test_errors(arguments, message, tiny_llama, make_tiny, quantized, tmp_path, fail, monkeypatch):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    monkeypatch.chdir(tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    places = {"MODEL": tiny_llama, "QUANTIZED": quantized, "OUT": tmp_path / "out", "FULL": full}
    if "WIDER" in arguments:
        places["WIDER"] = make_tiny("llama", vocab_size=330)
        arguments = [*arguments, "--windows", "1", "--seq-len", "64"]
    assert message in fail(*(places.get(argument, argument) for argument in arguments))
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "kept.txt"]


def test_a_damaged_checkpoint_is_one_line(quantized, tmp_path, fail):
    damaged = tmp_path / "damaged"
    shutil.copytree(quantized, damaged)
    shard = sorted(damaged.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for command in (["eval", damaged, "--seq-len", "16"], ["generate", damaged, "x"]):
        assert "its checksum differs" in fail(*command)


@pytest.fixture
def interrupted_at_second_block(monkeypatch):
    """Ctrl-C as the second decoder block's shard is about to be written."""
    write, calls = shards.write_shard, []

    def interrupt(path: Path, tensors: dict) -> None:
        calls.append(path)
        if len(calls) == 3:  # the first is what is outside of the blocks
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr("duqpp.job.blocks.write_shard", interrupt)


def test_an_interrupted_job_goes_on_as_the_line_says(
    tiny_llama, quantized, tmp_path, capsys, interrupted_at_second_block, run
):
    out = tmp_path / "folder with spaces" / "out"
    out.parent.mkdir()
    assert main(["quantize", str(tiny_llama), str(out), *SMALL, "--resume"]) == 130
    stdout, line = capsys.readouterr()
    assert stdout == "" and line.startswith("interrupted: ") and line.count("\n") == 1
    assert not out.exists()
    command = shlex.split(line[line.index("duqpp quantize") :])
    assert command.count("--resume") == 1
    text, _ = run(*command[1:])
    assert "1 blocks resumed" in text
    assert files(out) == files(quantized)


def test_an_unfinished_job_is_not_overwritten(
    tiny_llama, tmp_path, capsys, interrupted_at_second_block, fail
):
    out = tmp_path / "out"
    assert main(["quantize", str(tiny_llama), str(out), *SMALL]) == 130
    capsys.readouterr()
    assert "continue it with --resume" in fail("quantize", tiny_llama, out, *SMALL)
    other = fail("quantize", tiny_llama, out, *SMALL, "--seed", "1", "--resume")
    assert "unfinished job of another" in other


def test_interrupted_with_nothing_to_resume(tiny_llama, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("duqpp.job.quantize.open_source", interrupt)
    monkeypatch.setattr("duqpp.evaluation.models.open_model", interrupt)
    for command in (["quantize", str(tiny_llama), str(tmp_path / "out")], ["eval", "model"]):
        assert main(command) == 130
        assert capsys.readouterr() == ("", "interrupted: nothing is left to resume\n")
    assert not list(tmp_path.iterdir())
