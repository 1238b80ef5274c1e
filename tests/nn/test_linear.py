"""MXFP4Linear: its definition, its parameters, and inputs that are quantized once."""

import copy

import pytest
import torch
from torch import nn

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.nn import MXFP4Linear
from duqpp.rotation.basis import random_orthogonal
from tests import inputs, oracle

K, N = 96, 40
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROTATIONS = {
    "none": {},
    "shared": {"rotation": (32, 32)},
    "per block": {"rotation": (3, 32, 32)},
    "permuted": {"rotation": (32, 32), "pre_rotation": (32, 32), "permutation": True},
    "permuted per block": {
        "rotation": (3, 32, 32),
        "pre_rotation": (3, 32, 32),
        "permutation": True,
    },
}
each_rotation = pytest.mark.parametrize("shapes", ROTATIONS.values(), ids=ROTATIONS)


def make_linear(shapes: dict, *, bias=True, exact=False, rule=ScaleRule.EVEN, dtype=torch.bfloat16):
    """A seeded MXFP4Linear; `exact` gives it integer matrices, so that sums round nowhere."""
    options = {"rotation": None} | shapes
    linear = MXFP4Linear(K, N, bias=bias, rule=rule, dtype=dtype, **options)
    codes, scales = inputs.mxfp4_operand(N, K, seed=1)
    linear.weight_packed.data, linear.weight_scale.data = codes, scales
    for seed, name in enumerate(("rotation", "pre_rotation")):
        if getattr(linear, name) is not None:
            shape = getattr(linear, name).shape
            count = 1 if len(shape) == 2 else shape[0]
            if exact:
                matrix = inputs.small_integers(count, 1024, seed=seed)
            else:
                matrix = random_orthogonal(32, inputs.generator(seed), count=count)
            getattr(linear, name).data = matrix.reshape(shape).bfloat16().contiguous()
    if linear.permutation is not None:
        linear.permutation.data = torch.randperm(K, generator=inputs.generator(2)).int()
    if linear.bias is not None:
        linear.bias.data = (inputs.small_integers(1, N, seed=3)[0] / 4).to(dtype)
    return linear


def transformed(linear: MXFP4Linear, x: torch.Tensor) -> torch.Tensor:
    """(x P)[permutation] R with each matrix written out over all of K: float64 [M, K]."""
    x = x.double().reshape(-1, K)
    for name in ("pre_rotation", "permutation", "rotation"):
        value = getattr(linear, name)
        if value is None:
            continue
        if name == "permutation":
            x = torch.stack([x[:, source] for source in value.tolist()], dim=1)
        else:
            x = x @ torch.block_diag(*value.double().expand(K // 32, 32, 32))
    return x


@each_rotation
@pytest.mark.parametrize("rule", list(ScaleRule))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_definition(shapes, rule, with_bias, dtype):
    linear = make_linear(shapes, bias=with_bias, exact=True, rule=rule, dtype=torch.float32)
    # Up to 8, so that what lies between two rotations needs more bits than bfloat16 has.
    x = inputs.small_integers(10, K, seed=4, limit=8).to(dtype)
    rotated = transformed(linear, x)
    assert (rotated == rotated.float()).all(), "the test's own rotation must be exact"
    a = oracle.dequantize(*oracle.quantize(rotated, rule.value))
    w = oracle.dequantize(linear.weight_packed, linear.weight_scale)
    expected = torch.from_numpy(a @ w.T)
    if with_bias:
        expected = expected + linear.bias.double()
    assert (expected == expected.float()).all(), "the test's own product must be exact"
    oracle.assert_same(linear(x) + 0, expected.float().to(dtype) + 0, "y")


@each_rotation
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_has_the_dtype_and_leading_dimensions_of_the_input(shapes, dtype):
    linear = make_linear(shapes)
    for shape in ((K,), (2, 3, K), (0, K), (4, 1, K)):
        y = linear(torch.ones(shape, dtype=dtype))
        assert (y.shape, y.dtype) == ((*shape[:-1], N), dtype)


@each_rotation
def test_parameters_are_what_a_checkpoint_holds(shapes):
    linear = make_linear(shapes)
    expected = {
        "weight_packed": ((N, K // 2), torch.uint8),
        "weight_scale": ((N, K // 32), torch.uint8),
        "bias": ((N,), torch.bfloat16),
    }
    for name in ("rotation", "pre_rotation"):
        if name in shapes:
            expected[name] = (shapes[name], torch.bfloat16)
    if "permutation" in shapes:
        expected["permutation"] = ((K,), torch.int32)
    state = linear.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == expected
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    without_bias = make_linear(shapes, bias=False).state_dict()
    assert set(without_bias) == set(expected) - {"bias"}


@each_rotation
def test_state_dict_carries_everything(shapes):
    linear = make_linear(shapes)
    fresh = MXFP4Linear(
        K, N, bias=True, rule=ScaleRule.EVEN, **({"rotation": None} | shapes), device="meta"
    )
    fresh.load_state_dict(linear.state_dict(), assign=True)
    x = inputs.outliers(5, K, seed=6)
    oracle.assert_same(fresh(x), linear(x), "y after loading")
    oracle.assert_same(copy.deepcopy(linear)(x), linear(x), "y of a copy")


@each_rotation
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_stay_as_they_are_in_any_model_dtype(shapes, dtype):
    linear = make_linear(shapes)
    for name in ("rotation", "pre_rotation"):
        if name in shapes:
            getattr(linear, name).data.view(-1)[:2] = torch.tensor([3e-7, 2.0**-120])
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    model = nn.Sequential(linear, nn.Linear(N, 8)).to(dtype)
    assert model[1].weight.dtype == dtype
    assert linear.bias.dtype == dtype
    for name, tensor in linear.state_dict().items():
        if name != "bias":
            assert tensor.dtype == before[name].dtype
            oracle.assert_same(tensor, before[name], f"{name} after .to({dtype})")
    assert model(torch.ones(1, K, dtype=dtype)).dtype == dtype


def test_moving_to_the_meta_device_moves_everything():
    linear = make_linear(ROTATIONS["permuted"]).to(device="meta", dtype=torch.float16)
    assert {tensor.device.type for tensor in linear.state_dict().values()} == {"meta"}
    assert linear.rotation.dtype == torch.bfloat16
    y = linear(torch.empty(2, 3, K, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, N), torch.bfloat16, "meta")


def test_gradients_reach_the_input_through_every_transform():
    for shapes in ROTATIONS.values():
        linear = make_linear(shapes, exact=True)
        x = inputs.small_integers(4, K, seed=7, limit=3).requires_grad_()
        grad = inputs.small_integers(4, N, seed=8, limit=2)
        linear(x).backward(grad)
        w = torch.from_numpy(oracle.dequantize(linear.weight_packed, linear.weight_scale))
        # The transform is linear: its matrix is what it makes of the unit vectors.
        matrix = transformed(linear, torch.eye(K))
        expected = grad.double() @ w @ matrix.T
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-6, atol=0)


def test_in_features_must_be_a_multiple_of_32():
    with pytest.raises(
        ValueError, match=r"^MXFP4Linear: in_features must be a multiple of 32, got 4"
    ):
        MXFP4Linear(48, 8, bias=False, rule=ScaleRule.EVEN, rotation=None)


def test_an_input_of_another_width_is_an_error():
    with pytest.raises(ValueError, match=r"^mxfp4_linear: x has K = 64, weight has K = 96$"):
        make_linear({})(torch.zeros(2, 64))


def test_what_casts_all_parameters_leaves_what_the_weight_is_folded_with():
    linear = make_linear(ROTATIONS["permuted"], bias=False)
    x = inputs.outliers(5, K, seed=6)
    expected = linear(x)
    for parameter in linear.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    oracle.assert_same(linear(x), expected, "y")
    assert {name for name, _ in linear.named_parameters()} == {"weight_packed", "weight_scale"}


@each_rotation
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_default_dtype_changes_nothing(shapes, backend):
    x = inputs.outliers(5, K, seed=6)
    expected = make_linear(shapes).to(torch.float32)
    expected.backend = backend
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            linear = make_linear(shapes).to(torch.float32)
            linear.backend = backend
            oracle.assert_same(linear(x), expected(x), f"y where {dtype} is the default")
    finally:
        torch.set_default_dtype(before)


@each_rotation
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_a_cast_of_the_input_alone(shapes, backend, dtype):
    """As for nn.Linear; the arithmetic in between, of rotations too, keeps its own dtypes."""
    linear = make_linear(shapes)
    linear.backend = backend
    x = inputs.outliers(5, K, seed=6)
    expected = linear(x.to(dtype))
    with torch.autocast("cpu", dtype):
        oracle.assert_same(linear(x), expected, "y")
        leaf = x.clone().requires_grad_()
        y = linear(leaf)
    y.float().sum().backward()
    other = x.to(dtype).requires_grad_()
    linear(other).float().sum().backward()
    oracle.assert_same(leaf.grad, other.grad.float(), "gradient")


# A prepared linear holds its weight as the backend's GEMM reads it; nothing else may show it.


def prepared_linear(**options) -> MXFP4Linear:
    linear = make_linear(ROTATIONS["shared"], **options)
    linear.prepare()
    return linear


def test_preparing_changes_no_output_and_takes_no_memory():
    x = inputs.outliers(5, K, seed=6)
    plain, prepared = make_linear(ROTATIONS["shared"]), prepared_linear()
    oracle.assert_same(prepared(x), plain(x), "y")
    sizes = [sum(p.numel() for p in linear.parameters()) for linear in (plain, prepared)]
    assert sizes[0] == sizes[1]
    assert not any(p.requires_grad for p in prepared.parameters())
    codes = prepared.weight_packed.clone()
    prepared.prepare()
    oracle.assert_same(prepared.weight_packed, codes, "codes, prepared twice")


def test_a_prepared_linear_saves_what_a_checkpoint_holds():
    plain, prepared = make_linear(ROTATIONS["shared"]), prepared_linear()
    assert (prepared.weight_packed != plain.weight_packed).any(), "the layouts must differ here"
    expected, state = plain.state_dict(), prepared.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        oracle.assert_same(state[name], tensor, name)
    oracle.assert_same(prepared.weight.codes, plain.weight_packed, "weight.codes")


def test_a_prepared_linear_can_be_loaded_copied_and_moved():
    x = inputs.outliers(5, K, seed=6)
    expected, other = prepared_linear()(x), prepared_linear()
    other.weight_packed.data.zero_()
    other.load_state_dict(prepared_linear().state_dict())
    oracle.assert_same(other(x), expected, "y after loading")
    assigned = prepared_linear()
    assigned.load_state_dict(prepared_linear().state_dict(), assign=True)
    oracle.assert_same(assigned(x), expected, "y after assigning")
    oracle.assert_same(copy.deepcopy(prepared_linear())(x), expected, "y of a copy")
    moved = prepared_linear().to("meta").to_empty(device="cpu")
    moved.load_state_dict(prepared_linear().state_dict())
    oracle.assert_same(moved(x), expected, "y after a move through the meta device")
    half = prepared_linear(bias=False).half()
    oracle.assert_same(half(x), make_linear(ROTATIONS["shared"], bias=False)(x), "y of half()")


def test_a_prepared_linear_keeps_its_backend(monkeypatch):
    x, linear = inputs.outliers(5, K, seed=6), prepared_linear()
    expected = linear(x)
    monkeypatch.setenv("DUQPP_BACKEND", "reference")
    oracle.assert_same(linear(x), expected, "y: the layout belongs to the backend that was chosen")
    error = (prepared_linear()(x) - expected).abs().max()
    assert error <= 2**-6 * expected.abs().max(), "the reference, but for the order of its sums"


def test_gradients_of_a_prepared_linear():
    linear, gradients = make_linear(ROTATIONS["per block"]), []
    for _ in range(2):
        x = inputs.outliers(5, K, seed=6).requires_grad_()
        linear(x).sum().backward()
        gradients.append(x.grad)
        linear.prepare()
    oracle.assert_same(gradients[1], gradients[0], "gradient")


@pytest.mark.parametrize("prepared", [False, True])
def test_another_weight_takes_the_place_of_the_old(prepared):
    linear, other = make_linear({"rotation": (32, 32)}), MXFP4Tensor(*inputs.mxfp4_operand(N, K, 9))
    if prepared:
        linear.prepare()
    linear.replace_weight(other)
    expected = make_linear({"rotation": (32, 32)})
    expected.weight_packed.data, expected.weight_scale.data = other.codes, other.scales
    x = inputs.gaussian(8, K, 1).bfloat16()
    oracle.assert_same(linear(x), expected(x), "outputs")
    oracle.assert_same(linear.weight.codes, other.codes, "codes")
    assert (linear._prepared is not None) is prepared
