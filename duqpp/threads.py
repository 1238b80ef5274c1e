"""Threads for loops of small tensor operations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch's CPU operations on one thread meanwhile.

    In a loop of operations on some 10,000 elements each, waking a second thread costs several times
    what it gives: measured 0.04 s against 1.2 s for a 256-step rotation search on two busy cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
