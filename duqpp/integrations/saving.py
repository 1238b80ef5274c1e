"""Saving a duqpp model by transformers: what loads again alone, and a folder that is complete."""

import json
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duqpp.checkpoint.card import finish_folder
from duqpp.checkpoint.layout import Layout, expected_tensors, quantization_of
from duqpp.checkpoint.shard import CHECKSUMS_KEY, INDEX_FILE, checksum, verify_tensor
from duqpp.checkpoint.transforms import groups_of, verify_transforms
from duqpp.errors import CheckpointError, InputError, refusing
from duqpp.models.family import family_of


# Each takes the place of a method of one model, by its name.
def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained`, of what loads again; the folder is then completed.

    Raises: InputError before anything is written, for a model that would not load as what it is.
    """
    method = type(self).save_pretrained
    if has_adapter(self):  # it alone is saved
        method(self, save_directory, *args, **kwargs)
        return
    given = signature(method).bind(self, save_directory, *args, **kwargs).arguments
    folder = Path(save_directory)
    _check_place(self, folder, given)
    token = _to_save.set(savable_state(self, given.get("state_dict")))
    try:
        before = _entries(folder)
        method(self, save_directory, *args, **kwargs)
    finally:
        _to_save.reset(token)
    if not given.get("is_main_process", True) or not folder.is_dir():
        return
    after = _entries(folder)
    if after != before:  # an earlier save of another number of shards must not be found first
        for file in before.keys() & after.keys():
            if before[file] == after[file]:
                file.unlink()
    finish_folder(folder)


def _check_place(model: Any, folder: Path, given: dict[str, Any]) -> None:
    """Raise InputError for where, or under what names, no checkpoint can be written."""
    if folder.is_file():
        raise InputError(f"{folder} is a file, and a model is saved as a folder")
    for option in ("variant", "distributed_checkpoint"):
        if given.get(option):
            raise InputError(f"save_pretrained: duqpp has no `{option}`; leave it out")
    if folder.resolve() in {file.resolve().parent for file in _offload_files(model)}:
        raise InputError(
            f"part of the model is offloaded, and read from {folder}; save it elsewhere"
        )


def _offload_files(model: Any) -> Iterator[Path]:
    """The files from which accelerate reads what it has offloaded to the disk."""
    for module in model.modules():
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        index = getattr(getattr(offloaded, "dataset", offloaded), "index", None) or {}
        for entry in index.values():
            if "safetensors_file" in entry:
                yield Path(entry["safetensors_file"])


def _entries(folder: Path) -> dict[Path, int]:
    """When what readers look for first in a folder, the one shard or the index, was written."""
    files = (folder / "model.safetensors", folder / INDEX_FILE)
    return {file: file.stat().st_mtime_ns for file in files if file.exists()}


def _upload_modified_files(
    self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    """The last step of transformers' push to the hub, on a completed folder."""
    finish_folder(Path(working_dir), repo_id)
    return type(self)._upload_modified_files(self, working_dir, repo_id, *args, **kwargs)


_METHODS = (save_pretrained, _upload_modified_files)


def complete_on_save(model: Any) -> None:
    """Let this model complete what transformers saves of it, on disk or to the hub.

    So do its copies and what is unpickled of it: not methods, which pickle looks up in the class.
    """
    for method in _METHODS:
        setattr(model, method.__name__, partial(method, model))


def forget_on_save(model: Any) -> None:
    """Undo `complete_on_save`."""
    for method in _METHODS:
        vars(model).pop(method.__name__, None)


State = tuple[dict[str, Tensor], dict[str, str]]  # what is saved, and its shards' metadata

# What a `save_pretrained` in progress is to write, checked.
_to_save: ContextVar[State | None] = ContextVar("duqpp_to_save", default=None)


def state_to_save(model: Any) -> State:
    """What transformers is to write of a model, which it asks for before it writes anything."""
    if (state := _to_save.get()) is not None:
        return state
    return (model.state_dict(), {}) if has_adapter(model) else savable_state(model)


def has_adapter(model: Any) -> bool:
    """Whether an adapter was attached by transformers, which then saves that alone."""
    return getattr(model, "_hf_peft_config_loaded", False)


def savable_state(model: Any, given: dict[str, Tensor] | None = None) -> State:
    """What is written of a model, checked as a loader will check it.

    Args: given: state to save in the place of the model's own.
    Raises: InputError naming what would not load, or load as something else.
    """
    state = dict(model.state_dict() if given is None else given)
    try:
        _settle_head(model, state)
        config, layout = _written_configuration(model)
        checksums, transforms = _checked(model, state, expected_tensors(config, layout))
        groups = groups_of(family_of(config), layout.skip)
        verify_transforms(groups, transforms, transforms.__getitem__)
    except CheckpointError as error:
        raise InputError(f"the model is not saved, as it would not load again: {error}") from error
    return _without_aliases(state), {CHECKSUMS_KEY: json.dumps(checksums)}


def _settle_head(model: Any, state: dict[str, Tensor]) -> None:
    """Let the configuration say whether the head is the embedding by now, which is saved once."""
    for head, embedding in (model._tied_weights_keys or {}).items():
        tied = _is_tied(model, state, head, embedding)
        model.config.tie_word_embeddings = tied
        if tied:
            state.pop(head, None)


def _is_tied(model: Any, state: dict[str, Tensor], head: str, embedding: str) -> bool:
    was_tied = bool(model.config.tie_word_embeddings)
    if head not in state or embedding not in state:
        return was_tied
    one, other = state[head], state[embedding]
    if one.is_meta or other.is_meta:
        return was_tied and head in model.all_tied_weights_keys
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.data_ptr() == other.data_ptr() or (was_tied and torch.equal(one, other))


def _written_configuration(model: Any) -> tuple[Any, Layout]:
    """What will be read of config.json."""
    with refusing("its configuration", CheckpointError):
        if model.can_generate():
            model.generation_config.validate(strict=True)
        values = json.loads(model.config.to_json_string())
        quantization = quantization_of(
            {"quantization_config": values.pop("quantization_config", None)}
        )
        return type(model.config).from_dict(values), Layout.from_dict(quantization)


def _checked(
    model: Any, state: dict[str, Tensor], expected: dict[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Check each tensor.

    Offloaded ones are read to be checked. They stay on the meta device in `state` where
    transformers reads them again by itself.

    Returns: the checksums of all, and the tensors that transform the linears' inputs.
    """
    if unknown := sorted(set(state) - set(expected)):
        raise CheckpointError(
            f"{unknown[0]} does not belong to it (adapters are saved or merged by themselves, and "
            "a quantized linear that was replaced has to be put back)"
        )
    if missing := sorted(set(expected) - set(state)):
        raise CheckpointError(f"it lacks {missing[0]}")
    is_read_again = {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values())
    checksums, transforms = {}, {}
    for name, wanted in expected.items():
        tensor = _in_memory(model, name, state[name])
        verify_tensor("it", name, tensor, wanted)
        is_transform = name.endswith(("rotation", "permutation"))
        if wanted.is_floating_point() and not is_transform and tensor.dtype != model.dtype:
            raise CheckpointError(
                f"{name} is {tensor.dtype} in a model of {model.dtype}, and would be cast; "
                f"bring all of it into one with model.to({tensor.dtype})"
            )
        checksums[name] = checksum(tensor)
        if is_transform:
            transforms[name] = tensor
        if not is_read_again:
            state[name] = tensor
    return checksums, transforms


def _in_memory(model: Any, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the state; what is offloaded is read."""
    if not tensor.is_meta:
        return tensor
    from transformers.integrations.accelerate import load_offloaded_parameter

    with refusing(f"{name}, which is on the meta device, cannot be read", CheckpointError):
        read: Tensor = load_offloaded_parameter(model, name)
    return read


def _without_aliases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state in which no two tensors share their storage, which transformers would refuse."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if not tensor.is_meta and tensor.numel():
            place = tensor.untyped_storage().data_ptr()
            state[name] = tensor.clone() if place in seen else tensor
            seen.add(place)
    return state
