"""Folders that cannot be a float model: what they hold instead."""

import os
from pathlib import Path

from duqpp.errors import InputError


def check_float_folder(folder: Path) -> None:
    """Raise InputError unless a folder has config.json, and no adapter.

    With one, what a folder holds depends on its reader.
    """
    if os.path.lexists(folder / "adapter_config.json"):
        raise InputError(
            f"{folder} holds an adapter: merge it into its base model, and save that "
            "(`merge_and_unload` of peft, then `save_pretrained`)"
        )
    if not os.path.lexists(folder / "config.json"):
        raise InputError(_without_config(folder))


def _without_config(folder: Path) -> str:
    """What to say of a folder that has no config.json."""
    if files := sorted(folder.glob("*.gguf")):
        return f"{folder} has no config.json; of GGUF files, give the path of one: {files[0]}"
    return f"{folder} has no config.json, so it is no model of transformers"
