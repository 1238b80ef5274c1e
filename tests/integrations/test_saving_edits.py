"""A loaded model is edited by hand and saved: it loads as what it is, or is refused unwritten."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import duqpp
from duqpp.errors import InputError
from duqpp.integrations.transformers import DuqppConfig
from tests import oracle
from tests.checkpoint import damage

PROMPT = torch.randint(0, 300, (2, 21), generator=torch.Generator().manual_seed(2))
Q = "model.layers.0.self_attn.q_proj"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT).logits


def assert_loads_as(model, folder: Path, loaders=(duqpp.from_pretrained,)) -> None:
    for load in loaders:
        oracle.assert_same(logits(load(folder)), logits(model), "logits once saved")


@pytest.fixture(scope="session")
def bfloat16(make_tiny, tmp_path_factory) -> Path:
    """A tied Llama in bfloat16, rotations alike in each group."""
    folder, source = (
        tmp_path_factory.mktemp("bfloat16"),
        make_tiny("llama", tie_word_embeddings=True),
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    config = duqpp.QuantizeConfig(method="hadamard", rotation="per-block")
    duqpp.quantize_model(str(folder / "model"), folder / "out", config)
    return folder / "out"


@pytest.fixture(scope="session")
def loaded(hadamard, permuted, bfloat16):
    """A model by the name of its checkpoint; a copy, which takes less time than to load it."""
    folders = {"hadamard": hadamard, "permuted": permuted, "bfloat16": bfloat16}
    models = {name: duqpp.from_pretrained(folder) for name, folder in folders.items()}
    return lambda name: copy.deepcopy(models[name])


def parameter(*shape: int, seed: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 10)


# What is saved, and loads. Each takes the model; by the checkpoint that it is an edit of.


def nothing(model):
    pass


def a_norm(model):
    model.model.norm.weight.data *= 2


def head_untied(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() * 2)


def head_untied_and_equal(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def head_tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def embeddings_resized(model):
    model.resize_token_embeddings(352)


def cast(model, dtype):
    """But not what positions are computed from, which any model of transformers makes anew."""
    frequencies = model.model.rotary_emb.inv_freq.clone()
    nn.Module.to(model, dtype)
    model.model.rotary_emb.inv_freq = frequencies


def to_float32(model):
    cast(model, torch.float32)


def to_bfloat16(model):
    cast(model, torch.bfloat16)


def to_float16(model):
    cast(model, torch.float16)


def all_parameters_cast(model):
    for value in model.parameters():
        if value.is_floating_point():
            value.data = value.data.float()


def codes_replaced(model):
    linear = model.get_submodule(Q)
    linear.replace_weight(type(linear.weight)(linear.weight.codes.flip(0), linear.weight.scales))


def codes_put_in_by_hand(model):
    linear = model.get_submodule(Q)
    codes = nn.Parameter(linear.weight.codes.flip(0), requires_grad=False)
    linear.weight_packed, linear.weight_scale.data = codes, linear.weight.scales.flip(0)


def bias_replaced(model):
    linear = model.get_submodule(Q)
    linear.bias = nn.Parameter(linear.bias.detach() * 3)


def rotations_replaced_in_the_whole_group(model):
    for name in "qkv":
        linear = model.get_submodule(Q.replace("q_proj", f"{name}_proj"))
        linear.rotation = linear.rotation.flip(-1).contiguous()


def one_tensor_for_the_rotations_of_a_group(model):
    for name in "kv":
        linear = model.get_submodule(Q.replace("q_proj", f"{name}_proj"))
        linear.rotation = model.get_submodule(Q).rotation


def rotation_of_a_linear_by_itself(model):
    linear = model.model.layers[0].self_attn.o_proj
    linear.rotation.copy_(linear.rotation.flip(-1))


def head_with_a_merged_adapter(model):
    model.lm_head.weight.data += parameter(320, 2) @ parameter(2, 64, seed=4)


def hooks(model):
    model.get_submodule(Q).register_forward_hook(lambda m, args, y: y)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: None)


def generation_defaults(model):
    model.generation_config.max_new_tokens = 7


def provenance_of_its_own(model):
    model.config.quantization_config.layout.provenance["note"] = {"by": "me"}


SAVED = {
    "hadamard": (
        *(nothing, a_norm, head_tied, embeddings_resized, to_bfloat16, to_float16, codes_replaced),
        *(bias_replaced, rotations_replaced_in_the_whole_group, rotation_of_a_linear_by_itself),
        *(one_tensor_for_the_rotations_of_a_group, head_with_a_merged_adapter, hooks),
        *(generation_defaults, provenance_of_its_own),
    ),
    "bfloat16": (
        nothing,
        head_untied,
        head_untied_and_equal,
        to_float32,
        all_parameters_cast,
        to_float16,
    ),
    "permuted": (nothing, to_float16),
}
CASES = [(kind, edit) for kind, edits in SAVED.items() for edit in edits]


@pytest.mark.parametrize(
    ("kind", "edit"), CASES, ids=[f"{kind}-{edit.__name__}" for kind, edit in CASES]
)
def test_loads_as_it_is(kind, edit, loaded, tmp_path):
    model = loaded(kind)
    edit(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    assert_loads_as(model, tmp_path / "saved")


# What is refused, and why.


def a_rotation_of_k(model):
    linear = model.get_submodule(Q.replace("q_proj", "k_proj"))
    linear.rotation.copy_(linear.rotation.flip(-1))


def rotation_cast(model):
    linear = model.get_submodule(Q)
    linear.rotation = linear.rotation.float()


def rotation_singular(model):
    model.model.layers[0].self_attn.o_proj.rotation[3] = 0


def rotation_removed(model):
    model.get_submodule(Q).rotation = None


def scale_of_nan(model):
    linear = model.get_submodule(Q)
    scales = linear.weight.scales.clone()
    scales[0, 0] = 255
    linear.replace_weight(type(linear.weight)(linear.weight.codes, scales))


def float_linear(model):
    model.set_submodule(Q, model.get_submodule(Q).dequantized(torch.float32))


def adapter_inside(model):
    linear = model.get_submodule(Q)
    linear.low = nn.Linear(64, 2)


def wrapper(model):
    model.set_submodule(Q, nn.Sequential(model.get_submodule(Q)))


def head_of_another_shape(model):
    model.lm_head.weight = parameter(330, 64)


def norm_of_another_shape(model):
    model.model.norm.weight = parameter(65)


def head_alone_cast(model):
    model.lm_head.bfloat16()


def bias_alone_cast(model):
    model.get_submodule(Q).bias.data = model.get_submodule(Q).bias.data.half()


def float64(model):
    model.to(torch.float64)


def codes_of_another_shape(model):
    model.get_submodule(Q).weight_packed = nn.Parameter(
        torch.zeros(64, 16, dtype=torch.uint8), requires_grad=False
    )


def codes_cast(model):
    linear = model.get_submodule(Q)
    linear.weight_packed.data = linear.weight_packed.data.float()


def layer_removed(model):
    del model.model.layers[1]


def layer_added(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


def parameter_added(model):
    model.steering = parameter(64)


def provenance_of_no_text(model):
    model.config.quantization_config.layout.provenance["versions"] = ["x"]


def provenance_of_no_json(model):
    model.config.quantization_config.layout.provenance["base_model"] = object()


def errors_of_no_number(model):
    model.config.quantization_config.layout.provenance["mean_errors"] = {"weight_error": "x"}


def quantization_removed(model):
    del model.config.quantization_config


def vocabulary_of_another_size(model):
    model.config.vocab_size = 400


def generation_defaults_that_contradict(model):
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.3


REFUSED: dict[Callable, str] = {
    a_rotation_of_k: r"k_proj\.rotation is not .*q_proj\.rotation",
    rotation_cast: r"q_proj\.rotation must be torch\.bfloat16, got torch\.float32",
    rotation_singular: r"o_proj\.rotation",
    rotation_removed: r"it lacks .*q_proj\.rotation",
    scale_of_nan: r"q_proj\.weight_scale has a scale byte of 255",
    float_linear: r"q_proj\.weight does not belong to it .* put back",
    adapter_inside: r"q_proj\.low\..* does not belong to it \(adapters",
    wrapper: r"q_proj\.0\..* does not belong",
    head_of_another_shape: r"lm_head\.weight must be \[320, 64\], got \[330, 64\]",
    norm_of_another_shape: r"model\.norm\.weight must be \[64\], got \[65\]",
    head_alone_cast: r"lm_head\.weight is torch\.bfloat16 in a model of torch\.float32",
    bias_alone_cast: r"q_proj\.bias is torch\.float16 in a model",
    float64: r"has the dtype torch\.float64",
    codes_of_another_shape: r"q_proj\.weight_packed must be \[64, 32\], got \[64, 16\]",
    codes_cast: r"q_proj\.weight_packed must be torch\.uint8",
    layer_removed: r"it lacks model\.layers\.1",
    layer_added: r"model\.layers\.2\..* does not belong",
    parameter_added: r"steering does not belong",
    provenance_of_no_text: r"versions must be a JSON object, got \['x'\]",
    provenance_of_no_json: r"its configuration: .*object",
    errors_of_no_number: r"mean_errors\.weight_error must be a number",
    quantization_removed: r"quant_method is None",
    vocabulary_of_another_size: r"model\.embed_tokens\.weight must be \[400, 64\]",
    generation_defaults_that_contradict: r"its configuration: ",
}


@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__)
def test_refused_before_anything_is_written(edit, hadamard, loaded, tmp_path):
    """Into a new folder, and over the checkpoint itself, which stays as it is."""
    folder = damage.copy_of(hadamard, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = loaded("hadamard")
    edit(model)
    for target in (tmp_path / "new", folder):
        with pytest.raises(InputError, match=f"would not load again: .*{REFUSED[edit]}") as error:
            model.save_pretrained(target)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("way", ["class", "state"])
def test_no_way_around_the_check(way, loaded, tmp_path):
    """Through the class, where transformers has made the folder; with a state of its own."""
    model = loaded("hadamard")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if way == "class":
        a_rotation_of_k(model)
        with pytest.raises(InputError, match=r"k_proj\.rotation is not"):
            type(model).save_pretrained(model, tmp_path / "out")
    else:
        del state["model.norm.weight"]
        with pytest.raises(InputError, match=r"it lacks model\.norm\.weight"):
            model.save_pretrained(tmp_path / "out", state_dict=state)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_given_state_is_what_is_saved(loaded, tmp_path):
    """As a trainer gathers it: every tensor a copy, the tied head too."""
    model = loaded("bfloat16")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] *= 2
    model.save_pretrained(tmp_path / "saved", state_dict=state)
    a_norm(model)
    assert_loads_as(model, tmp_path / "saved")


def test_a_head_of_its_own_beside_one_that_is_tied_by_name(make_tiny, tmp_path):
    """Quantized on load: transformers keeps what the file has, whatever its configuration says."""
    source = damage.copy_of(make_tiny("llama"), tmp_path / "model")
    damage.edit_json(source / "config.json", lambda c: c.update(tie_word_embeddings=True))
    config = DuqppConfig(method="hadamard")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    assert not json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    loaders = (duqpp.from_pretrained, AutoModelForCausalLM.from_pretrained)
    assert_loads_as(model, tmp_path / "saved", loaders)


@pytest.mark.parametrize(("option", "value"), [("variant", "fp16"), ("distributed_checkpoint", 1)])
def test_options_that_no_loader_reads(option, value, loaded, tmp_path):
    with pytest.raises(InputError, match=f"duqpp has no `{option}`"):
        loaded("hadamard").save_pretrained(tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder(loaded, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file is a file, and a model is saved as a folder"):
        loaded("hadamard").save_pretrained(tmp_path / "file")


def test_another_process_writes_nothing(loaded, tmp_path):
    loaded("hadamard").save_pretrained(tmp_path / "out", is_main_process=False)
    assert not list((tmp_path / "out").iterdir())
