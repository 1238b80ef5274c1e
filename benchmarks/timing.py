"""Seconds that calls take, on the host's clock or by a GPU's events, candidates in turn."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

COLD_BYTES = 1 << 29  # copies that are used in turn, so that none is found in a cache
MOST_CALLS = 64  # in one sample of a GPU's time
SAMPLE_SECONDS = 1e-3  # of one sample: a thousand times what events resolve
WARM_UPS = 3  # calls, untimed: libraries are loaded, kernels chosen, workspaces allocated
PROBE_CALLS = 8  # whose time, in a graph like a sample's, says how many calls make a sample
SLEEP_CYCLES = 200_000  # some 0.1 ms of a GPU, in which Python launches what is to be timed


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: median and quartiles over its turns."""

    median: float
    q25: float
    q75: float
    turns: int

    def microseconds(self, name: str) -> dict[str, float]:
        """The fields of a row: `name`_us, and the quartiles beside it."""
        return {
            f"{name}_us": self.median * 1e6,
            f"{name}_q25_us": self.q25 * 1e6,
            f"{name}_q75_us": self.q75 * 1e6,
        }


class Clock(Protocol):
    """Where the seconds of calls come from."""

    def timers(self, candidates: dict[str, Call]) -> dict[str, Callable[[], float]]:
        """By name, a function that makes the call, ready warmed up, and returns its seconds."""


class HostClock:
    """Times calls that have returned when their work is done: those on the CPU."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def timers(self, candidates: dict[str, Call]) -> dict[str, Callable[[], float]]:
        for call in candidates.values():
            call()
        return {name: self._timer(call) for name, call in candidates.items()}

    def _timer(self, call: Call) -> Callable[[], float]:
        def seconds() -> float:
            start = self._now()
            call()
            return self._now() - start

        return seconds


class CudaClock:
    """Times calls on the current CUDA device, by events around some of them.

    A sample is as many calls as take SAMPLE_SECONDS, captured in a CUDA graph, so that the time
    that Python takes to launch them is not in it; or, with `graph` False, launched one by one.
    Before a sample its L2 is made `cold`, by reading more than it holds, or warm, by the same calls
    untimed; the GPU then sleeps while the sample is launched. Cold calls of one sample find none of
    each other's inputs where these turn through `copies_for` their size.

    Args: cuda, flush: torch.cuda, and what empties the L2; tests give others.
    """

    def __init__(
        self, *, cold: bool, graph: bool = True, cuda: Any = torch.cuda, flush: Call | None = None
    ) -> None:
        self._cold, self._graph, self._cuda = cold, graph, cuda
        self._flush = flush or (_l2_flush() if cold else None)

    def timers(self, candidates: dict[str, Call]) -> dict[str, Callable[[], float]]:
        # One pool: no graph's results are read after it has run, so that all may use one memory.
        pool = self._cuda.graph_pool_handle() if self._graph else None
        return {name: self._timer(call, pool) for name, call in candidates.items()}

    def _timer(self, call: Call, pool: Any) -> Callable[[], float]:
        for _ in range(WARM_UPS):
            call()
        self._cuda.synchronize()
        probe = self._sample(call, PROBE_CALLS, pool)
        probe()  # untimed: the first replay of a graph takes it to the GPU
        each = max(self._seconds(probe) / PROBE_CALLS, 1e-9)
        calls = max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / each)))
        run = self._sample(call, calls, pool)
        before = self._flush if self._cold else run

        def seconds() -> float:
            before()
            return self._seconds(run) / calls

        return seconds

    def _sample(self, call: Call, calls: int, pool: Any) -> Call:
        """What makes `calls` calls: by a graph, which is captured here, or one by one."""

        def sample() -> None:
            for _ in range(calls):
                call()

        if not self._graph:
            return sample
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph, pool=pool):
            sample()
        return graph.replay

    def _seconds(self, run: Call) -> float:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda._sleep(SLEEP_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # milliseconds


def _l2_flush() -> Call:
    """What reads twice as many bytes as the current GPU's L2 holds.

    Written lines would be taken back to memory during the sample, in its time.
    """
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    unrelated = torch.empty(2 * size, dtype=torch.uint8, device="cuda").zero_().view(torch.float32)
    largest = unrelated[:1].clone()  # kept, so that the reads are for something
    return lambda: torch.amax(unrelated, 0, keepdim=True, out=largest)


def clock_for(device: str, *, cold: bool, graph: bool = True) -> Clock:
    """The clock for calls that work on "cpu" or "cuda"."""
    return HostClock() if device == "cpu" else CudaClock(cold=cold, graph=graph)


def alternate(
    candidates: dict[str, Call],
    clock: Clock | None = None,
    *,
    seconds: float,
    turns: int = 5,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Time candidates in turn, one sample each, so that clocks and neighbours trouble all alike.

    Args:
        clock: None is the host's.
        seconds: how long to go on. turns: at least so many, however long they take.
    Returns: timings by name; and by name the median, over turns, of the first candidate's time
        over this one's time in the same turn: how many times as fast as the first it is.
    """
    timers = (clock or HostClock()).timers(candidates)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = now() + seconds
    first = next(iter(candidates))
    while len(times[first]) < turns or now() < end:
        for name, measure in timers.items():
            times[name].append(measure())
    timings, ratios = {}, {}
    for name, values in times.items():
        q25, median, q75 = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, q25, q75, len(values))
        ratios[name] = statistics.median(
            one / other for one, other in zip(times[first], values, strict=True)
        )
    return timings, ratios


def least_seconds(call: Call, clock: Clock, seconds: float) -> float:
    """Of five samples, and of more while `seconds` last."""
    (measure,) = clock.timers({"": call}).values()
    least, turns, end = float("inf"), 0, time.perf_counter() + seconds
    while turns < 5 or time.perf_counter() < end:
        least, turns = min(least, measure()), turns + 1
    return least


def in_turn(copies: Iterable[Any]) -> Callable[[], Any]:
    """A function that returns the copies one after another, for ever."""
    values, position = list(copies), -1

    def following() -> Any:
        nonlocal position
        position = (position + 1) % len(values)
        return values[position]

    return following


def copies_for(size: int) -> int:
    """How many copies of `size` bytes fill COLD_BYTES; at least two, at most MOST_CALLS."""
    return max(2, min(MOST_CALLS, -(-COLD_BYTES // size)))


def copied(make: Callable[[], Any], size: int, *, cold: bool = True) -> Iterator[Any]:
    """Copies of `size` bytes each: as many as are cold when used in turn, or a single warm one."""
    return (make() for _ in range(copies_for(size) if cold else 1))
