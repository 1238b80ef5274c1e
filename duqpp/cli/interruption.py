"""Ctrl-C, whatever becomes of it on its way through the libraries."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ResumableError(Exception):
    """Ctrl-C, and the job can be resumed."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let every error that follows a Ctrl-C be a KeyboardInterrupt.

    Python raises it wherever it is, and C code that calls Python may put an error of its own in its
    place: torch, which a safetensors file is read with, a ValueError in a quarter of the cases.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # only the main thread may have a handler; and who ignores Ctrl-C goes on to
        return
    pressed = threading.Event()

    def note(number: int, frame: Any) -> None:
        pressed.set()
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if pressed.is_set() and not isinstance(error, ResumableError):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
