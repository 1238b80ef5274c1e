"""How serving engines hold quantized linears: fused or not, and split over ranks. No engine."""

import pytest
import torch

import duqpp
from duqpp.checkpoint.layout import Layout
from duqpp.errors import CheckpointError, InputError
from duqpp.format import ScaleRule
from duqpp.integrations.serving import (
    check_columns,
    check_index,
    is_quantized,
    rotation_of_rank,
    served_layout,
    verify_folder,
)
from duqpp.ops import rotate_quantize
from tests import oracle
from tests.checkpoint import damage
from tests.families import LLAMA

QKV = [f"model.layers.3.self_attn.{name}_proj" for name in "qkv"]
GATE_UP = ["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"]
DOWN = ["model.layers.3.mlp.down_proj"]


def layout(**fields) -> Layout:
    rules = {"weight_rule": ScaleRule.MSE, "activation_rule": ScaleRule.EVEN}
    return Layout(**{"method": "duqpp", "rotation": "shared", "permuted": False, **rules, **fields})


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("serving") / "out"
    duqpp.quantize_model(str(tiny_llama), out, duqpp.QuantizeConfig(method="hadamard"))
    return out


def test_the_layout_is_that_of_the_checkpoint():
    for rotation in ("none", "shared", "per_block"):
        wanted = layout(rotation=rotation, skip=("lm_head", "down_proj"))
        assert served_layout(wanted.to_dict()) == wanted


def test_a_permutation_is_refused():
    with pytest.raises(InputError, match=r"'duquant' permutes channels .* another `method`"):
        served_layout(layout(method="duquant", permuted=True).to_dict())


def test_another_format_is_refused():
    with pytest.raises(CheckpointError, match="format_version 2 is newer"):
        served_layout(layout().to_dict() | {"format_version": 2})


@pytest.mark.parametrize(
    ("parts", "skip", "quantized"),
    [
        (QKV, ["lm_head"], True),
        (GATE_UP, [], True),
        (DOWN, ["lm_head"], True),
        (["lm_head"], ["lm_head"], False),
        (["lm_head"], [], False),  # no linear of a decoder block
        (["model.layers.3.mlp.gate"], [], False),
        (QKV, ["self_attn"], False),
        (QKV, ["q_proj", "k_proj", "v_proj"], False),
        (QKV, ["model.layers.3"], False),
        (QKV, ["model.layers.30", "layers.3.self"], True),  # whole components only
        (DOWN, ["mlp.down_proj"], False),
        (GATE_UP, ["down_proj"], True),
        ([f"language_model.{name}" for name in QKV], ["lm_head"], True),  # wrapped models
    ],
)
def test_skip_lists_name_the_parts_of_a_fused_linear(parts, skip, quantized):
    assert is_quantized(LLAMA, parts, skip) is quantized


def test_a_fused_linear_that_is_quantized_in_part_is_refused():
    with pytest.raises(InputError) as error:
        is_quantized(LLAMA, QKV, ["lm_head", "k_proj"])
    assert str(error.value) == (
        "model.layers.3.self_attn.q_proj, model.layers.3.self_attn.v_proj and "
        "model.layers.3.self_attn.k_proj are one linear here, but only the former is quantized; "
        "quantize with `skip` for all of them, or for none"
    )


@pytest.mark.parametrize(
    ("columns", "ranks", "sizes"),
    [(48, 2, "1"), (48, 4, "1 or 2 or 3"), (16, 6, "1 or 3"), (112, 8, "1 or 2 or 4 or 7")],
)
def test_ranks_that_do_not_get_whole_blocks(columns, ranks, sizes):
    with pytest.raises(InputError) as error:
        check_columns("down_proj", columns, ranks)
    assert f"down_proj: split over {ranks} ranks, each has K = {columns}" in str(error.value)
    assert str(error.value).endswith(f"use a tensor-parallel size of {sizes}")
    for size in map(int, sizes.split(" or ")):  # the advice works
        check_columns("down_proj", columns * ranks // size, size)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("per_block", [False, True])
def test_ranks_together_quantize_what_one_would(ranks, per_block):
    columns = 192
    shape = (columns // 32, 32, 32) if per_block else (32, 32)
    rotation = torch.randn(shape).bfloat16()
    x = torch.randn(5, columns)
    whole = rotate_quantize(x, rotation, rule=ScaleRule.EVEN, backend="reference")
    blocks = columns // 32 // ranks
    parts = [
        rotate_quantize(
            part, rotation_of_rank(rotation, blocks, rank), rule=ScaleRule.EVEN, backend="reference"
        )
        for rank, part in enumerate(x.split(32 * blocks, dim=1))
    ]
    oracle.assert_same(torch.cat([p.codes for p in parts], 1), whole.codes, "codes")
    oracle.assert_same(torch.cat([p.scales for p in parts], 1), whole.scales, "scales")


def test_a_sound_folder(checkpoint):
    assert verify_folder(checkpoint) == len(list(checkpoint.glob("*.safetensors"))) == 3


def test_a_flipped_bit(checkpoint, tmp_path):
    folder = damage.copy_of(checkpoint, tmp_path / "copy")
    shard = sorted(folder.glob("*.safetensors"))[1]
    damage.flip_bit(shard, 8 * shard.stat().st_size - 3)
    with pytest.raises(CheckpointError, match=f"{shard.name}: .* is altered"):
        verify_folder(folder)


def test_a_tensor_that_only_the_index_has(checkpoint, tmp_path):
    folder = damage.copy_of(checkpoint, tmp_path / "copy")
    name = "model.layers.1.input_layernorm.weight"
    shard = damage.edit_tensors(folder, name, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{name} should be in {shard.name}, and is in none"):
        verify_folder(folder)


def test_a_tensor_that_only_a_shard_has(checkpoint):
    weight_map = damage.json.loads((checkpoint / damage.INDEX).read_text())["weight_map"]
    with pytest.raises(CheckpointError, match=r"extra should be in no shard, and is in a\.safe"):
        check_index(checkpoint, weight_map | {"extra": "a.safetensors"})
