"""Timing: samples, their order, cold and warm caches; on a GPU that is played by a list."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import timing
import torch
from timing import COLD_BYTES, MOST_CALLS, WARM_UPS, CudaClock, HostClock, alternate, copies_for


class PlayedCuda:
    """What CudaClock uses of torch.cuda: work takes the seconds it says, and is written down."""

    def __init__(self) -> None:
        self.now, self.log, self.pools, self._captured = 0.0, [], [], None

    def work(self, name: str, seconds: float):
        def call() -> None:
            if self._captured is not None:
                self._captured.append(call)
                return
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


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(("seconds", "calls"), [(1e-5, MOST_CALLS), (3e-4, 3), (5e-3, 1)])
def test_a_sample_lasts_a_millisecond_and_starts_cold_or_warm(graph, seconds, calls):
    for cold in (True, False):
        cuda = PlayedCuda()
        flush = cuda.work("flush", 1e-4)
        clock = CudaClock(cold=cold, graph=graph, cuda=cuda, flush=flush if cold else None)
        timer = clock.timers({"a": cuda.work("a", seconds)})["a"]
        # Warm-ups, then one call whose time says how many make a sample.
        assert cuda.log == [*["a"] * WARM_UPS, "sync", "|", "a", "|"]
        for _ in range(2):
            cuda.log.clear()
            assert timer() == pytest.approx(seconds)
            before = ["flush"] if cold else ["a"] * calls
            assert cuda.log == [*before, "|", *["a"] * calls, "|"]


def test_the_flush_writes_twice_what_the_l2_holds(monkeypatch):
    empty, made = torch.empty, []

    def on_the_host(size: int, *, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cuda"
        made.append(empty(size, dtype=dtype).fill_(1))
        return made[-1]

    monkeypatch.setattr(torch, "empty", on_the_host)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    facts = {3: SimpleNamespace(L2_cache_size=1024)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", facts.__getitem__)
    CudaClock(cold=True, cuda=None)._flush()
    assert made[0].nbytes == 2048 and not made[0].any()


def test_the_clock_of_a_device():
    assert isinstance(timing.clock_for("cpu", cold=True), HostClock)
    assert isinstance(timing.clock_for("cuda", cold=False), CudaClock)


def test_candidates_share_one_pool_and_take_turns():
    cuda = PlayedCuda()
    clock = CudaClock(cold=True, cuda=cuda, flush=cuda.work("flush", 0))
    calls = {"a": cuda.work("a", 2e-3), "b": cuda.work("b", 1e-3)}
    times, ratios = alternate(calls, clock, seconds=0, turns=4)
    assert len(set(cuda.pools)) == 1 and len(cuda.pools) == 2
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
