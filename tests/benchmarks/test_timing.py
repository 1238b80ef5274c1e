"""Timing: samples, their order, cold and warm caches; on a GPU that is played by a list."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import timing
import torch
from timing import (
    COLD_BYTES,
    MOST_CALLS,
    PROBE_CALLS,
    SLEEP_CYCLES,
    WARM_UPS,
    CudaClock,
    HostClock,
    alternate,
    copies_for,
)


class PlayedCuda:
    """What CudaClock uses of torch.cuda: work takes the seconds it says, and is written down.

    launch: seconds more that a call takes where Python makes it, and no graph.
    """

    def __init__(self, launch: float = 0.0) -> None:
        self.now, self.log, self.pools, self._captured = 0.0, [], [], None
        self._launch = launch

    def work(self, name: str, seconds: float):
        def call() -> None:
            if self._captured is not None:
                self._captured.append(run)
                return
            self.now += self._launch
            run()

        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return call

    def Event(self, *, enable_timing: bool):
        assert enable_timing
        event = SimpleNamespace(at=None, synchronize=lambda: None)

        def record() -> None:
            event.at = self.now
            self.log.append("|")

        event.record = record
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def CUDAGraph(self):
        graph = SimpleNamespace(calls=[])
        graph.replay = lambda: [call() for call in graph.calls]
        return graph

    @contextmanager
    def graph(self, graph, *, pool):
        self.pools.append(pool)
        self._captured = graph.calls
        yield
        self._captured = None

    def graph_pool_handle(self):
        return object()

    def synchronize(self) -> None:
        self.log.append("sync")

    def _sleep(self, cycles: int) -> None:
        assert cycles == SLEEP_CYCLES
        self.log.append("sleep")


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(("seconds", "calls"), [(1e-5, MOST_CALLS), (3e-4, 3), (5e-3, 1)])
def test_a_sample_lasts_a_millisecond_and_starts_cold_or_warm(graph, seconds, calls):
    for cold in (True, False):
        cuda = PlayedCuda()
        flush = cuda.work("flush", 1e-4)
        clock = CudaClock(cold=cold, graph=graph, cuda=cuda, flush=flush if cold else None)
        timer = clock.timers({"a": cuda.work("a", seconds)})["a"]
        # Warm-ups, then some calls whose time says how many make a sample.
        probe = ["a"] * PROBE_CALLS
        assert cuda.log == [*["a"] * WARM_UPS, "sync", *probe, "sleep", "|", *probe, "|"]
        for _ in range(2):
            cuda.log.clear()
            assert timer() == pytest.approx(seconds)
            before = ["flush"] if cold else ["a"] * calls
            assert cuda.log == [*before, "sleep", "|", *["a"] * calls, "|"]


def test_launches_by_python_do_not_shorten_a_sample():
    cuda = PlayedCuda(launch=5e-5)
    timer = CudaClock(cold=False, cuda=cuda).timers({"a": cuda.work("a", 1.2e-5)})["a"]
    cuda.log.clear()
    assert timer() == pytest.approx(1.2e-5)
    assert cuda.log.count("a") == 2 * MOST_CALLS  # untimed, to warm the L2, and timed


def test_the_flush_reads_twice_what_the_l2_holds_and_writes_next_to_nothing(monkeypatch):
    empty, amax, read = torch.empty, torch.amax, []

    def on_the_host(size: int, *, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cuda"
        return empty(size, dtype=dtype).fill_(1)

    def watched(values: torch.Tensor, *arguments, out: torch.Tensor, **options) -> torch.Tensor:
        read.append((values.nbytes, out.nbytes, bool(values.any())))
        return amax(values, *arguments, out=out, **options)

    monkeypatch.setattr(torch, "empty", on_the_host)
    monkeypatch.setattr(torch, "amax", watched)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    facts = {3: SimpleNamespace(L2_cache_size=1024)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", facts.__getitem__)
    clock = CudaClock(cold=True, cuda=None)
    assert read == []
    clock._flush()
    clock._flush()
    assert read == [(2048, 4, False)] * 2


def test_the_clock_of_a_device():
    assert isinstance(timing.clock_for("cpu", cold=True), HostClock)
    assert isinstance(timing.clock_for("cuda", cold=False), CudaClock)


def test_candidates_share_one_pool_and_take_turns():
    cuda = PlayedCuda()
    clock = CudaClock(cold=True, cuda=cuda, flush=cuda.work("flush", 0))
    calls = {"a": cuda.work("a", 2e-3), "b": cuda.work("b", 1e-3)}
    times, ratios = alternate(calls, clock, seconds=0, turns=4)
    assert len(set(cuda.pools)) == 1 and len(cuda.pools) == 4
    assert [entry for entry in cuda.log if entry in "ab"][-8:] == ["a", "b"] * 4
    assert times["a"].median == pytest.approx(2e-3) and times["a"].turns == 4
    assert ratios == pytest.approx({"a": 1, "b": 2})


def test_the_host_clock_times_each_call():
    ticks = iter(range(100))
    clock, calls = HostClock(now=lambda: next(ticks)), []
    timers = clock.timers({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"]  # warmed up
    assert timers["b"]() == 1 and calls == ["a", "b", "b"]


class Played:
    """A clock whose samples are given."""

    def __init__(self, **samples: list[float]) -> None:
        self._samples = {name: iter(values) for name, values in samples.items()}

    def timers(self, candidates):
        return {name: self._samples[name].__next__ for name in candidates}


def test_medians_quartiles_and_ratios_within_turns():
    clock = Played(a=[1, 2, 3, 4, 5], b=[1, 1, 1, 8, 1])
    times, ratios = alternate(dict.fromkeys("ab"), clock, seconds=0)
    assert times["a"] == timing.Timing(3, 1.5, 4.5, 5)
    assert times["b"].median == 1
    assert ratios == {"a": 1, "b": 2}  # of 1, 2, 3, 0.5, 5: not the ratio of medians


def test_turns_go_on_while_there_is_time():
    now = iter([0.0, *[0.1] * 8, 9.0])
    clock = Played(a=[1.0] * 100)
    times, _ = alternate({"a": None}, clock, seconds=1, turns=2, now=now.__next__)
    assert times["a"].turns == 10  # two, before the time is asked for, then eight


def test_microseconds_are_named():
    fields = timing.Timing(2e-6, 1e-6, 3e-6, 5).microseconds("gemm")
    assert fields == pytest.approx({"gemm_us": 2, "gemm_q25_us": 1, "gemm_q75_us": 3})


@pytest.mark.parametrize("size", [1, 8192, 1 << 20, (1 << 23) + 1, 1 << 28, 1 << 30])
def test_no_call_of_a_sample_finds_the_inputs_of_another(size):
    copies = copies_for(size)
    assert copies >= MOST_CALLS or copies * size >= COLD_BYTES
    assert copies >= 2
    made = iter(range(1000))
    assert len(list(timing.copied(lambda: next(made), size))) == copies
    assert len(list(timing.copied(lambda: next(made), size, cold=False))) == 1


def test_copies_are_used_in_turn():
    following = timing.in_turn("abc")
    assert "".join(following() for _ in range(7)) == "abcabca"


def test_the_least_of_several_samples():
    assert timing.least_seconds(None, Played(**{"": [5, 3, 4, 2, 6]}), seconds=0) == 2
