"""What the methods share: the rows that a report is of, and wide weights in parts."""

import pytest
import torch

from duqpp.calibration.silent import silent_channels
from duqpp.config import QuantizeConfig
from duqpp.format import ScaleRule
from duqpp.methods import group as module
from duqpp.methods.group import (
    REPORT_ROWS,
    Drift,
    GroupPlan,
    RoundedWeight,
    group_outputs,
    plan_weights,
    quantize_weights,
    report_group,
    report_rows,
)
from duqpp.models.family import LinearGroup
from duqpp.rotation import BlockRotation, InputTransform
from tests import inputs


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


def group_plan() -> tuple[GroupPlan, torch.Tensor]:
    """Two linears of 24 and 40 rows, with a transform; and 200 inputs, channel 7 of them silent."""
    weights = {"a": inputs.gaussian(24, 96, seed=1), "b": inputs.gaussian(40, 96, seed=2)}
    plan = plan_weights("block", LinearGroup("group", ("a", "b")), weights)
    matrix = inputs.gaussian(96, 32, seed=3).view(3, 32, 32).double()
    plan.transform = InputTransform(BlockRotation.rounded(matrix))
    x = inputs.outliers(200, 96, seed=4).float()
    x[:, 7] = 0.0
    plan.silent = silent_channels(x.abs().amax(0))
    assert plan.silent.tolist() == [7]
    return plan, x


def rounded_weights(gptq: bool) -> dict[str, RoundedWeight]:
    plan, x = group_plan()
    rotated = plan.transform.apply(x)
    drift = inputs.gaussian(200, 96, seed=5) * 0.1
    sums = Drift(drift.T @ rotated / 100, share=0.5)
    hessian = rotated.T @ rotated / 100
    options = QuantizeConfig(method="duqpp").build_method().options
    return quantize_weights(plan, options, *((hessian, sums) if gptq else (None,)))


@pytest.mark.parametrize("gptq", [False, True])
@pytest.mark.parametrize("at_a_time", [1, 96 * 7, 96 * 24])
def test_wide_weights_in_parts_are_as_in_one_piece(gptq, at_a_time, monkeypatch):
    """But for rounding: the sums of a product may go by how many rows it has."""
    expected = rounded_weights(gptq)
    monkeypatch.setattr(module, "WEIGHTS_AT_A_TIME", at_a_time)
    found = rounded_weights(gptq)
    for name, weight in expected.items():
        assert found[name].exact.shape == weight.exact.shape
        assert torch.allclose(found[name].exact, weight.exact, rtol=1e-6, atol=1e-6)
        close = torch.isclose(found[name].latent, weight.latent, rtol=1e-3, atol=1e-3)
        assert close.float().mean() > 0.95  # GPTQ goes on from a code that differs
        same = found[name].quantized.codes == weight.quantized.codes
        assert same.float().mean() > 0.95
        assert (found[name].latent is found[name].exact) is not gptq


@pytest.mark.parametrize("observed", [False, True])
def test_a_report_in_parts_is_as_in_one_piece(observed, monkeypatch):
    plan, x = group_plan()
    weights, outputs = rounded_weights(gptq=True), group_outputs(plan, x)
    assert torch.allclose(outputs[:, 24:], x @ plan.weights["b"].T, rtol=1e-5, atol=1e-4)
    seen = (x, torch.arange(len(x)), outputs) if observed else (None, None, None)
    whole = report_group(plan, weights, *seen, ScaleRule.EVEN).to_dict()
    monkeypatch.setattr(module, "WEIGHTS_AT_A_TIME", 96 * 7)
    parts = report_group(plan, weights, *seen, ScaleRule.EVEN).to_dict()
    assert 0 < whole["weight_error"] < 0.3 and (whole["output_error"] is not None) is observed
    for name, value in whole.items():
        is_sum = isinstance(value, float)
        assert parts[name] == (pytest.approx(value, rel=1e-5) if is_sum else value), name
