"""A job computes where its placement says, and nothing below it implies a device."""

import ast
from pathlib import Path

import pytest
import torch

import duqpp
from duqpp.methods import METHODS
from duqpp.placement import HOST
from tests.second_device import second_device

PACKAGE = Path(duqpp.__file__).parent
# Folders whose modules take devices from the placement, or from the tensors that they are given.
PLACED = ("calibration", "checkpoint", "evaluation", "job", "methods", "models", "rotation")
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"randperm", "tensor", "zeros", "Generator"}
TOKENS = torch.randint(0, 300, (90, 48), generator=torch.Generator().manual_seed(1))


def quantized(model: Path, out: Path, device: torch.device, **options) -> dict[str, bytes]:
    config = duqpp.QuantizeConfig(**({"max_steps": 4} | options))
    duqpp.quantize_model(str(model), out, config, calibration=TOKENS, device=device)
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


@pytest.fixture
def narrow(make_tiny) -> Path:
    """A simulated device takes a hundred times as long for each operation: few columns."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return make_tiny("llama", hidden_size=32, intermediate_size=64, **heads)


@pytest.mark.parametrize(
    "options",
    [
        *({"method": method} for method in METHODS),
        {"method": "duquant++", "gptq": True, "rotation": "per-block"},
        {"method": "random", "gptq": True, "hessian": "quantized", "next_inputs": "float"},
        {"method": "duqpp", "refine": "distill", "samples": 44},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_blocks_are_quantized_where_the_device_says(options, narrow, tmp_path):
    """On a device that any machine simulates, to the bytes that the CPU gives."""
    expected = quantized(narrow, tmp_path / "host", HOST, **options)
    with second_device() as device:
        made = quantized(narrow, tmp_path / "device", device, **options)
    assert made == expected


def implied_devices(tree: ast.AST) -> list[str]:
    """Devices that a module names, or leaves to torch's default."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in ("cpu", "cuda"):
            found.append(f"line {node.lineno}: {node.value!r}")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, node.func.value
        if name in ("cpu", "cuda"):
            found.append(f"line {node.lineno}: .{name}()")
        of_torch = isinstance(owner, ast.Name) and owner.id == "torch"
        if of_torch and name in FACTORIES and "device" not in {k.arg for k in node.keywords}:
            found.append(f"line {node.lineno}: torch.{name} without a device")
    return found


@pytest.mark.parametrize("folder", PLACED)
def test_no_module_below_the_job_implies_a_device(folder):
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    found = {
        str(file.relative_to(PACKAGE)): implied
        for file in files
        if (implied := implied_devices(ast.parse(file.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "code",
    ["torch.zeros(3)", "x.cpu()", 'x.to("cuda")', "torch.Generator()", "torch.arange(len(x))"],
)
def test_an_implied_device_is_found(code):
    assert len(implied_devices(ast.parse(code))) == 1
    assert implied_devices(ast.parse("torch.zeros(3, device=x.device)")) == []
