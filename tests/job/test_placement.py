"""A job computes where its placement says, and nothing below it implies a device."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import duqpp
from duqpp.errors import InputError
from duqpp.methods import METHODS
from duqpp.models.stack import BlockInputs
from duqpp.placement import HOST
from duqpp.tools.inspection import inspect_model
from tests.second_device import second_device

PACKAGE = Path(duqpp.__file__).parent
# Folders whose modules take devices from the placement, or from the tensors that they are given.
PLACED = ("calibration", "checkpoint", "evaluation", "job", "methods", "models", "rotation")
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"randperm", "tensor", "zeros", "Generator"}
TOKENS = torch.randint(0, 300, (90, 48), generator=torch.Generator().manual_seed(1))


def quantized(
    model: Path,
    out: Path,
    device: torch.device,
    *,
    tokens: torch.Tensor = TOKENS,
    stops: int | None = None,
    resume: bool = False,
    **options,
) -> dict[str, bytes]:
    """Args: stops: how many blocks are finished when it is interrupted."""
    config = duqpp.QuantizeConfig(**({"max_steps": 4} | options))

    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", stops):
            raise KeyboardInterrupt

    call = {"calibration": tokens, "device": device, "resume": resume, "progress": progress}
    duqpp.quantize_model(str(model), out, config, **call)
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
        {"method": "duqpp", "refine": "blocks", "samples": 44},
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


@pytest.mark.parametrize(("free", "rests"), [(0.0, "cpu"), (1e15, "cpu:1")])
def test_activations_rest_on_the_device_if_it_has_room(free, rests, narrow, tmp_path, monkeypatch):
    """And the job goes on over blocks that were finished there, to the same bytes."""
    stored = []
    advance = BlockInputs.advance

    def watched(inputs: BlockInputs, *args: Any) -> None:
        advance(inputs, *args)
        stored.extend(str(hidden.device) for hidden in inputs.hidden)

    expected = quantized(narrow, tmp_path / "host", HOST, method="duqpp", tokens=TOKENS[:6])
    monkeypatch.setattr(BlockInputs, "advance", watched)
    monkeypatch.setattr("duqpp.placement.devices.free_memory", lambda device: free)
    with second_device() as device:
        options = {"method": "duqpp", "tokens": TOKENS[:6], "stops": 1}
        with pytest.raises(KeyboardInterrupt):
            quantized(narrow, tmp_path / "device", device, **options)
        del options["stops"]
        made = quantized(narrow, tmp_path / "device", device, resume=True, **options)
    assert made == expected
    assert set(stored) == {rests}


def test_a_float_model_is_inspected_on_the_device(narrow, tmp_path):
    text, found = tmp_path / "text.txt", []
    text.write_text("A block of thirty-two values shares one scale. " * 20)
    with second_device() as device:
        for place in (HOST, device):
            options = duqpp.QuantizeConfig(method="hadamard", samples=2, seq_len=48)
            found.append(inspect_model(str(narrow), options, calibration=str(text), device=place))
    assert found[0] == found[1]


def test_a_full_device_is_an_error_of_one_line_and_the_job_goes_on(narrow, tmp_path, monkeypatch):
    full = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"
    forward, calls = BlockInputs.advance, []

    def advance(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError(full)
        forward(*args)

    expected = quantized(narrow, tmp_path / "whole", HOST, tokens=TOKENS[:6])
    with monkeypatch.context() as patch:
        patch.setattr(BlockInputs, "advance", advance)
        with pytest.raises(InputError) as raised:
            quantized(narrow, tmp_path / "out", HOST, tokens=TOKENS[:6])
    assert str(raised.value).startswith(
        f"model.layers.1 does not fit into the memory of cpu: {full} (`device=cpu` needs no GPU; a "
    )
    assert "; continue with `resume=True`" in str(raised.value)
    resumed = quantized(narrow, tmp_path / "out", HOST, tokens=TOKENS[:6], resume=True)
    assert resumed == expected


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
