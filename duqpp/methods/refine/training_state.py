"""The state of a training of a whole model on disk, which any number of ranks can go on from."""

from pathlib import Path

import torch
from torch import Tensor

from duqpp.checkpoint.shard import read_shard, write_shard
from duqpp.format import MXFP4Tensor
from duqpp.methods.refine.latent_model import Codes, LatentModel
from duqpp.methods.refine.schedule import MOMENTS, EarlyStopping, LatentOptimizer
from duqpp.placement import HOST
from duqpp.placement.ranks import Ranks


class TrainingState:
    """A file for each block, which hold whole tensors, and one that says that they are complete.

    That one is written last, and only then are the files of an earlier state removed.

    Args:
        file: the last one; the others are beside it.
        latents, optimizer, stopping: what is saved, and changed by `restore`.
        ranks: each writes some of the files.
    """

    def __init__(
        self,
        file: Path,
        latents: LatentModel,
        optimizer: LatentOptimizer,
        stopping: EarlyStopping[Codes],
        ranks: Ranks,
    ) -> None:
        self._file, self._latents, self._optimizer = file, latents, optimizer
        self._stopping, self._ranks = stopping, ranks

    def save(self) -> None:
        """Write the state, in the place of an earlier one."""
        ranks, steps = self._ranks, self._optimizer.done
        for index in self._latents.rows:
            is_own = index % ranks.count == ranks.index
            tensors: dict[str, Tensor] = {}
            for name, part in self._parts(index).items():
                whole = ranks.gather(part)
                if is_own:
                    tensors[name] = whole.to(HOST)
            if is_own:
                write_shard(self._of_block(steps, index), tensors)
        ranks.all(None)  # every rank has written its files
        ranks.first(self._complete)

    def restore(self) -> None:
        """Go on from the state that is there, if it is whole. Raises: CheckpointError."""
        saved = self._ranks.first(self._completed)
        if saved is None:
            return
        stopping, optimizer = self._stopping, self._optimizer
        optimizer.done, stopping.stale, stopping.least = saved
        best: Codes = {}
        for index, rows in self._latents.rows.items():
            best[index] = {}
            tensors = read_shard(self._of_block(optimizer.done, index))
            parts = {name: self._latents.own(tensor) for name, tensor in tensors.items()}
            for name, own in rows.items():
                own.data.copy_(parts[f"latent.{name}"])
                optimizer.restore(own, {m: parts[f"{m}.{name}"] for m in MOMENTS})
                if f"codes.{name}" in parts:
                    pair = (parts[f"{part}.{name}"] for part in ("codes", "scales"))
                    codes = (part.to(own.device, copy=True) for part in pair)
                    best[index][name] = MXFP4Tensor(*codes)
        stopping.best = best if any(best.values()) else None

    def _parts(self, index: int) -> dict[str, Tensor]:
        """What is saved of a block, by part and linear: this rank's rows."""
        parts: dict[str, Tensor] = {}
        for name, own in self._latents.rows[index].items():
            moments = self._optimizer.moments(own)
            parts |= {f"latent.{name}": own.detach()}
            parts |= {f"{moment}.{name}": value for moment, value in moments.items()}
            if self._stopping.best is not None:
                best = self._stopping.best[index][name]
                parts |= {f"codes.{name}": best.codes, f"scales.{name}": best.scales}
        return parts

    def _complete(self) -> None:
        """Say that the files of a state are there, and remove others."""
        counts = torch.tensor(
            [self._optimizer.done, self._stopping.stale], dtype=torch.int32, device=HOST
        )
        least = torch.tensor([self._stopping.least], dtype=torch.float64, device=HOST)
        write_shard(self._file, {"steps, stale": counts, "least": least.view(torch.uint8)})
        kept = {self._of_block(self._optimizer.done, index) for index in self._latents.rows}
        for file in self._file.parent.glob(f"{self._file.stem}-*{self._file.suffix}"):
            if file not in kept:
                file.unlink()

    def _completed(self) -> tuple[int, int, float] | None:
        """Steps, stale and least of the state that is there, None without a whole one."""
        if not self._file.exists():
            return None
        tensors = read_shard(self._file)
        steps, stale = tensors["steps, stale"].tolist()
        if not all(self._of_block(steps, index).exists() for index in self._latents.rows):
            return None
        return steps, stale, float(tensors["least"].clone().view(torch.float64))

    def _of_block(self, steps: int, index: int) -> Path:
        name = f"{self._file.stem}-{steps:06d}-{index:05d}{self._file.suffix}"
        return self._file.with_name(name)
