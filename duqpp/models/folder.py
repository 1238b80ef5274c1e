"""Folders that cannot be a float model: what they hold instead."""

import os
from pathlib import Path

from duqpp.errors import InputError
from duqpp.files import read_json_object

ADAPTER = "adapter_config.json"


def check_folder(folder: Path) -> None:
    """Raise InputError unless this is a folder that has config.json."""
    if not folder.is_dir():
        raise InputError(f"{folder} is neither a model folder nor a .gguf file")
    if not os.path.lexists(folder / "config.json"):
        raise InputError(_without_config(folder))


def check_float_folder(folder: Path) -> None:
    """`check_folder`, and no adapter: with one, what a folder holds depends on its reader."""
    if os.path.lexists(folder / ADAPTER):
        raise InputError(_of_an_adapter(folder))
    check_folder(folder)
    file = folder / "config.json"
    try:
        read_json_object(file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}") from error


def _of_an_adapter(folder: Path) -> str:
    return (
        f"{folder} holds an adapter ({ADAPTER}): merge it into its base model and save that, by "
        "merge_and_unload of peft and then save_pretrained"
    )


def _without_config(folder: Path) -> str:
    """What to say of a folder that has no config.json."""
    if os.path.lexists(folder / ADAPTER):
        return _of_an_adapter(folder)
    if files := sorted(folder.glob("*.gguf")):
        return f"{folder} has no config.json; of GGUF files, give the path of one: {files[0]}"
    return f"{folder} has no config.json, so it is no model of transformers"
