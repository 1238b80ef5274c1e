"""What ranks must have in common: the job, the versions, the kind of device, and the disk."""

import socket
import time
from pathlib import Path
from typing import Any

import torch

from duqpp.errors import CheckpointError, InputError
from duqpp.job.folder import JOB_FILE, differing_parts
from duqpp.job.records import read_record
from duqpp.placement import Placement
from duqpp.placement.devices import kind_of
from duqpp.placement.ranks import Ranks

_PATIENCE = 60.0  # seconds until a network file system shows what another machine has written


def check_agreement(job: dict[str, Any], placement: Placement) -> None:
    """Raise InputError, on every rank, unless all have the same job, versions and kind of device.

    Each computes transforms from the same sums, so that other processors or another torch could
    make them differ in the last bits.
    """
    own = job | {"torch": torch.__version__, "device": kind_of(placement.compute)}
    descriptions = placement.ranks.all(own)
    for rank, other in enumerate(descriptions):
        if differing := differing_parts(descriptions[0], other):
            raise InputError(
                f"rank {rank} has another {' and '.join(differing)} than rank 0: start every rank "
                "with the same arguments, files and versions, on machines of one kind"
            )


def check_shared(work: Path, digest: str, ranks: Ranks) -> None:
    """Raise InputError where a rank does not see the job's file, which the first one has written.

    Args: digest: of the job.
    """
    until = time.monotonic() + _PATIENCE
    while not _is_there(work, digest):
        if time.monotonic() > until:
            raise InputError(
                f"rank {ranks.index} on {socket.gethostname()} does not see {work}, which rank 0 "
                "has made: the output must be in a folder that all machines share, by the same path"
            )
        time.sleep(0.1)
    ranks.all(None)


def _is_there(work: Path, digest: str) -> bool:
    try:
        return bool(read_record(work / JOB_FILE, digest) is not None)
    except CheckpointError:
        return False
