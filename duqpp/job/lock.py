"""A folder that a job works in until it is done: one process at a time, and safe on the disk."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from duqpp.errors import InputError

logger = logging.getLogger(__name__)

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of folders: some network file systems


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a folder that is there. The lock goes with the process.

    It is on the folder itself, so that it leaves no file behind, and stays when that is renamed.

    Raises: InputError when another process has the folder locked.
    """
    if find_spec("fcntl") is None:  # Windows
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is working in {folder}: let it finish") from error
        except OSError as error:  # some file systems have no locks
            logger.warning("%s cannot be locked: %s; start no other job there", folder, error)
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Put all that is in a folder on the disk: contents first, then the names of what has them."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            sync_tree(entry)
        else:
            descriptor = os.open(entry, os.O_RDWR)  # Windows syncs no file opened to be read
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_folder(folder)
