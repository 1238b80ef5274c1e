"""What a comparison keeps on disk, so that an interrupted one goes on where it was."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from duqpp.calibration.text import CalibrationText
from duqpp.checkpoint.shard import read_json, write_json
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, InputError
from duqpp.evaluation.scores import Run
from duqpp.files import check_utf8
from duqpp.job.lock import locked
from duqpp.models.source import Source, fingerprint
from duqpp.version import __version__

COMPARISON_FILE = "comparison.json"


@dataclass(frozen=True)
class Finished:
    """A quantization that is evaluated. runs: by evaluation text."""

    runs: dict[str, Run]
    weight_bytes: int
    weights: int


class ComparisonFolder:
    """One JSON file for each finished quantization, and the model of the unfinished one.

    A run is found again by its configuration, seed included, and its calibration text, so that
    methods and seeds may be added to a comparison. The rest must be the same: see `comparison_job`.

    A folder in which no quantization was begun is as good as empty.

    A context manager: until it ends, no other process may work in the folder.

    Args: job: from `comparison_job`. calibration: what the methods read.
    Raises: InputError when the folder has something in it and resume is not asked for, or it is of
        another comparison, or no comparison's, or another process works in it.
    """

    def __init__(
        self,
        folder: Path,
        job: dict[str, Any],
        calibration: CalibrationText,
        *,
        resume: bool = False,
    ) -> None:
        self._folder = folder
        self._calibration = hashlib.sha256(calibration.identity.encode()).hexdigest()
        file = folder / COMPARISON_FILE
        check_utf8(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder))
                if {entry.name for entry in folder.iterdir()} - {file.name}:
                    _check_same(folder, file, json.loads(json.dumps(job)), resume)
                write_json(file, job)
            except OSError as error:
                raise InputError(f"cannot write to {folder}: {error.strerror}") from error
            self._lock = stack.pop_all()

    def __enter__(self) -> "ComparisonFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def model(self, config: QuantizeConfig) -> Path:
        """Where the quantized model is to be, until it is evaluated."""
        return self._folder / f"model-{self._name(config)}"

    def finished(self, config: QuantizeConfig) -> Finished | None:
        """What was recorded, if this run was finished."""
        for file in sorted(self._folder.glob(f"run-{config.method}-*.json")):
            # A file is found by what it says, not by its name alone: an earlier version may have
            # written a default in another way, and that is no other configuration.
            written, result = _read_run(file)
            if QuantizeConfig.from_dict(written) == config and file == self._file(config, written):
                return result
        return None

    def quantized(self, config: QuantizeConfig, model: Path) -> float | None:
        """Seconds that the model of an unfinished run took, if it was quantized to its end."""
        file = self._quantized_file(config)
        if file.exists() and model.exists():
            return float(read_json(file)["seconds"])
        shutil.rmtree(self.model(config), ignore_errors=True)  # whole, but without its time
        return None

    def record_quantized(self, config: QuantizeConfig, seconds: float) -> None:
        """Keep that the model of a run is whole."""
        write_json(self._quantized_file(config), {"seconds": seconds})

    def record(self, config: QuantizeConfig, result: Finished) -> None:
        """Keep the result of a finished run, and no longer its model."""
        write_json(self._file(config), {"configuration": config.to_dict(), **asdict(result)})
        self._quantized_file(config).unlink(missing_ok=True)
        shutil.rmtree(self.model(config), ignore_errors=True)

    def _quantized_file(self, config: QuantizeConfig) -> Path:
        return self._folder / f"quantized-{self._name(config)}.json"

    def _file(self, config: QuantizeConfig, written: dict[str, Any] | None = None) -> Path:
        return self._folder / f"run-{self._name(config, written)}.json"

    def _name(self, config: QuantizeConfig, written: dict[str, Any] | None = None) -> str:
        """Of the run: its method, for people, and what tells it from every other.

        Args: written: the configuration as a file has it; None is as it is written today.
        """
        own = [written or config.to_dict(), self._calibration if config.needs.inputs else ""]
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        return f"{config.method}-{digest[:16]}"


def comparison_job(
    source: Source, tokens: Mapping[str, Tensor], settings: dict[str, Any]
) -> dict[str, Any]:
    """What makes two comparisons the same, but for their methods, seeds and calibration."""
    texts = {
        text: hashlib.sha256(own.numpy().tobytes()).hexdigest() for text, own in tokens.items()
    }
    return {
        "model": fingerprint(source),
        "texts": texts,
        "windows": settings,
        "version": __version__,
    }


def _read_run(file: Path) -> tuple[dict[str, Any], Finished]:
    """The configuration of a finished run, as it was written, and its result."""
    values = read_json(file)
    try:
        runs = {text: Run(**run) for text, run in values["runs"].items()}
        result = Finished(runs, int(values["weight_bytes"]), int(values["weights"]))
        return dict(values["configuration"]), result
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is no result of a comparison; remove it") from error


def _check_same(folder: Path, file: Path, job: dict[str, Any], resume: bool) -> None:
    if not file.is_file():
        raise InputError(f"{folder} is not empty, and holds no comparison: choose another folder")
    if not resume:
        raise InputError(
            f"{folder} holds a comparison: continue it with `resume=True`, or choose another folder"
        )
    earlier = read_json(file)
    differing = [name for name in job if earlier.get(name) != job[name]]
    if differing:
        raise InputError(
            f"{folder} is the comparison of another {' and '.join(differing)}; choose another one"
        )
