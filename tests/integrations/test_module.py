"""A quantized model is a torch module among others: offloaded, cast, wrapped, trained around."""

import copy
import json
from dataclasses import replace

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

import duqpp
from duqpp.errors import CheckpointError, InputError
from duqpp.integrations.peft import lora_on_quantized
from duqpp.integrations.serving import verify_folder
from duqpp.nn import MXFP4Linear
from tests import oracle
from tests.checkpoint import damage

PROMPT = torch.randint(0, 300, (2, 21), generator=torch.Generator().manual_seed(2))
LAYER = "model.layers.0."


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT).logits


def linears(model) -> list[MXFP4Linear]:
    return [module for module in model.modules() if isinstance(module, MXFP4Linear)]


@pytest.fixture(params=["hadamard", "permuted"])
def folder(request):
    return request.getfixturevalue(request.param)


# accelerate.


def cpu_offload(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")


def disk_offload(model, folder):
    accelerate.disk_offload(model, folder, execution_device="cpu")


def buffers_too(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def whole_blocks(model, folder):
    """Their linears get no hook of their own."""
    preloaded = {"preload_module_classes": [type(model.model.layers[0]).__name__]}
    accelerate.cpu_offload(model, execution_device="cpu", **preloaded)


def dispatch(model, folder):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder)


WAYS = [cpu_offload, disk_offload, buffers_too, whole_blocks, dispatch]


@pytest.mark.parametrize("offload", WAYS, ids=lambda way: way.__name__)
def test_offloading_after_loading(offload, folder, tmp_path):
    """The weights are those of the state dict then, row-major, and no longer prepared."""
    expected, model = logits(duqpp.from_pretrained(folder)), duqpp.from_pretrained(folder)
    offload(model, tmp_path / "offload")
    assert linears(model)[-1].weight_packed.is_meta
    for _ in range(2):
        oracle.assert_same(logits(model), expected, "logits")
    model.save_pretrained(tmp_path / "saved")
    saved = duqpp.from_pretrained(tmp_path / "saved")
    oracle.assert_same(logits(saved), expected, "logits once saved")
    remove_hook_from_submodules(model)
    assert not any(value.is_meta for value in model.state_dict().values())
    oracle.assert_same(logits(model), expected, "logits without the hooks")


def test_an_offloaded_model_is_not_saved_over_what_it_is_read_from(hadamard, tmp_path):
    folder = damage.copy_of(hadamard, tmp_path / "out")
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    layers |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "model.embed_tokens": "cpu"}
    model = duqpp.from_pretrained(folder, device_map=layers, offload_folder=tmp_path / "off")
    with pytest.raises(InputError, match="part of the model is offloaded, and read from"):
        model.save_pretrained(folder)
    oracle.assert_same(logits(duqpp.from_pretrained(folder)), logits(model), "logits")


def test_a_weight_of_another_shape_once_prepared(monkeypatch):
    """As on Blackwell, whose scales are padded: accelerate compares shapes with the state dict."""
    linear = MXFP4Linear(64, 32, bias=False, rule="even", rotation=None)
    shapes = {name: tensor.shape for name, tensor in linear.state_dict().items()}
    linear.prepare()
    linear.weight_scale.data = torch.zeros(512, dtype=torch.uint8)
    for name in ("weight_packed", "weight_scale"):
        setattr(linear, name, nn.Parameter(getattr(linear, name).to("meta"), requires_grad=False))
    linear._hf_hook = None
    assert {name: tensor.shape for name, tensor in linear.state_dict().items()} == shapes


@pytest.mark.parametrize("values", ["state dict", "tensors of the module"])
def test_functional_call(values, folder):
    """Row-major values in the place of prepared ones for a call, and prepared ones."""
    model = duqpp.from_pretrained(folder)
    expected = logits(model)
    given = model.state_dict()
    if values != "state dict":
        given = dict(model.named_parameters()) | dict(model.named_buffers())
    given = {name: tensor.detach().clone() for name, tensor in given.items()}
    for tensors in (given, {name: tensor * 1 for name, tensor in given.items()}):
        with torch.no_grad():
            out = torch.func.functional_call(model, tensors, (), {"input_ids": PROMPT})
        oracle.assert_same(out.logits, expected, "logits")
    oracle.assert_same(logits(model), expected, "logits afterwards")


# Casts.


def parameters_to_float32(model):
    """As peft.prepare_model_for_kbit_training does."""
    for value in model.parameters():
        value.requires_grad = False
        if value.dtype in (torch.float16, torch.bfloat16):
            value.data = value.data.float()


CASTS = [
    *(parameters_to_float32, lambda m: m.to(torch.float32), lambda m: nn.Module.float(m)),
    *(lambda m: m.to(torch.float16).to(torch.float32), lambda m: m.apply(lambda part: None)),
    *(lambda m: m.requires_grad_(False), lambda m: m.train().eval(), lambda m: m.to("cpu")),
]


@pytest.mark.parametrize("cast", CASTS)
def test_what_weights_are_folded_with_stays(cast, folder):
    model = duqpp.from_pretrained(folder)
    before = [{n: t.clone() for n, t in linear.state_dict().items()} for linear in linears(model)]
    cast(model)
    for linear, state in zip(linears(model), before, strict=True):
        for name, tensor in linear.state_dict().items():
            if name != "bias":
                oracle.assert_same(tensor, state[name], name)
    assert logits(model).dtype == torch.float32


def test_copies_default_dtype_and_inference_mode(folder):
    model = duqpp.from_pretrained(folder)
    expected = logits(model)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        oracle.assert_same(logits(model), expected, "logits by another default")
        again = duqpp.from_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    oracle.assert_same(logits(again), expected, "logits, loaded by another default")
    with torch.inference_mode():
        oracle.assert_same(model(PROMPT).logits, expected, "logits in inference mode")
        inside = copy.deepcopy(model)
        oracle.assert_same(inside(PROMPT).logits, expected, "logits of a copy made there")


def test_autocast(folder):
    """Rotations keep their dtypes: off by what bfloat16 costs, and not by that of a rotation."""
    model = duqpp.from_pretrained(folder)
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        error = (logits(model).float() - expected).norm() / expected.norm()
    narrow = duqpp.from_pretrained(folder, dtype=torch.bfloat16)
    plain = (logits(narrow).float() - expected).norm() / expected.norm()
    assert 0 < error <= 1.5 * plain


# Training of what is around the quantized linears.


class LowRank(nn.Module):
    """What peft puts around a linear."""

    def __init__(self, base: MXFP4Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def train(model) -> list[float]:
    """Six steps on the prompt. Returns: the losses."""
    optimizer, losses = (
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02),
        [],
    )
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.train()(input_ids=PROMPT, labels=PROMPT).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train(checkpointing, hadamard):
    model = duqpp.from_pretrained(hadamard).train()
    assert model.hf_quantizer.is_trainable
    before = logits(model)
    model.requires_grad_(False)
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            block.self_attn.set_submodule(name, LowRank(block.self_attn.get_submodule(name)))
    oracle.assert_same(logits(model), before, "logits with new adapters")
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    losses = train(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert losses[-1] < losses[0] - 0.05, losses
    with pytest.raises(InputError, match="adapters are saved or merged by themselves"):
        model.save_pretrained("nowhere")


def test_peft(hadamard, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(duqpp.from_pretrained(hadamard))
    expected = logits(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, lora_on_quantized(config))
    oracle.assert_same(logits(tuned), expected, "logits with new adapters")
    losses = train(tuned)
    assert losses[-1] < losses[0] - 0.05, losses
    tuned.save_pretrained(tmp_path / "adapter")
    base = duqpp.from_pretrained(hadamard)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    oracle.assert_same(logits(again), logits(tuned), "logits with the adapter loaded")
    with pytest.raises(InputError, match="an adapter cannot be merged into MXFP4 weights"):
        tuned.merge_and_unload()
    with pytest.raises(InputError, match="adapters are saved or merged by themselves"):
        again.base_model.model.save_pretrained(tmp_path / "base")


def test_an_adapter_attached_by_transformers_is_saved_alone(hadamard, tmp_path):
    peft = pytest.importorskip("peft")
    model = duqpp.from_pretrained(hadamard)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not {"config.json", "model.safetensors"} & files


# A rotation of a linear group is one.


@pytest.mark.parametrize("kind", ["rotation", "pre_rotation", "permutation"])
@pytest.mark.parametrize("linear", ["self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_a_transform_that_is_not_its_group_s(linear, kind, permuted, tmp_path):
    from tests.integrations.test_transformers import LOADERS

    folder, name = damage.copy_of(permuted, tmp_path / "out"), f"{LAYER}{linear}.{kind}"
    damage.set_tensor(folder, name, damage.get_tensor(folder, name).flip(-1).contiguous())
    for load in (*LOADERS, verify_folder):
        with pytest.raises(CheckpointError, match=f"{name} is not {LAYER}.*{kind}"):
            load(folder)


def test_a_group_that_is_quantized_in_part_may_differ(hadamard, tmp_path):
    """Its linears quantize their inputs for themselves."""
    folder = damage.copy_of(hadamard, tmp_path / "out")
    model = duqpp.from_pretrained(folder)
    layer = model.model.layers[0].self_attn
    layer.k_proj.rotation.copy_(layer.k_proj.rotation.flip(-1))
    layer.set_submodule("q_proj", layer.q_proj.dequantized(torch.float32))
    quantization = model.config.quantization_config
    skip = (*quantization.layout.skip, "model.layers.0.self_attn.q_proj")
    quantization.layout = replace(quantization.layout, skip=skip)
    duqpp.nn.unshare_input(layer)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert skip[-1] in config["quantization_config"]["modules_to_not_convert"]
    oracle.assert_same(logits(duqpp.from_pretrained(tmp_path / "saved")), logits(model), "logits")
