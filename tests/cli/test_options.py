"""Methods written as options, shell completion, and what the library's messages become."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

import duqpp
from duqpp.cli.main import app, main
from duqpp.cli.options import in_options, parse_methods
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.methods import METHODS


def test_a_spec_is_what_quantize_takes():
    specs = [
        "rtn",
        " hadamard --smooth-alpha 0.6",
        "duquant++ --gptq --rotation per-block --hessian quantized --next-inputs float",
        "duquant --weight-rule even --scale-rule mse --skip q_proj --skip o_proj",
        "duqpp --no-gptq --samples 2",
    ]
    parsed = parse_methods(specs, samples=4, seq_len=32)
    common = {"samples": 4, "seq_len": 32}
    assert list(parsed.values()) == [
        QuantizeConfig(method="rtn", **common),
        QuantizeConfig(method="hadamard", smooth_alpha=0.6, **common),
        QuantizeConfig(
            gptq=True, rotation="per-block", hessian="quantized", next_inputs="float", **common
        ),
        QuantizeConfig(
            method="duquant",
            weight_rule="even",
            activation_rule="mse",
            skip=("q_proj", "o_proj"),
            **common,
        ),
        QuantizeConfig(method="duqpp", gptq=False, samples=2, seq_len=32),
    ]
    assert list(parsed) == [spec.strip() for spec in specs]


@pytest.mark.parametrize(
    ("option", "default"),
    [
        ("--method", "duquant++"),
        ("--samples", "16"),
        ("--scale-rule", "even"),
        ("--rotation", "(per-block for duqpp, else shared)"),
        ("--gptq", "(on for duqpp, else off)"),
        ("--smooth-alpha", "(0.6 for duquant and duquant++, else 0.0)"),
        ("--refine-samples", None),
    ],
)
def test_help_says_what_an_option_is_that_is_left_out(option, default, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["quantize", "--help"]) == 0
    lines = [line.lstrip("│ ") for line in capsys.readouterr().out.splitlines()]
    (line,) = [line for line in lines if line.startswith(f"{option} ")]
    assert f"[default: {default}]" in line if default else "default" not in line


def test_defaults_are_those_of_each_method():
    def only(spec: str) -> QuantizeConfig:
        return parse_methods([spec])[spec]

    assert (only("duqpp").drift, only("duqpp").block_order) == (0.3, "diagonal")
    refined = only("duqpp --refine blocks")
    assert (refined.gptq, refined.drift, refined.block_order) == (False, 0.0, "channels")
    refined = only("duqpp --refine blocks --gptq")
    assert (refined.gptq, refined.drift, refined.block_order) == (True, 0.0, "channels")
    refined = only("duqpp --refine blocks --gptq --drift 0.1 --block-order diagonal")
    assert (refined.drift, refined.block_order) == (0.1, "diagonal")
    assert only("duqpp --no-gptq").drift == 0.0


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([""], "--method '': a method comes first, then its options"),
        (["--gptq"], "--method --gptq: a method comes first"),
        (["best"], "--method best: Invalid value for '--method': .*'best' is not one of 'rtn'"),
        (["rtn", "rtn "], "--method names rtn twice"),
        (["rtn --fast"], "--method 'rtn --fast': No such option: --fast"),
        (["rtn --seed 3"], "No such option: --seed"),
        (["rtn --resume"], "No such option: --resume"),
        (["rtn duqpp"], r"unexpected extra argument\(s\) \(duqpp\)"),
        (["rtn --smooth-alpha"], "'--smooth-alpha' requires an argument"),
        (["rtn --smooth-alpha much"], "Invalid value for '--smooth-alpha'"),
        (["rtn --smooth-alpha 2"], r"`smooth_alpha` must lie in \[0, 1\], got 2.0"),
        (["rtn --weight-rule best"], "Invalid value for '--weight-rule': .*'best' is not one of"),
        (["rtn 'a"], "No closing quotation"),
    ],
)
def test_bad_specs(specs, message):
    with pytest.raises(InputError, match=message):
        parse_methods(specs)


@pytest.fixture
def completions(monkeypatch, capsys) -> Callable[[str], list[str]]:
    """What the shell offers at the end of a command line, by typer's protocol for bash."""

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("_DUQPP_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        with pytest.raises(SystemExit):
            main([])
        return capsys.readouterr().out.split()

    return complete


def test_the_shell_completes_commands_options_and_values(completions):
    assert {"quantize", "compare"} <= set(completions("duqpp "))
    assert {"--method", "--no-gptq"} <= set(completions("duqpp quantize --"))
    for command in ("quantize", "compare"):
        assert completions(f"duqpp {command} --method duq") == ["duquant", "duquant++", "duqpp"]
    assert completions("duqpp quantize --method ") == list(METHODS)


def test_the_completion_of_a_shell_can_be_shown(monkeypatch, capsys):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    with pytest.raises(SystemExit):
        main(["--show-completion", "bash"])
    assert "_DUQPP_COMPLETE=complete_bash" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "command", "expected"),
    [
        ("lower `seq_len`, or `windows`", "eval", "lower --seq-len, or --windows"),
        ("`calib_seq_len` and `samples`", "compare", "--calib-seq-len and --samples"),
        ("continue with `resume=True`", "quantize", "continue with --resume"),
        ("`gptq=False` and `gptq=True`", "quantize", "--no-gptq and --gptq"),
        ("`activation_rule` is, too", "quantize", "--scale-rule is, too"),
        ("quantize with `rotation=per-block`", "export", "quantize with --rotation per-block"),
        ("run `duqpp quantize` first; `other`", "eval", "run `duqpp quantize` first; `other`"),
    ],
)
def test_messages_of_the_library_speak_of_options_in_the_command(message, command, expected):
    assert in_options(message, get_command(app).commands[command]) == expected


def test_a_message_without_a_command_speaks_of_options_of_quantize():
    assert in_options("`seq_len` and `windows`", None) == "--seq-len and `windows`"


def test_the_library_speaks_of_no_option():
    """Nor does a message below the command line name one that only the command has."""
    package = Path(duqpp.__file__).parent
    named = [
        f"{path.relative_to(package)}:{node.lineno} {text.value}"
        for path in sorted(package.rglob("*.py"))
        if path.parts[len(package.parts)] != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        for text in ast.walk(node)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
        if re.search(r"(?<![\w-])--[a-z]", text.value) and "duqpp quantize" not in text.value
    ]
    assert not named
