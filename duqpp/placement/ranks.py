"""Processes that work on one job together: which of them this is, and what they tell each other.

torchrun starts them and says in the environment who is who; torch.distributed carries what they
say. Every rank calls the same operations in the same order, and waits in each for the others.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from duqpp.errors import InputError, RankLostError, first_line

# How long a rank waits for another that says nothing, such as one whose network is down: the end of
# a process is seen at once. One may read a large model from a slow disk before the others have it.
_TIMEOUT = timedelta(minutes=30)
_GRACE = 5.0  # seconds that a rank has to end by itself, once it has been told to
_ENDED = "the job was told to end, as it is when one of its ranks ends"
_FAILURES = "duqpp/failures"  # in the store that all ranks share: how many have failed

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a job. Alone, each operation gives back what it is given.

    index: of this process, from 0. count: of all. local: of this one, among those of its machine.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one writes and prints what is written and printed once."""
        return self.index == 0

    def share(self, items: int) -> slice:
        """Which of so many items are this rank's: runs in the order of ranks, of sizes that differ
        by one at most."""
        bounds = [items * rank // self.count for rank in (self.index, self.index + 1)]
        return slice(*bounds)

    def all(self, value: T) -> list[T]:
        """The value of each rank, in their order. Values are small; they are pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _among_ranks():
            dist.all_gather_object(values, value)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, which it does alone while the others wait for it."""
        return self.all(make() if self.is_first else None)[0]  # type: ignore[return-value]

    def place(self, items: int) -> tuple[int, int]:
        """How many items the ranks before this one have, and all of them, where this one has
        `items`."""
        counts = self.all(items)
        return sum(counts[: self.index]), sum(counts)

    def sum_(self, x: Tensor) -> Tensor:
        """Give x, in place, the sum over ranks, with the same bits on all of them.

        The sum is made in the dtype of x. In float64, what has 24 bits from each rank is the same
        for any number of ranks once it is rounded to float32, but where that is a tie.
        """
        return self._reduced(x, dist.ReduceOp.SUM)

    def max_(self, x: Tensor) -> Tensor:
        """Give x, in place, the largest value of each element over ranks."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """Give x, in place, what it is on the rank `source`."""
        if self.count > 1:
            with _among_ranks():
                dist.broadcast(x, source)
        return x

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        if self.count > 1:
            with _among_ranks():
                dist.all_reduce(x, operation)
        return x

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in their order: [n, ...], any n on each, to [sum of n, ...]."""
        if self.count == 1:
            return rows
        counts = self.all(len(rows))
        flat = rows.reshape(len(rows), rows.shape[1:].numel()).contiguous().view(torch.uint8)
        padded = flat.new_zeros(max(counts), flat.shape[1])
        padded[: len(rows)] = flat
        parts = [torch.empty_like(padded) for _ in counts]
        with _among_ranks():
            dist.all_gather(parts, padded)
        whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return whole.view(rows.dtype).view(sum(counts), *rows.shape[1:])


ALONE = Ranks()


def started_ranks() -> int:
    """How many processes torchrun has started, of which this is one; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_started() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Which of the processes on this machine this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def has_a_say() -> bool:
    """Whether this process says why it fails: of ranks that have not met yet, one a machine; of
    those that have, see `joined`."""
    return local_rank() == 0 or dist.is_initialized()


def device_of_rank(device: torch.device) -> torch.device:
    """The device of a rank that is asked to compute on such a device: of several GPUs its own.

    Raises: InputError for one GPU that all ranks of a machine would be on.
    """
    if device.type != "cuda" or started_ranks() == 1:
        return device
    if device.index is not None:
        raise InputError(f"`device` {device} is one GPU, and each rank has its own: give cuda")
    return torch.device(device.type, local_rank())


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun has started, or ALONE without it, for as long as the context lasts.

    Once one of them fails the others do too: the first to do so raises its error, and the others
    end at once, without a word.

    Args: device: what this rank computes on.
    Raises: InputError where its GPU has no NCCL, or the others cannot be reached.
    """
    if started_ranks() == 1:
        yield ALONE
        return
    if device.type == "cuda" and not dist.is_nccl_available():
        raise InputError(
            f"several GPUs need NCCL, which torch {torch.__version__} here is built without: "
            "install a torch for CUDA, or use `device=cpu`"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _meet("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), local_rank())
    try:
        with _ended_from_outside(store):
            yield ranks
    except BaseException:
        if not _is_first_failure(store):
            os._exit(1)
        raise
    dist.destroy_process_group()


def _meet(backend: str) -> dist.Store:
    """Wait until all ranks are there. Returns: the store that they share."""
    try:
        store, index, count = next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))
        dist.init_process_group(
            backend, store=store, rank=index, world_size=count, timeout=_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the other ranks cannot be reached: {_reason(error)}") from error
    return store


@contextmanager
def _among_ranks() -> Iterator[None]:
    """An error of the connection is the end of another rank."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLostError(f"another rank has ended: {_reason(error)}") from error


def _is_first_failure(store: dist.Store) -> bool:
    """Whether no other rank has failed; where nobody can say, it is."""
    try:
        return bool(store.add(_FAILURES, 1) == 1)
    except RuntimeError:
        return True


@contextmanager
def _ended_from_outside(store: dist.Store) -> Iterator[None]:
    """Let SIGTERM, by which torchrun ends the other ranks once one has ended, be a RankLostError.

    Inside of a library that waits for another rank no signal is answered, Ctrl-C neither: a thread
    then ends the process after a few seconds.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    ended = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=_end_in_time, args=(reader, ended, store), daemon=True)
    thread.start()
    handler = signal.signal(signal.SIGTERM, _raise_lost)
    descriptor = signal.set_wakeup_fd(writer.fileno())
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        writer.close()  # the end of the thread
        thread.join()
        reader.close()


def _raise_lost(number: int, frame: Any) -> None:
    raise RankLostError(_ENDED)


def _end_in_time(signals: socket.socket, ended: threading.Event, store: dist.Store) -> None:
    """End the process a few seconds after a signal to end, unless it has `ended` what it did."""
    while number := signals.recv(1):
        if number[0] in (signal.SIGTERM, signal.SIGINT) and not ended.wait(_GRACE):
            if _is_first_failure(store):
                print(f"error: {_ENDED}; its finished blocks are kept", file=sys.stderr, flush=True)
            os._exit(128 + number[0])


def _reason(error: BaseException) -> str:
    """What torch says, without where in its sources: "[/path/file.cc:123] Connection closed"."""
    return first_line(error).rpartition("] ")[2]
