"""Plans: shapes and operations against what really runs, sizes against a real checkpoint."""

import json
import platform

import bench_memory
import bench_quantize
import plans
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.job.plan import GPUS, memory_of_job, memory_of_passes, plan_job, shaped
from duqpp.methods import METHODS
from duqpp.models.shapes import ShapedModel
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack
from duqpp.placement.devices import has_room

H100 = GPUS["H100"]
SMALL = {"samples": 2, "seq_len": 64, "max_steps": 4}


@pytest.fixture(scope="module")
def config(tiny_llama):
    return open_source(str(tiny_llama)).config


def planned(config, *, ranks=1, device_memory=None, machine=H100, **options):
    options = QuantizeConfig(**SMALL | options)
    model = shaped(config, options)
    return plan_job(model, options, machine=machine, ranks=ranks, device_memory=device_memory)


def test_a_pass_without_weights_is_counted_as_one_with_them(tiny_llama, config):
    """Operations to the last one; and no tensor of the model has memory."""
    model = ShapedModel(config, torch.float32, 64)
    forward = model.forward(1)
    assert all(p.is_meta for p in model.blocks[1].parameters())
    stack = DecoderStack(open_source(str(tiny_llama)))
    inputs = stack.first_inputs(torch.zeros(forward.tokens // 64, 64, dtype=torch.int64))
    with FlopCounterMode(display=False) as counter:
        inputs.run(stack.block(1), 1, 0)
    heads = config.num_attention_heads * config.head_dim
    attention = 4 * forward.tokens * 64 * heads  # which torch does not count on a CPU
    assert forward.operations == counter.get_total_flops() + attention
    mlp = 4 * forward.tokens * config.intermediate_size
    assert 2 * mlp < forward.bytes < 8 * mlp


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_is_on_disk_is_known_to_the_byte(make_tiny, tmp_path, family):
    folder = make_tiny(family)
    options = {**SMALL, "method": "duqpp", "skip": ("down_proj",)}
    tokens = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    report = duqpp.quantize_model(
        str(folder), tmp_path / "out", QuantizeConfig(**options), calibration=tokens, device="cpu"
    )
    plan = planned(open_source(str(folder)).config, **options)
    headers = sum(
        8 + int.from_bytes(file.read_bytes()[:8], "little")
        for file in (tmp_path / "out").glob("*.safetensors")
    )
    assert plan.disk == plan.written == report.weight_bytes - headers


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(config, method):
    plan = planned(config, method=method, samples=64)
    assert plan.total_seconds > 0 and plan.blocks == 2
    assert plan.device > plan.host > 0 and plan.rests == "device"
    assert {"rtn", "hadamard", "random"} >= {method} or plan.activations > 0
    names = [stage.name for stage in plan.stages]
    assert len(names) == len(set(names))
    assert all(stage.device > 0 and stage.seconds > 0 for stage in plan.stages)


def test_what_costs_more_is_said_to():
    """On shapes that are large enough to show it."""
    config = open_config(1024, 4096)
    rtn, plain, gptq, ours, blocks, distill = (
        planned(config, seq_len=1024, samples=16, **options)
        for options in (
            {"method": "rtn"},
            {"method": "duquant++"},
            {"method": "duquant++", "gptq": True},
            {"method": "duqpp"},
            {"method": "duqpp", "refine": "blocks"},
            {"method": "duqpp", "refine": "distill"},
        )
    )
    assert rtn.total_seconds < plain.total_seconds < gptq.total_seconds < ours.total_seconds
    assert ours.total_seconds < blocks.total_seconds < distill.total_seconds
    assert rtn.device < plain.device < gptq.device < blocks.device < distill.device
    assert distill.disk > blocks.disk == ours.disk


def test_distillation_keeps_a_state_while_it_writes_the_next(config):
    """Every 16 steps, in two epochs over all batches but one: of 9, 10, 17 and 18 batches."""
    options = {"method": "duqpp", "refine": "distill", "samples": 32}
    plans = [planned(config, refine_samples=32 * n, **options) for n in (9, 10, 17, 18)]
    state = (12 + 17 / 32) * plans[0].weights
    none, one, still_one, two = (plan.written - plans[0].written for plan in plans)
    assert (none, one, still_one, two) == (0, state, state, 2 * state)
    assert plans[1].disk - plans[0].disk == state == plans[2].disk - plans[0].disk
    # Two states, where there were one and the new shards.
    assert 0 < plans[3].disk - plans[2].disk < state


def open_config(hidden, intermediate):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        vocab_size=2048,
        dtype=torch.bfloat16,
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measured by Linux and glibc")
@pytest.mark.parametrize(
    "width, job", [((1024, 3584), "rtn"), ((512, 1792), "duquant++")], ids=["rtn", "duquant++"]
)
def test_memory_is_what_a_job_takes(tmp_path, width, job):
    """Within 15 %: the sizes are of the largest tensors of a stage, what operations take inside of
    themselves is not known, and malloc rounds up. What else a process has is taken off, and one
    thread on any machine takes the same.
    """
    config = {"samples": 4, "seq_len": 1024, **bench_memory.JOBS[job]}
    small, model = tmp_path / "small", tmp_path / "model"
    bench_quantize.save_model(small, *bench_memory.SMALL, 0)
    bench_quantize.save_model(model, *width, 0)
    peak = bench_memory.measured(small, model, tmp_path / "out", config)
    assert peak == pytest.approx(
        bench_memory.planned(bench_quantize.config_of(*width), config), rel=0.15
    )


def test_memory_is_what_was_measured():
    """Every job, within 15 %, by the formulas of today."""
    file = bench_memory.RESULTS / "memory.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert {row["options"] for row in rows} == set(bench_memory.JOBS)
    for row in rows:
        of_today = bench_memory.beside_plan(row)["planned MB"]
        assert row["planned MB"] == pytest.approx(of_today), "run bench_memory.py --measured FILE"
        assert row["ratio"] == pytest.approx(row["measured MB"] / of_today)
        assert row["ratio"] == pytest.approx(1, abs=0.15), row


def test_ranks_share_the_text_and_not_the_weights():
    config = open_config(1024, 4096)
    options = {"method": "duqpp", "samples": 16, "seq_len": 1024}
    one, four = (planned(config, ranks=ranks, **options) for ranks in (1, 4))
    assert one.activations == 4 * four.activations
    assert four.device < one.device and four.disk == one.disk and four.read == one.read
    assert one.seconds["computing"] / 4 < four.seconds["computing"] < one.seconds["computing"]


def test_activations_rest_where_there_is_room():
    options = QuantizeConfig(method="duqpp", samples=64, seq_len=1024)
    model = shaped(open_config(1024, 4096), options)
    plan = plan_job(model, options, machine=H100)
    assert plan.rests == "device"
    needed = plan.device / 0.95
    for memory, place in ((needed * 1.001, "device"), (needed * 0.999, "host")):
        assert has_room(memory_of_job(model, options), memory) == (place == "device")
        assert plan_job(model, options, machine=H100, device_memory=memory).rests == place
    on_host = plan_job(model, options, machine=H100, device_memory=needed * 0.9)
    assert on_host.host - plan.host == pytest.approx(plan.activations)


def test_what_an_evaluation_takes_grows_with_its_windows():
    model = ShapedModel(open_config(1024, 4096), torch.bfloat16, 512)
    one, more = memory_of_passes(model, 1), memory_of_passes(model, 1001)
    assert more - one == 1000 * 512 * 1024 * 2
    embeddings, weights = 2 * 2048 * 1024 * 2, 2 * 2 * (1024 * (2560 + 3 * 4096))
    assert 0 < one - 1e9 - embeddings - weights < 0.3 * weights


@pytest.mark.parametrize("ranks, message", [(0, "at least 1"), (17, "16 batches of calibration")])
def test_ranks_that_cannot_be(config, ranks, message):
    with pytest.raises(InputError, match=message):
        planned(config, ranks=ranks, method="duqpp", samples=16, seq_len=2048)


def test_the_pages_show_the_plans_of_today():
    """Those of the smallest model; `python benchmarks/plans.py` writes all of them anew."""
    shown = json.loads(plans.FILE.read_text(encoding="utf-8"))["tables"]
    for name, table in plans.tables(["8B"]).items():
        assert table["columns"] == shown[name]["columns"]
        rows = [row for row in shown[name]["rows"] if row[0] == "8B"]
        assert table["rows"] == rows and (rows or name == "stages")
