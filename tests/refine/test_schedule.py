"""EarlyStopping: what it keeps, and when it has seen enough."""

import math

import pytest

from duqpp.refine.schedule import EarlyStopping


@pytest.mark.parametrize(
    ("losses", "checks", "least", "best"),
    [
        ([1.0, 0.9, 0.8, 0.7], 3, 0.7, 3),  # each better
        ([1.0, 1.1, 1.2, 0.1], 2, 1.0, None),  # two worse than the start
        ([1.0, 1.1, 0.9, 0.95, 0.9, 0.1], 4, 0.9, 2),  # as good is not better
        ([1.0, math.nan, 0.9, math.nan, math.inf], 4, 0.9, 2),  # a loss that is no number
    ],
)
def test_what_is_kept_and_when_it_ends(losses, checks, least, best):
    seen = []

    def loss() -> float:
        seen.append(losses[len(seen)])
        return seen[-1]

    stopping = EarlyStopping(loss, lambda: len(seen) - 1)
    made = 0
    while made < len(losses) - 1:
        made += 1
        if not stopping.check():
            break
    assert made == checks
    assert (stopping.first, stopping.least, stopping.best) == (losses[0], least, best)
