"""Folders that cannot be a float model: what they hold instead, and files that have no end."""

import os
from pathlib import Path

from duqpp.errors import InputError
from duqpp.files import LIMIT, read_json_object, require_regular

ADAPTER = "adapter_config.json"
_TEXT = (".jinja", ".json", ".model", ".txt")  # files of this kind are read whole


def check_folder(folder: Path) -> None:
    """Raise InputError unless a folder has config.json, and no file of it can keep a reader busy.

    Whatever a library opens in it is then a regular file of a bounded size.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is neither a model folder nor a .gguf file")
    if not os.path.lexists(folder / "config.json"):
        raise InputError(_without_config(folder))
    for file in sorted(folder.iterdir()):
        if not file.exists() or file.is_dir():
            continue  # a link to nothing is as good as no file
        try:
            size = require_regular(file)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
        if file.suffix in _TEXT and size > LIMIT:
            raise InputError(
                f"cannot read {file}: it has {size} bytes, and at most {LIMIT} are read"
            )


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
