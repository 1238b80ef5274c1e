"""The folder of a quantization that is not done, and what tells one job from another."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from duqpp.checkpoint.shard import read_json
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, InputError
from duqpp.job.lock import locked, sync_folder
from duqpp.models.source import Source, fingerprint
from duqpp.version import __version__

logger = logging.getLogger(__name__)

JOB_FILE = "duqpp-job.json"
_FIRST_FILES = (".write-test", JOB_FILE + ".partial")  # what is in a job's folder before the job is


def check_output(out: Path) -> None:
    """Raise InputError unless `out` is absent, or an empty folder."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise InputError(f"output {out} exists and is not an empty folder")


def check_folders(out: Path, work: Path, resume: bool) -> None:
    """Raise InputError unless a job for `out` may begin, or go on, in `work`."""
    check_output(out)
    if work.is_dir():
        with locked(work):  # nobody else works in it, so that the advice below is sound
            pass
    if work.exists() and not (resume and work.is_dir()):
        raise InputError(
            f"{work} holds an unfinished job: continue it with `resume=True`, or remove it"
        )


def make_folder(work: Path) -> None:
    """Make the folder, if it is not there. Raises: InputError when it cannot be written to."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        probe = work / _FIRST_FILES[0]
        probe.touch()
        probe.unlink(missing_ok=True)  # another process that begins may have removed it
    except OSError as error:
        raise InputError(f"cannot write to {work}: {error.strerror}") from error


def describe_job(source: Source, config: QuantizeConfig, tokens: Tensor | None) -> dict[str, Any]:
    """What makes two jobs the same: model, calibration data, configuration and version."""
    data = hashlib.sha256()
    if tokens is not None:
        data.update(f"{list(tokens.shape)}".encode())
        data.update(tokens.numpy().tobytes())
    return {
        "model": fingerprint(source),
        "calibration": data.hexdigest(),
        "configuration": config.to_dict(),
        "version": __version__,
    }


def check_same_job(work: Path, job: dict[str, Any]) -> None:
    """Raise InputError when a folder is another job's, CheckpointError when it does not say."""
    path = work / JOB_FILE
    if not path.exists() and {file.name for file in work.iterdir()} <= set(_FIRST_FILES):
        return  # stopped before it had begun
    try:
        earlier = read_json(path) if path.exists() else {}
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove {work}, or choose another output folder") from error
    job = json.loads(json.dumps(job))
    differing = [key for key in job if earlier.get(key) != job[key]]
    if "configuration" in differing and isinstance(earlier.get("configuration"), dict):
        before, now = earlier["configuration"], job["configuration"]
        options = ", ".join(name for name in now if before.get(name) != now[name])
        differing[differing.index("configuration")] = f"configuration ({options})"
    if differing:
        raise InputError(
            f"{work} is the unfinished job of another {' and '.join(differing)}; "
            "remove it, or choose another output folder"
        )


def give_name(work: Path, out: Path, leftovers: Iterable[str]) -> None:
    """Make the finished folder the output, and remove what was only needed to resume it.

    Args: leftovers: patterns of files to remove, besides the job's own.
    Raises: InputError when it cannot be renamed.
    """
    try:
        sync_folder(work)
        if out.exists():
            out.rmdir()  # empty, as `check_output` has seen
        os.replace(work, out)
    except OSError as error:
        raise InputError(
            f"cannot rename {work} to {out}: {error.strerror}; when it can be, continue with "
            "`resume=True`"
        ) from error
    # Only now: until it has its name, the job can be resumed wherever it stops.
    for leftover in [file for pattern in (*leftovers, JOB_FILE) for file in out.glob(pattern)]:
        try:
            leftover.unlink()
        except OSError as error:  # the checkpoint is whole, and nothing reads this
            logger.warning("%s is no longer needed, but stays: %s", leftover, error.strerror)
