"""What is multiplied in benchmarks, and that a wrong result would be noticed before it is timed."""

import pytest
import torch
from operands import Weight, latest, quantized_rows

from duqpp.format import quantize
from tests import inputs

K, N = 256, 512


@pytest.fixture(scope="module")
def weight() -> Weight:
    return Weight(N, K, "reference", inputs.generator(1))


def test_every_form_is_the_product(weight):
    x = weight.activation(16)
    calls = weight.calls(x, cold=True, fp8=True)
    assert list(calls)[:3] == ["bf16", "duqpp", "gemm"]
    assert ("fp8" in calls) == (weight.fp8_absent == "")
    weight.check(x, calls)
    assert all(call().shape == (16, N) for call in calls.values())


@pytest.mark.parametrize("name", ["bf16", "duqpp", "gemm", "fp8"])
def test_a_wrong_result_is_noticed(name, weight):
    x = weight.activation(16)
    calls = weight.calls(x, cold=False, fp8=True)
    if name not in calls:
        pytest.skip(weight.fp8_absent)
    wrong = calls[name]().clone()
    wrong[-1, : N // 8] = 0  # rows are looked at from the first to the last
    calls[name] = lambda: wrong
    with pytest.raises(AssertionError, match=f"{name}: relative error"):
        weight.check(x, calls)


def test_nan_is_noticed(weight):
    x = weight.activation(1)
    with pytest.raises(AssertionError, match="bf16"):
        weight.check(x, {"bf16": lambda: torch.full((1, N), torch.nan)})


def test_cold_operands_turn_and_warm_ones_stay(weight):
    x = weight.activation(2)
    for make in (weight.weights, lambda *, cold: weight.activations(x, cold=cold)):
        cold, warm = make(cold=True), make(cold=False)
        assert cold().codes.data_ptr() != cold().codes.data_ptr()
        assert warm().codes.data_ptr() == warm().codes.data_ptr()
        assert torch.equal(cold().codes, warm().codes)


def test_chunks_change_nothing(monkeypatch):
    monkeypatch.setattr("operands.CHUNK", 3)
    values = torch.randn(8, 64)
    one, two = quantized_rows(values), quantize(values, rule="even")
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scales, two.scales)


def test_the_latest_alone_is_kept():
    made = []
    get = latest(lambda *key: made.append(key) or object())
    one = get(1, 2)
    assert get(1, 2) is one and made == [(1, 2)]
    get(3, 4)
    assert get(1, 2) is not one and made == [(1, 2), (3, 4), (1, 2)]
