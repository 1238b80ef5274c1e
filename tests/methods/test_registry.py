"""The registry of methods: what each says of itself, and that a new one is a class and a line."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

import duqpp
from duqpp.config import DESCRIPTIONS, QuantizeConfig, method_defaults
from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE
from duqpp.methods import METHODS
from duqpp.methods.independent import GroupInput, OneMatrix
from duqpp.nn import MXFP4Linear

TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))


class Reversed(OneMatrix):
    """A method that duqpp does not have: it reverses the channels of each block."""

    name = "reversed"
    summary = "channels of each block in reverse"

    def matrix(self, group: GroupInput) -> Tensor:
        return torch.eye(BLOCK_SIZE, dtype=torch.float64, device=group.device).flip(0)


@pytest.mark.parametrize("gptq", [False, True])
def test_a_new_method_is_a_class_and_a_line(gptq, tiny_llama, tmp_path, monkeypatch):
    """From its name on it quantizes, saves and loads as any other; rounding keeps its place."""
    monkeypatch.setitem(METHODS, Reversed.name, Reversed)
    plain, config = (QuantizeConfig(method=method, gptq=gptq) for method in ("rtn", "reversed"))
    duqpp.quantize_model(str(tiny_llama), tmp_path / "rtn", plain, calibration=TOKENS)
    duqpp.quantize_model(str(tiny_llama), tmp_path / "out", config, calibration=TOKENS)
    model, other = (duqpp.from_pretrained(tmp_path / name) for name in ("out", "rtn"))
    linears = [m for m in model.modules() if isinstance(m, MXFP4Linear)]
    assert len(linears) == 14
    for linear in linears:
        assert torch.equal(linear.rotation.double(), torch.eye(32).double().flip(0))
    if not gptq:  # whose order of columns the matrix changes
        with torch.no_grad():
            made, expected = (m(TOKENS).logits for m in (model, other))
        # The values are the same; the sum over a block's 32 products is exact in any order.
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_method_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match=r"^`method` must be one of rtn, .*duqpp, got 'rtm'$"):
        QuantizeConfig(method="rtm")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_of_itself_what_is_needed(method):
    kind = METHODS[method]
    assert kind.name == method and kind.summary
    config = QuantizeConfig(method=method)
    assert config.build_method().name == config.build_method().layout().method == method
    own = {field.name for field in fields(kind.Options)}
    assert own <= set(DESCRIPTIONS), "an option is described in config.py"
    for name, value in kind.Options.defaults({}).items():
        assert getattr(config, name) == value, "the configuration has the method's own defaults"
        assert method_defaults(name)[method] == value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "value"), [("drift", 0.25), ("refine", "blocks")])
def test_an_option_of_another_method_is_refused_and_its_off_value_taken(method, name, value):
    has_it = name in {field.name for field in fields(METHODS[method].Options)}
    off = DESCRIPTIONS[name].unused
    assert getattr(QuantizeConfig(method=method, **{name: off}), name) == off
    if has_it:
        assert getattr(QuantizeConfig(method=method, **{name: value}), name) == value
    else:
        with pytest.raises(InputError, match=rf"^`{name}` is for the method duqpp, not "):
            QuantizeConfig(method=method, **{name: value})


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_is_the_same_after_json(method):
    config = QuantizeConfig(method=method, seed=7, skip=("k_proj",))
    assert QuantizeConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("smooth_alpha", [0.0, 1.0], [-0.01, 1.01]),
        ("damping", [1e-9, 0.999], [0.0, 1.0]),
        ("max_steps", [1], [0]),
        ("samples", [1], [0]),
        ("seq_len", [2], [1]),
        ("refine_samples", [17], [0]),
        ("activation_rule", ["even", "mse"], ["evn", None, 1]),
        ("next_inputs", ["float", "quantized"], ["none"]),
    ],
)
def test_the_bounds_of_each_option(name, allowed, refused):
    """The last value that is allowed, and the first that is not."""
    for value in allowed:
        QuantizeConfig(**{name: value})
    for value in refused:
        with pytest.raises(InputError, match=f"^`{name}` must "):
            QuantizeConfig(**{name: value})
