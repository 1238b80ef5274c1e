"""QuantizeConfig: the last value that each limit allows, and the first that it refuses."""

import math

import pytest

from duqpp.config import QuantizeConfig
from duqpp.errors import InputError

ABOVE_ONE, BELOW_ONE = math.nextafter(1.0, 2.0), math.nextafter(1.0, 0.0)
ABOVE_ZERO, BELOW_ZERO = math.nextafter(0.0, 1.0), math.nextafter(0.0, -1.0)
DUQPP = {"method": "duqpp"}


@pytest.mark.parametrize(
    ("name", "allowed", "refused", "others"),
    [
        ("smooth_alpha", 0.0, BELOW_ZERO, {}),
        ("smooth_alpha", 1.0, ABOVE_ONE, {}),
        ("drift", 0.0, BELOW_ZERO, DUQPP),
        ("drift", 1.0, ABOVE_ONE, DUQPP),
        ("damping", ABOVE_ZERO, 0.0, {}),
        ("damping", BELOW_ONE, 1.0, {}),
        ("samples", 1, 0, {}),
        ("seq_len", 2, 1, {}),
        ("max_steps", 1, 0, {}),
        ("refine_samples", 17, 16, DUQPP | {"refine": "blocks", "samples": 16}),
    ],
)
def test_limits(name, allowed, refused, others):
    assert getattr(QuantizeConfig(**others, **{name: allowed}), name) == allowed
    with pytest.raises(InputError, match=rf"{name}\b.*, got {refused}"):
        QuantizeConfig(**others, **{name: refused})


@pytest.mark.parametrize("name", ["smooth_alpha", "drift", "damping"])
def test_what_is_no_number_is_refused(name):
    with pytest.raises(InputError, match=f"{name}.*, got nan"):
        QuantizeConfig(method="duqpp", **{name: math.nan})


@pytest.mark.parametrize("refine", ["blocks", "distill"])
def test_what_refinement_starts_from(refine):
    config = QuantizeConfig(method="duqpp", refine=refine)
    assert (config.gptq, config.drift, config.block_order) == (False, 0.0, "channels")
    plain = QuantizeConfig(method="duqpp")
    assert (plain.gptq, plain.drift, plain.block_order) == (True, 0.3, "diagonal")


def test_without_gptq_nothing_makes_up_for_drift():
    assert QuantizeConfig(method="duqpp", gptq=False).drift == 0.0
    asked = QuantizeConfig(method="duqpp", refine="blocks", gptq=True, drift=0.1)
    assert (asked.drift, asked.block_order) == (0.1, "channels")
