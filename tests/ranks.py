"""Ranks without torchrun: forked processes that find each other as it tells its own to."""

import faulthandler
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from duqpp.placement import HOST
from duqpp.placement.ranks import Ranks, joined
from tests.forked import Forked

TIMEOUT = 150.0  # seconds that ranks may take in all, on an old machine that does other work too


class ForkedRanks:
    """Children that each run a function of their index, with the environment that torchrun sets.

    Args: descriptors: of their standard input, output and error, as for `Forked`.
    """

    def __init__(
        self,
        count: int,
        function: Callable[[int], object],
        descriptors: tuple[int | None, ...] = (),
    ) -> None:
        # As torchrun's agent, the parent has the store, which outlives every rank.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._running: dict[int, Forked] = {}
        self.codes: dict[int, int] = {}

        def run(rank: int) -> Callable[[], object]:
            def start() -> object:
                torch.set_num_threads(1)  # a child has none of its parent's threads, and would wait
                gc.freeze()  # what the parent has, such as its stores, is not the child's to end
                faulthandler.dump_traceback_later(TIMEOUT - 5)
                os.environ |= self._environment(rank, count)
                return function(rank)

            return start

        for rank in range(count):
            self._running[rank] = Forked(run(rank), descriptors)

    def _environment(self, rank: int, count: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    def wait(self, seconds: float = TIMEOUT) -> list[int]:
        """Exit codes by rank, negative for a signal; it kills those that are late, and fails."""
        until = time.monotonic() + seconds
        while self._running and time.monotonic() < until:
            for rank, process in list(self._running.items()):
                if (code := process.poll()) is not None:
                    self.codes[rank] = code
                    del self._running[rank]
            time.sleep(0.01)
        late = sorted(self._running)
        for process in self._running.values():
            process.kill()
        assert not late, f"ranks {late} did not end in {seconds} s"
        return [self.codes[rank] for rank in sorted(self.codes)]

    def wait_for(self, rank: int) -> int:
        """The exit code of one rank."""
        return self._running.pop(rank).wait()

    def kill(self, rank: int) -> None:
        """End a rank that runs, or is stopped."""
        self._running.pop(rank).kill()


def together(count: int, function: Callable[[Ranks], Any], folder: Path) -> list[Any]:
    """What a function returns in each rank, all of which must end well."""

    def run(rank: int) -> None:
        with joined(HOST) as ranks:
            torch.save(function(ranks), folder / f"{rank}.pt")

    assert ForkedRanks(count, run).wait() == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
