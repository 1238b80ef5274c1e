"""How much memory a call takes."""

import itertools
from collections.abc import Callable

import torch


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes of tensors, torch's own copies included, that a call has at once at most."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(changes))
