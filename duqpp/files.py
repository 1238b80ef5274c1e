"""Paths that a user gives, and small files that come from elsewhere.

Of the files only regular ones are read, and only up to a size.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from duqpp.errors import InputError, refusing

LIMIT = 2**28  # bytes; the largest tokenizer.json and index that are released have some 2**25
_TEXT = (".jinja", ".json", ".model", ".txt")  # files of this kind are read whole


def require_regular(path: Path) -> int:
    """The size in bytes of a regular file, or of one that `path` links to.

    Whatever else can be opened may have no end: a pipe without a writer, a device.

    Raises: OSError.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return status.st_size


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """The contents of a regular file. Raises: OSError; ValueError for more than `limit` bytes."""
    size = require_regular(path)
    if size > limit:
        raise ValueError(f"it has {size} bytes, and at most {limit} are read")
    with open(path, "rb") as file:
        return file.read(limit)


def parse_json_object(content: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises: ValueError, whose message never quotes the content."""
    try:
        values = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("it must hold a JSON object")
    return values


def read_json_object(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """A JSON object from a regular file. Raises: OSError, ValueError as above."""
    return parse_json_object(read_bytes(path, limit))


def check_writable(path: Path, purpose: str) -> None:
    """Raise InputError if no file can be written there, before time is spent on its contents.

    Args: purpose: what cannot be done then, as "plot to" or "write the report to".
    """
    if path.is_dir():
        raise InputError(f"cannot {purpose} {path}: it is a folder")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot {purpose} {path}: {path.parent} is no folder that can be written")


def local_path(name: str) -> Path:
    """The path that a user has written, which may or may not be there.

    Raises: InputError for what can be none, such as "~nobody/model" without a user of that name,
        and for what cannot be looked at.
    """
    if not name or "\0" in name:
        raise InputError(f"no such folder or file: {name!r}")
    with refusing(f"no such folder or file: {name}"):
        path = Path(name).expanduser()
        path.exists()
    return path


def model_path(name: str | Path) -> Path:
    """`local_path` for a model, in whose folder nothing is without an end that a library reads.

    It would wait for a named pipe, and a file of 1 TB that is read whole ends the process.
    """
    folder = local_path(str(name))
    check_utf8(folder)
    with refusing(f"cannot read {folder}"):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            _check_end(file)
    return folder


def check_utf8(path: Path) -> None:
    """Raise InputError for a name that is not UTF-8: safetensors opens no file below it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the name {str(path)!r} is not UTF-8; give it another one") from error


def _check_end(file: Path) -> None:
    """Raise InputError for what is neither a folder nor a file of a bounded size."""
    if not file.exists() or file.is_dir():
        return  # a link to nothing is as good as no file
    try:
        size = require_regular(file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    if file.suffix in _TEXT and size > LIMIT:
        raise InputError(f"cannot read {file}: it has {size} bytes, and at most {LIMIT} are read")
