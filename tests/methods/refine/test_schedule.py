"""EarlyStopping: what it keeps, and when it has seen enough."""

import math

import pytest

from duqpp.methods.refine.schedule import EarlyStopping


@pytest.mark.parametrize(
    ("losses", "checks", "least", "best"),
    [
        ([1.0, 0.9, 0.8, 0.7], 3, 0.7, 3),  # each better
        ([1.0, 1.2, 1.3, 0.1], 2, 1.0, None),  # two clearly worse than the start
        ([1.0, 1.2, 0.9, 1.2, 1.0, 0.1], 4, 0.9, 2),  # worse than the least, not than the start
        ([1.0, 1.09, 1.09, 1.0, 1.05, 0.9], 5, 0.9, 5),  # a little worse, for long; as good
        ([1.0, 1.2, 1.05, 1.2, 1.05, 1.2], 5, 1.0, None),  # never two in a row
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
