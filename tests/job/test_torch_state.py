"""What a caller has set in torch changes no byte of a checkpoint, and is set again afterwards."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import duqpp
from duqpp.errors import InputError
from duqpp.methods import METHODS
from duqpp.models import stack
from duqpp.torch_state import plain_torch
from tests import inputs

PACKAGE = Path(duqpp.__file__).parent
DTYPES = (torch.bfloat16, torch.float64)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def rough_products() -> Iterator[None]:
    products = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [product.fp32_precision for product in products]
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": default_device,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "rough products": rough_products,
    "deterministic algorithms": deterministic,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "another seed": lambda: torch.random.fork_rng([]),
}


@pytest.fixture(autouse=True)
def many_batches(monkeypatch):
    """Few tokens each, so that what is trained has batches."""
    monkeypatch.setattr(stack, "TOKENS_PER_BATCH", 96)


@pytest.fixture(scope="module")
def expected(make_tiny, tmp_path_factory):
    """``expected(**options)``: the shards of a quantization in torch as it is by default."""
    made: dict[str, dict[str, bytes]] = {}

    def make(**options) -> dict[str, bytes]:
        if repr(options) not in made:
            out = tmp_path_factory.mktemp("expected") / "out"
            made[repr(options)] = quantized(make_tiny("llama"), out, **options)
        return made[repr(options)]

    return make


def quantized(model: Path, out: Path, **options) -> dict[str, bytes]:
    tokens = torch.randint(
        0, 300, (12, 48), generator=torch.Generator("cpu").manual_seed(1), device="cpu"
    )
    config = duqpp.QuantizeConfig(**({"max_steps": 4} | options))
    duqpp.quantize_model(str(model), out, config, calibration=tokens)
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_changes_no_method(method, dtype, expected, tiny_llama, tmp_path):
    options = {"method": method, "gptq": True}
    wanted = expected(**options)
    with default_dtype(dtype):
        assert quantized(tiny_llama, tmp_path / "out", **options) == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"method": "duqpp", "samples": 6, "refine": "distill"},
        {"method": "duquant", "smooth_alpha": 0.5, "hessian": "quantized", "gptq": True},
    ],
    ids=lambda options: options["method"],
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_changes_a_checkpoint(setting, options, expected, tiny_llama, tmp_path):
    wanted = expected(**options)
    with SETTINGS[setting]():
        torch.manual_seed(12345)
        assert quantized(tiny_llama, tmp_path / "out", **options) == wanted


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_loaded_model_computes_the_same(setting, expected, tiny_llama, tmp_path):
    if setting in ("default device", "autocast", "rough products"):
        pytest.skip("what a model computes with is its user's choice")
    quantized(tiny_llama, tmp_path / "out", method="duqpp")
    tokens = inputs.gaussian(1, 32, 0).argsort()
    with torch.no_grad():
        wanted = duqpp.from_pretrained(tmp_path / "out")(tokens).logits
        with SETTINGS[setting]():
            made = duqpp.from_pretrained(tmp_path / "out")(tokens).logits
    assert made.dtype == wanted.dtype and torch.equal(made, wanted)


def state() -> tuple:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_there_again_afterwards(setting, tiny_llama, tmp_path):
    plain = state()
    with SETTINGS[setting]():
        before, numbers = state(), torch.random.get_rng_state()
        with plain_torch():
            assert state()[:5] == plain[:5]
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert state() == before
        with pytest.raises(InputError):
            duqpp.quantize_model(str(tmp_path / "nothing"), tmp_path / "out")
        duqpp.quantize_model(str(tiny_llama), tmp_path / "out", duqpp.QuantizeConfig(method="rtn"))
        assert state() == before
        assert torch.equal(torch.random.get_rng_state(), numbers)
    assert state() == plain


FACTORIES = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor"}
FACTORIES |= {"zeros", "normal", "scalar_tensor"}


def implied_dtypes(tree: ast.AST) -> list[str]:
    """Calls of torch's factories that take the default dtype."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [
        f"line {call.lineno}: torch.{call.func.attr} without a dtype"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and "dtype" not in {keyword.arg for keyword in call.keywords}
    ]


def test_no_module_takes_the_default_dtype():
    found = {
        str(file.relative_to(PACKAGE)): implied
        for file in sorted(PACKAGE.rglob("*.py"))
        if (implied := implied_dtypes(ast.parse(file.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize("code", ["torch.zeros(3)", "torch.tensor([x], device=d)"])
def test_an_implied_dtype_is_found(code):
    assert len(implied_dtypes(ast.parse(code))) == 1
    assert implied_dtypes(ast.parse("torch.zeros(3, dtype=x.dtype)")) == []
