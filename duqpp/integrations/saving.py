"""What transformers leaves out when it saves a duqpp model: the guard, the model card, an order."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from duqpp.checkpoint.card import finish_folder
from duqpp.checkpoint.shard import CHECKSUMS_KEY, INDEX_FILE, checksum


# Each takes the place of a method of one model, by its name.
def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained`; the folder is then completed."""
    folder = Path(save_directory)
    before = _entries(folder)
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    is_main = args[0] if args else kwargs.get("is_main_process", True)
    if not is_main or not folder.is_dir():
        return
    after = _entries(folder)
    if after != before:  # an earlier save of another number of shards must not be found first
        for file in before.keys() & after.keys():
            if before[file] == after[file]:
                file.unlink()
    finish_folder(folder)


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


def state_and_checksums(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What transformers saves, and its shards' metadata; offloaded tensors are read again."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    state = model.state_dict()
    checksums = {
        name: checksum(load_offloaded_parameter(model, name) if tensor.is_meta else tensor)
        for name, tensor in state.items()
    }
    return state, {CHECKSUMS_KEY: json.dumps(checksums)}
