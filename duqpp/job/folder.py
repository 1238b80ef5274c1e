"""Where a result is made until it is whole, how it gets its name, and whose job is in a folder."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from duqpp.checkpoint.layout import quantization_of
from duqpp.checkpoint.shard import read_json
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, InputError
from duqpp.job.lock import locked, sync_folder, sync_tree
from duqpp.job.records import digest_of, read_record
from duqpp.models.source import Source, fingerprint
from duqpp.version import __version__

logger = logging.getLogger(__name__)

JOB_FILE = "duqpp-job.json"
# Of the provenance in config.json, once all is written: the digest of the job that has made it.
JOB_FIELD = "job"
_CONFIG = "config.json"
_FIRST_FILES = (".write-test", JOB_FILE + ".partial")  # what is in a job's folder before the job is
_INSIDE = ".partial"
_UNSEEN = frozenset({"lost+found"})  # what an empty file system has in its root


@dataclass(frozen=True)
class Output:
    """Where a result is to be, and the folder in which it is made.

    out: absent, or an empty folder. work: where `out` is absent, `OUT.partial` beside it, which is
    renamed in the end. A folder that is there may be a mount point, a link, the current folder, or
    in a place that nobody may write to: it stays, `work` is `.partial` inside, and the files are
    moved up in the end, config.json last, without which nothing loads them.
    """

    out: Path
    work: Path

    @classmethod
    def at(cls, out: str | Path) -> "Output":
        """For `out`, and for the job that an earlier call has left there.

        Raises: InputError for what is no path.
        """
        out = Path(out)
        with _writing_to(out):
            str(out).encode()  # a ValueError here: tokenizers read no path that is not UTF-8
            if out.name in ("", ".."):  # "/", "." and "..", which have no name to add to
                return cls(out, out / _INSIDE)
            beside = out.with_name(out.name + _INSIDE)
            is_inside = out.is_dir() and not beside.exists()
            return cls(out, out / _INSIDE if is_inside else beside)

    @property
    def is_inside(self) -> bool:
        """Whether the result is made inside of `out`."""
        return self.work.parent == self.out and self.work.name == _INSIDE

    def check(self, *, resume: bool) -> None:
        """Raise InputError unless a result may be made here, or go on to be made."""
        with _writing_to(self.out):
            self._check_free()
            if self.work.is_dir():
                with locked(self.work):  # nobody else works in it, so that the advice is sound
                    pass
            if self.work.exists() and not (resume and self.work.is_dir()):
                raise InputError(
                    f"{self.work} holds an unfinished job: continue it with `resume=True`, or "
                    "remove it"
                )

    def _check_free(self) -> None:
        """Raise InputError unless `out` is absent, or as good as an empty folder."""
        out = self.out
        if not out.is_dir():
            if out.is_symlink() or out.exists():
                raise InputError(f"output {out} exists and is not an empty folder")
            return
        if self.is_inside and (out / _CONFIG).exists():  # whole, but for the removal of this folder
            with suppress(OSError):
                self.work.rmdir()  # which removes none that has something in it
        expected = _UNSEEN | ({_INSIDE} if self.is_inside else frozenset())
        if {entry.name for entry in out.iterdir()} <= expected or is_whole(self.work):
            return
        raise InputError(f"output {out} exists and is not an empty folder")

    def make(self) -> None:
        """Make the folder `work`, if it is not there. Raises: InputError if it is not writable."""
        with _writing_to(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
            probe = self.work / _FIRST_FILES[0]
            probe.touch()
            probe.unlink(missing_ok=True)  # another process that begins may have removed it

    def check_space(self, needed: int) -> None:
        """Raise InputError when the disk has not the bytes that are needed."""
        disk = shutil.disk_usage(self.work)
        if disk.total and disk.free < needed:  # some network file systems do not say
            raise InputError(
                f"the checkpoint needs {needed / 1e9:.2f} GB, and the disk of {self.work} has "
                f"{disk.free / 1e9:.2f} GB left; free some, or choose another output folder"
            )

    def finish(self, leftovers: Iterable[Path] = ()) -> None:
        """Make a whole `work` the output: on the disk first, and by a name only then.

        Once the job's file is gone, only this is left to do, by whoever resumes the job.

        Args: leftovers: files in `work` that were only needed to resume it.
        Raises: InputError when it cannot be renamed.
        """
        try:
            sync_tree(self.work)
            _remove(self.work / JOB_FILE)
            sync_folder(self.work)
            for leftover in leftovers:
                _remove(leftover)
            sync_folder(self.work)
            self._move_up() if self.is_inside else self._rename()
        except OSError as error:
            raise InputError(
                f"cannot rename {self.work} to {self.out}: {error.strerror}; when it can be, "
                "continue with `resume=True`"
            ) from error
        try:
            sync_folder(self.out.parent)
        except OSError as error:  # such as a folder that only its owner may read
            logger.warning("%s cannot be synced: %s", self.out.parent, error.strerror)

    def _rename(self) -> None:
        if self.out.exists():
            self.out.rmdir()  # empty, as `check` has seen
        os.replace(self.work, self.out)

    def _move_up(self) -> None:
        last = self.work / _CONFIG
        for file in sorted(self.work.iterdir()):
            if file != last:
                os.replace(file, self.out / file.name)
        sync_folder(self.out)
        os.replace(last, self.out / _CONFIG)
        sync_folder(self.out)
        self.work.rmdir()


@contextmanager
def _writing_to(path: Path) -> Iterator[None]:
    """Errors of the file system as InputError; a ValueError is a name that no file can have."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {path}: {reason}") from error


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:  # the checkpoint is whole, and nothing reads this
        logger.warning("%s is no longer needed, but stays: %s", file, error.strerror)


def is_whole(work: Path) -> bool:
    """Whether all of a job is done in its folder, but for the name: see `Output.finish`."""
    return not (work / JOB_FILE).exists() and _maker(work) is not None


def describe_job(source: Source, config: QuantizeConfig, tokens: Tensor | None) -> dict[str, Any]:
    """What makes two jobs the same: model, calibration data, configuration and version."""
    data = hashlib.sha256()
    if tokens is not None:
        data.update(f"{list(tokens.shape)}".encode())
        data.update(tokens.numpy().tobytes())
    job = {
        "model": fingerprint(source),
        "calibration": data.hexdigest(),
        "configuration": config.to_dict(),
        "version": __version__,
    }
    values: dict[str, Any] = json.loads(json.dumps(job))  # as they are read again
    return values


def check_same_job(work: Path, job: dict[str, Any]) -> None:
    """Raise InputError when a folder is another job's, CheckpointError when it does not say.

    Where the job's own file is damaged or lost, the records of its blocks say whose they are.
    """
    path = work / JOB_FILE
    if not path.exists() and {file.name for file in work.iterdir()} <= set(_FIRST_FILES):
        return  # stopped before it had begun
    digest = digest_of(job)
    if is_whole(work):
        earlier = {key: None for key in job} if _maker(work) != digest else job
    else:
        earlier = _earlier_job(work, digest) or job
    if differing := differing_parts(earlier, job):
        raise InputError(
            f"{work} is the unfinished job of another {' and '.join(differing)}; "
            "remove it, or choose another output folder"
        )


def _earlier_job(work: Path, digest: str) -> dict[str, Any] | None:
    """The job of a folder; None where its file does not say, and its records say `digest`."""
    path = work / JOB_FILE
    try:
        return read_record(path)
    except CheckpointError as error:
        if digest in _recorded_jobs(work):
            return None
        if not path.exists():
            return {"model": None}
        raise CheckpointError(f"{error}; remove {work}, or choose another output folder") from error


def _recorded_jobs(work: Path) -> set[str]:
    """The jobs of all records in a folder that are as they were written."""
    jobs = set()
    for path in work.glob("model-*.json"):
        with suppress(CheckpointError):
            jobs.add(read_record(path)["job"])
    return jobs


def _maker(work: Path) -> str | None:
    """The digest of the job that made a checkpoint; None of one that is not whole."""
    if not (work / _CONFIG).exists():
        return None
    provenance = quantization_of(read_json(work / _CONFIG)).get("provenance")
    return provenance.get(JOB_FIELD) if isinstance(provenance, dict) else None


def differing_parts(earlier: dict[str, Any], job: dict[str, Any]) -> list[str]:
    """What another job has that this one has not, for people."""
    differing = [key for key in job if earlier.get(key) != job[key]]
    if "configuration" in differing and isinstance(earlier.get("configuration"), dict):
        before, now = earlier["configuration"], job["configuration"]
        options = ", ".join(name for name in now if before.get(name) != now[name])
        differing[differing.index("configuration")] = f"configuration ({options})"
    return differing
