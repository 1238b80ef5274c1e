"""Another thread reads ahead and writes behind: in order, one at a time, and no error is lost."""

import threading
from contextlib import closing

import pytest
import torch

from duqpp.job.overlap import ahead, behind


class BrokenError(Exception):
    """What a read or a write raises here."""


@pytest.fixture
def steps():
    """Lets the other thread go on only step by step: it waits until it is `allowed` one more."""
    return threading.Semaphore(0)


def test_ahead_gives_what_was_read_in_order():
    for keys in ([], [3], [3, 1, 2]):
        with closing(ahead(lambda key: 10 * key, keys)) as read:
            assert list(read) == [10 * key for key in keys]


def test_one_is_read_while_the_last_one_is_used_and_not_more():
    begun, here = [], threading.get_ident()

    def read(key: int) -> int:
        begun.append((key, threading.get_ident() == here))
        if key == used + 1:
            is_ahead.set()
        return key

    used, is_ahead = -1, threading.Event()
    with closing(ahead(read, range(5))) as values:
        for value in values:
            used = value
            if used < 4:
                assert is_ahead.wait(30)  # without being asked for
            assert len(begun) <= used + 2
            is_ahead.clear()
    assert begun == [(key, False) for key in range(5)]


def test_what_reading_raises_comes_where_its_result_would_have():
    def read(key: int) -> int:
        if key == 2:
            raise BrokenError
        return key

    got = []
    with closing(ahead(read, range(4))) as values, pytest.raises(BrokenError):
        got.extend(values)
    assert got == [0, 1]


def test_behind_goes_on_while_one_call_is_made(steps):
    made = []

    def write(number: int) -> None:
        steps.acquire()
        made.append(number)

    with behind() as later:
        later(write, 0)  # and does not wait for it
        assert made == []
        steps.release()
        later(write, 1)  # but for the one before
        assert made == [0]
        steps.release()
    assert made == [0, 1]


def broken() -> None:
    raise BrokenError


def test_what_writing_raises_comes_at_the_next_write_or_at_the_end():
    made = []
    with pytest.raises(BrokenError), behind() as later:
        later(broken)
        later(made.append, 1)
    assert made == []
    with pytest.raises(BrokenError), behind() as later:
        later(broken)


def test_the_last_write_is_made_where_the_work_fails_and_its_error_is_not_in_the_way(steps):
    made = []
    for write in (made.append, lambda _: broken()):
        with pytest.raises(KeyboardInterrupt), behind() as later:
            later(lambda write=write: (steps.acquire(timeout=0.2), write(1)))
            raise KeyboardInterrupt
    assert made == [1]


def test_the_other_thread_computes_by_itself_and_has_torch_as_it_is():
    """Not as the caller has set it for its own thread, whose number of threads stays."""

    def state(_: int) -> tuple:
        return (
            torch.get_num_threads(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.get_default_device(),
        )

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(), torch.device("meta"):
            (found,) = ahead(state, [0])
        assert found == (1, False, True, torch.device("cpu"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
