"""What the methods share: the rows that a report is of."""

import pytest
import torch

from duqpp.methods.group import REPORT_ROWS, report_rows


@pytest.mark.parametrize("sampled", [1024, 1000, REPORT_ROWS])
def test_a_report_is_of_all_of_the_text(sampled):
    """Rows are sampled in the order of the text: each quarter of them has as many in the report."""
    rows = report_rows(sampled)
    assert len(rows.unique()) == len(rows) == REPORT_ROWS
    assert (int(rows[0]), int(rows[-1])) == (0, sampled - 1)
    quarters = torch.bucketize(rows, torch.tensor([1, 2, 3]) * sampled // 4, right=True)
    assert quarters.bincount().tolist() == pytest.approx([REPORT_ROWS / 4] * 4, abs=1)


@pytest.mark.parametrize("sampled", [1, 2, 100])
def test_a_short_text_is_reported_whole(sampled):
    assert report_rows(sampled).tolist() == list(range(sampled))
