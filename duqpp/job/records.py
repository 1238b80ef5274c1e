"""JSON files of a job that tell when they, or the files that they speak of, are not its own.

A record has the digest of its other values, the job that it belongs to, and of each file that it
speaks of the digest of the header, which holds the checksums of all tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duqpp.checkpoint.shard import header_bytes, read_json, write_json
from duqpp.errors import CheckpointError

_DIGEST = "digest"


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_record(
    path: Path, job: str, values: Mapping[str, Any], files: Mapping[str, Path] | None = None
) -> None:
    """Write a record durably.

    Args: job: digest of the job's description. files: what the record speaks of, by the name that
        the file has, or will have.
    """
    digests = {name: [header_digest(file)] for name, file in (files or {}).items()}
    _write(path, {**values, "job": job, "files": digests})


def allow_file(path: Path, job: str, name: str, file: Path) -> None:
    """Let a record speak of `file` as well, which is to take the place of `name`."""
    values = read_record(path, job)
    values["files"][name].append(header_digest(file))
    _write(path, values)


def _write(path: Path, values: dict[str, Any]) -> None:
    write_json(path, values | {_DIGEST: digest_of(values)})


def read_record(path: Path, job: str | None = None) -> dict[str, Any]:
    """The values of a record.

    Args: job: whose it must be; None takes that of any.
    Raises: CheckpointError when the file is damaged, altered, or of another job.
    """
    values = read_json(path)
    if values.pop(_DIGEST, None) != digest_of(values):
        raise CheckpointError(f"{path} is altered (its digest differs)")
    if job is not None and values["job"] != job:
        raise CheckpointError(f"{path} is of another job")
    return values


def check_files(path: Path, record: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the files beside a record are those that it speaks of."""
    for name, digests in record["files"].items():
        if header_digest(path.with_name(name)) not in digests:
            raise CheckpointError(f"{path.with_name(name)} is not the file that {path.name} names")


def header_digest(file: Path) -> str:
    """SHA-256 of the header of a safetensors file. Raises: CheckpointError."""
    return hashlib.sha256(header_bytes(file)).hexdigest()
