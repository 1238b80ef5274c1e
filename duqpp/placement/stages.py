"""Where the time of a job goes: seconds by stage and decoder block.

Code says which stage of a job it is by ``with stage("gptq"):``, or by ``@stage("gptq")`` above a
function; where no job is profiled that does nothing.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch

from duqpp.placement import HOST

# opening: the model's configuration, its tokenizer, its embedding. fingerprint: of its weights.
# tokens: calibration text to sequences, and those to what enters the first block. reading: weights
# of a block, from its source or its shard. float pass, quantized pass: a block runs on calibration
# sequences, as it is in the float model, or with groups that are quantized already. statistics: of
# a group's input. smoothing, transform: what they are made for. fold: the transform into weights.
# hessian, drift, factor, gptq: GPTQ's sums over tokens, its target, the factorization, the rounding
# column by column. rounding: of weights to nearest. packing: a linear for its kernels. report:
# errors of a group. refine, distill: training. writing: shards. finishing: what is beside them, and
# the manifest over all. other: what is none of these.
Stage = Literal[
    "opening",
    "fingerprint",
    "tokens",
    "reading",
    "float pass",
    "quantized pass",
    "statistics",
    "smoothing",
    "transform",
    "fold",
    "hessian",
    "drift",
    "factor",
    "gptq",
    "rounding",
    "packing",
    "report",
    "refine",
    "distill",
    "writing",
    "finishing",
    "other",
]
_now = time.perf_counter


class Profile:
    """Seconds by stage and block of one job, from `profiled`.

    A stage inside another one is taken off that: over the stages of the job's own thread the
    seconds add up to those of the job. Stages of other threads, which go on beside them, are
    counted by themselves.

    Args: device: where blocks compute; it is waited for where a stage of the job's thread begins
        and ends.
    """

    def __init__(self, device: torch.device = HOST) -> None:
        self._device, self._thread, self._lock = device, threading.get_ident(), threading.Lock()
        # By what is beside the job's thread or not, and block, None outside of all: by stage.
        self._seconds: dict[tuple[bool, int | None], dict[str, float]] = defaultdict(
            lambda: defaultdict(float)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: seconds, in all; by_stage, and beside where there were other threads, the
        most first; and in blocks the same for each block that was worked on.
        """
        with self._lock:
            seconds = {key: dict(stages) for key, stages in self._seconds.items()}
        numbers = sorted({block for _, block in seconds if block is not None})
        own = (stages for (beside, _), stages in seconds.items() if not beside)
        return {
            "seconds": sum(sum(stages.values()) for stages in own),
            **_summed([(beside, stages) for (beside, _), stages in seconds.items()]),
            "blocks": [
                {
                    "block": number,
                    **_summed([(b, s) for (b, block), s in seconds.items() if block == number]),
                }
                for number in numbers
            ],
        }

    def _wait(self) -> None:
        """Let the device do what it was told, so that the clock counts it."""
        is_own = threading.get_ident() == self._thread
        if is_own and self._device.type != HOST.type:
            torch.accelerator.synchronize(self._device)

    def _add(self, name: Stage, block: int | None, seconds: float) -> None:
        beside = threading.get_ident() != self._thread
        with self._lock:
            self._seconds[beside, block][name] += seconds


def _summed(parts: list[tuple[bool, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Seconds by stage of the job's thread, and of those beside it if they did anything."""
    sums: dict[bool, dict[str, float]] = {False: defaultdict(float), True: defaultdict(float)}
    for beside, stages in parts:
        for name, seconds in stages.items():
            sums[beside][name] += seconds
    by_stage, by_others = (
        dict(sorted(sums[beside].items(), key=lambda item: -item[1])) for beside in (False, True)
    )
    return {"by_stage": by_stage} | ({"beside": by_others} if by_others else {})


@dataclass
class _Open:
    """The stage that is open: inside: seconds of the stages that were inside of it."""

    profile: Profile
    block: int | None
    thread: int
    inside: float = 0.0


_OPEN: ContextVar[_Open | None] = ContextVar("stage", default=None)


@contextmanager
def profiled(device: torch.device = HOST) -> Iterator[Profile]:
    """Record the stages of what runs meanwhile; what is in none of them is "other".

    Another thread takes part if it runs in a copy of the context: ``copy_context().run``.

    Args: device: as of `Profile`.
    """
    profile = Profile(device)
    token = _OPEN.set(_Open(profile, None, threading.get_ident()))
    try:
        with stage("other"):
            yield profile
    finally:
        _OPEN.reset(token)


@contextmanager
def stage(name: Stage, block: int | None = None) -> Iterator[None]:
    """Count the time until this ends as that of a stage.

    Not around a `yield`: what its generator is used for would be counted with it.

    Args: block: number of the decoder block; None is that of the stage around this one.
    """
    outer = _OPEN.get()
    if outer is None:
        yield
        return
    profile, thread = outer.profile, threading.get_ident()
    own = _Open(profile, outer.block if block is None else block, thread)
    profile._wait()
    token, began = _OPEN.set(own), _now()
    try:
        yield
    finally:
        profile._wait()
        seconds = _now() - began
        _OPEN.reset(token)
        profile._add(name, own.block, seconds - own.inside)
        if outer.thread == thread:
            outer.inside += seconds
