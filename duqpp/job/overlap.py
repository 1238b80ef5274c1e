"""Reading ahead and writing behind: files are read and written while a block is worked on."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

import torch

from duqpp.torch_state import single_thread

Key = TypeVar("Key")
T = TypeVar("T")


def ahead(read: Callable[[Key], T], keys: Iterable[Key]) -> Generator[T, None, None]:
    """read(key) for each key, in order, each made by another thread while the last one is used.

    One is read ahead, and not more. An error of `read` comes where its result would have.
    """
    with _another_thread() as submit:
        coming: deque[Future[T]] = deque()
        for key in keys:
            coming.append(submit(read, key))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


@contextmanager
def behind() -> Iterator[Callable[..., None]]:
    """Gives ``later(call, *arguments)``: another thread makes the call while this one goes on.

    One call is made at a time, in order: `later` waits for the one before it. The error of a call
    comes out of the next `later`, or of the end of the context, which waits for the last call. If
    the context ends by an error of its own, the last call is made all the same.
    """
    with _another_thread() as submit:
        calls: deque[Future[None]] = deque()

        def later(call: Callable[..., None], *arguments: Any) -> None:
            while calls:
                calls.popleft().result()
            calls.append(submit(call, *arguments))

        yield later
        while calls:
            calls.popleft().result()


@contextmanager
def _another_thread() -> Iterator[Callable[..., Future[Any]]]:
    """One thread, in which torch has no settings of the caller's, and one thread of its own.

    A thread takes torch's number of threads when it first asks for it, and keeps it. With more than
    one, it would start a second team of them beside the one that computes.
    """
    with ThreadPoolExecutor(1) as executor:
        with single_thread():
            executor.submit(torch.get_num_threads).result()
        yield lambda call, *arguments: executor.submit(copy_context().run, call, *arguments)
