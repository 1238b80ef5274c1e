"""E2M1 codec: whole domains against the definition in `oracle`."""

import contextlib
import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from duqpp.format import e2m1
from duqpp.format.e2m1 import (
    decode_e2m1,
    decode_packed_e2m1,
    encode_e2m1,
    pack_e2m1,
    unpack_e2m1,
)
from tests import inputs, oracle

ALL_CODES = torch.arange(16, dtype=torch.uint8)
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def test_decode_every_code():
    values = decode_e2m1(ALL_CODES)
    assert values.dtype == torch.float32
    expected = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    oracle.assert_same(values, torch.tensor(expected + [-v for v in expected]), "decode_e2m1")
    oracle.assert_same(values, oracle.E2M1_VALUES, "decode_e2m1 against the bit fields")


def test_encode_inverts_decode():
    oracle.assert_same(encode_e2m1(decode_e2m1(ALL_CODES)), ALL_CODES, "encode(decode(code))")


def test_encode_every_bfloat16():
    x = inputs.all_bfloat16().float()
    x = x[~x.isnan()]
    codes = encode_e2m1(x)
    assert codes.dtype == torch.uint8
    oracle.assert_same(codes, oracle.encode_e2m1(x), "encode_e2m1 of every bfloat16 but NaN")


def test_encode_of_nan_is_a_code():
    x = inputs.all_bfloat16().float()
    assert (encode_e2m1(x[x.isnan()]) <= 15).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_encode_around_every_tie_and_grid_value(sign):
    points = torch.tensor(inputs.E2M1_TIES + inputs.E2M1_MAGNITUDES[1:]) * sign
    x = inputs.neighbours(points, 2000)
    oracle.assert_same(encode_e2m1(x), oracle.encode_e2m1(x), "encode_e2m1 near ties")


def test_ties_go_to_the_even_code():
    codes = encode_e2m1(torch.tensor(inputs.E2M1_TIES))
    oracle.assert_same(codes, [0, 2, 2, 4, 4, 6, 6], "codes of the seven midpoints")


def test_encode_across_all_of_float32():
    # An odd step through the bit patterns visits every exponent with many different mantissas.
    bits = torch.arange(-(2**31), 2**31, 16381)
    x = bits.int().view(torch.float32)
    x = x[~x.isnan()]
    oracle.assert_same(encode_e2m1(x), oracle.encode_e2m1(x), "encode_e2m1 across float32")


def test_encode_subnormals():
    x = inputs.subnormals(64, 32, seed=0)
    expected = torch.signbit(x) * 8  # zero that keeps its sign
    oracle.assert_same(encode_e2m1(x), expected, "encode_e2m1 of subnormals")


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0),
        (-0.0, 8),
        (0.2, 0),
        (-0.2, 8),
        (2.0**-149, 0),
        (-(2.0**-149), 8),
        (6.0, 7),
        (6.5, 7),
        (1e38, 7),
        (-1e38, 15),
        (float("inf"), 7),
        (float("-inf"), 15),
    ],
)
def test_encode_of_special_values(value, code):
    assert encode_e2m1(torch.tensor(value)).item() == code


def test_even_column_is_the_low_nibble():
    codes = torch.tensor([[0x1, 0x2, 0xF, 0x0]], dtype=torch.uint8)
    oracle.assert_same(pack_e2m1(codes), [[0x21, 0x0F]], "pack_e2m1")


def test_unpack_every_byte():
    codes = unpack_e2m1(ALL_BYTES)
    oracle.assert_same(codes, oracle.unpack(ALL_BYTES), "unpack_e2m1 of every byte")
    oracle.assert_same(pack_e2m1(codes), ALL_BYTES, "pack_e2m1(unpack_e2m1(byte))")


@pytest.mark.parametrize("shape", [(0, 32), (1, 2), (5, 96), (2, 3, 64)])
def test_pack_matches_the_definition_for_any_shape(shape):
    codes = torch.randint(0, 16, shape, generator=inputs.generator(1)).to(torch.uint8)
    packed = pack_e2m1(codes)
    oracle.assert_same(packed, oracle.pack(codes), f"pack_e2m1 {shape}")
    oracle.assert_same(unpack_e2m1(packed), codes, f"unpack_e2m1 {shape}")


@pytest.mark.parametrize("shape", [(256,), (16, 16), (4, 4, 16), (0, 16)])
def test_decode_packed_is_decode_of_unpack(shape):
    packed = ALL_BYTES[: 0 if 0 in shape else 256].view(shape)
    values = decode_packed_e2m1(packed)
    assert values.dtype == torch.float32
    oracle.assert_same(values, oracle.E2M1_VALUES[oracle.unpack(packed)], f"{shape}")


def test_decode_packed_of_a_transposed_tensor():
    packed = ALL_BYTES.view(16, 16).T
    oracle.assert_same(
        decode_packed_e2m1(packed), decode_packed_e2m1(packed.contiguous()), "transposed"
    )


def test_inputs_are_left_as_they_were():
    x, codes, packed = inputs.gaussian(4, 32, seed=0), ALL_CODES.clone(), ALL_BYTES.clone()
    before = x.clone()
    encode_e2m1(x), decode_e2m1(codes), pack_e2m1(codes), unpack_e2m1(packed)
    decode_packed_e2m1(packed)
    oracle.assert_same(x, before, "x")
    oracle.assert_same(codes, ALL_CODES, "codes")
    oracle.assert_same(packed, ALL_BYTES, "packed")


def fresh_e2m1():
    """A second copy of the module, as if it were imported and used here for the first time."""
    spec = importlib.util.spec_from_file_location("fresh_e2m1", e2m1.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh


def decode_everything(module) -> tuple[torch.Tensor, torch.Tensor]:
    return module.decode_e2m1(ALL_CODES), module.decode_packed_e2m1(ALL_BYTES)


def assert_everything_decoded(values: torch.Tensor, packed_values: torch.Tensor) -> None:
    assert values.dtype == packed_values.dtype == torch.float32
    oracle.assert_same(values, oracle.E2M1_VALUES, "decode_e2m1")
    expected = oracle.E2M1_VALUES[oracle.unpack(ALL_BYTES)]
    oracle.assert_same(packed_values, expected, "decode_packed_e2m1")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
        torch.inference_mode,
    ],
    ids=["default bfloat16", "default float64", "default device meta", "inference mode"],
)
def test_first_use_where_transformers_loads_a_model(surroundings):
    # Loading sets a default dtype and device, which no table of values may take on.
    with surroundings():
        fresh = fresh_e2m1()
        decoded = decode_everything(fresh)
    assert_everything_decoded(*decoded)
    assert_everything_decoded(*decode_everything(fresh))


def test_first_use_while_tracing():
    fresh = fresh_e2m1()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.zeros(4, dtype=torch.uint8)
        assert fresh.decode_e2m1(fake).shape == (4,)
        assert fresh.decode_packed_e2m1(fake).shape == (8,)
    assert_everything_decoded(*decode_everything(fresh))
