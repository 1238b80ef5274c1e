"""The plugin's classes in vLLM's own layers, without an engine: exact values, and refusals."""

import os
import pickle

import pytest
import torch

from duqpp.checkpoint.layout import Layout
from duqpp.errors import CheckpointError, InputError
from duqpp.format import MXFP4Tensor, ScaleRule, quantize
from duqpp.ops import mxfp4_linear
from tests import oracle
from tests.families import LLAMA

ROWS, COLUMNS = (96, 32, 32), 128  # q, k, v: three heads of 32 on one key-value head
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ROTATIONS = ("none", "shared", "per_block")


def config(rotation: str = "shared", skip: tuple[str, ...] = ("lm_head",)):
    from duqpp.integrations.vllm import DuqppVllmConfig

    layout = Layout("duqpp", rotation, False, ScaleRule.MSE, ScaleRule.EVEN, skip)
    made = DuqppVllmConfig.from_config(layout.to_dict())
    made.maybe_update_config("no folder", hf_config=LLAMA.config)
    made.packed_modules_mapping = MAPPING
    return made


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """vLLM's process groups, of this process alone."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    with set_current_vllm_config(VllmConfig()):
        import tempfile

        with tempfile.NamedTemporaryFile() as store:
            init_distributed_environment(1, 0, f"file://{store.name}.store", 0, "gloo")
            initialize_model_parallel(1, 1)
            yield
            cleanup_dist_env_and_memory()


def qkv(rotation: str = "shared", dtype: torch.dtype = torch.float32):
    from vllm.model_executor.layers.linear import QKVParallelLinear

    return QKVParallelLinear(
        hidden_size=COLUMNS,
        head_size=32,
        total_num_heads=3,
        total_num_kv_heads=1,
        bias=True,
        params_dtype=dtype,
        quant_config=config(rotation),
        prefix="model.layers.0.self_attn.qkv_proj",
    )


def matrix(rotation: str) -> torch.Tensor | None:
    shape = {"none": None, "shared": (32, 32), "per_block": (COLUMNS // 32, 32, 32)}[rotation]
    return None if shape is None else torch.randn(shape).bfloat16()


def load(layer, name: str, shard: str, value: torch.Tensor) -> None:
    parameter = getattr(layer, name)
    parameter.weight_loader(parameter, value, shard)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_layer_is_its_projections_side_by_side(rotation, dtype):
    layer, r = qkv(rotation, dtype), matrix(rotation)
    x, expected = torch.randn(7, COLUMNS).to(dtype), []
    for shard, rows in zip("qkv", ROWS, strict=True):
        weight = quantize(torch.randn(rows, COLUMNS), rule=ScaleRule.MSE)
        bias = torch.randn(rows).to(dtype)
        load(layer, "weight_packed", shard, weight.codes)
        load(layer, "weight_scale", shard, weight.scales)
        load(layer, "bias", shard, bias)
        if r is not None:
            load(layer, "rotation", shard, r)
        expected.append(
            mxfp4_linear(
                *(x, r, MXFP4Tensor(weight.codes, weight.scales), bias),
                rule=ScaleRule.EVEN,
                backend="reference",
            )
        )
    layer.quant_method.process_weights_after_loading(layer)
    got, _ = layer(x)
    expected = torch.cat(expected, dim=1)
    # The reference sums in another order; in bfloat16 that may change the last bit of a result.
    tolerance = (
        {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    )
    torch.testing.assert_close(got, expected, **tolerance)
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        oracle.assert_same(compiled(x), got, "compiled")


def test_projections_with_different_rotations_are_refused():
    layer = qkv()
    load(layer, "rotation", "q", torch.eye(32).bfloat16())
    with pytest.raises(CheckpointError, match="share one input have different rotations"):
        load(layer, "rotation", "k", -torch.eye(32).bfloat16())


@pytest.mark.parametrize(
    "value", [torch.eye(32), torch.eye(32).bfloat16().expand(4, 32, 32)], ids=["dtype", "shape"]
)
def test_a_rotation_of_another_kind_is_refused(value):
    with pytest.raises(CheckpointError, match=r"rotation must be torch\.bfloat16 \[32, 32\], got"):
        load(qkv(), "rotation", "q", value)


def test_a_tensor_that_is_missing_is_named():
    layer = qkv("none")
    for shard, rows in zip("qkv", ROWS, strict=True):
        load(layer, "weight_packed", shard, torch.zeros(rows, 64, dtype=torch.uint8))
        if shard != "v":
            load(layer, "weight_scale", shard, torch.zeros(rows, 4, dtype=torch.uint8))
    with pytest.raises(
        CheckpointError, match="qkv_proj: the checkpoint lacks 1 tensors named weight_s"
    ):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("rotation", ["shared", "per_block"])
def test_a_rank_takes_its_blocks_of_a_rotation(rotation):
    from duqpp.integrations.vllm import RotationParameter

    whole = torch.randn((32, 32) if rotation == "shared" else (6, 32, 32)).bfloat16()
    for rank in range(2):
        data = torch.zeros((32, 32) if rotation == "shared" else (3, 32, 32)).bfloat16()
        parameter = RotationParameter(data=data, weight_loader=lambda *a: None)
        parameter.tp_rank = rank
        parameter.load_row_parallel_weight(whole)
        expected = whole if rotation == "shared" else whole[3 * rank : 3 * rank + 3]
        oracle.assert_same(parameter.data, expected, f"rank {rank}")


def test_ranks_without_whole_blocks_are_refused():
    layer = torch.nn.Module()
    layer.prefix = "model.layers.0.mlp.down_proj"
    method = config().get_quant_method(qkv(), "model.layers.0.mlp.down_proj")
    with pytest.raises(InputError, match=r"split over 2 ranks, each has K = 48.* size of 1$"):
        method.create_weights(layer, 48, [64], 96, 64, torch.float32, weight_loader=None)


def test_skip_lists_become_unquantized_linears():
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from duqpp.integrations.vllm import DuqppLinearMethod

    layer, skipping = qkv(), config(skip=("lm_head", "q_proj", "k_proj", "v_proj"))
    for name, kind in [
        ("self_attn.qkv_proj", UnquantizedLinearMethod),
        ("mlp.gate_up_proj", DuqppLinearMethod),
    ]:
        assert type(skipping.get_quant_method(layer, f"model.layers.0.{name}")) is kind
    with pytest.raises(InputError, match="only the former is quantized"):
        config(skip=("v_proj",)).get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    assert config().get_quant_method(torch.nn.Linear(2, 2), "lm_head") is None


def test_the_configuration_travels_to_other_processes():
    made = pickle.loads(pickle.dumps(config("per_block", ("lm_head", "down_proj"))))
    assert made.layout == config("per_block", ("lm_head", "down_proj")).layout
    assert made.skip == ["lm_head", "down_proj"] and made.packed_modules_mapping == MAPPING


def test_a_permuted_checkpoint_is_refused():
    from duqpp.integrations.vllm import DuqppVllmConfig

    layout = Layout("duquant", "shared", True, ScaleRule.MSE, ScaleRule.EVEN)
    with pytest.raises(InputError, match="permutes channels"):
        DuqppVllmConfig.from_config(layout.to_dict())
