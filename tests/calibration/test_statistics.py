"""InputStatistics: the same from any split into batches, and never silent about NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duqpp.calibration.statistics import InputStatistics, draw_sample
from duqpp.errors import InputError
from duqpp.placement.ranks import Ranks
from tests import inputs, oracle
from tests.ranks import together

NAMES = ("samples", "amax", "gram", "tokens")


def collect(parts: list[torch.Tensor], sample: torch.Tensor, channels: int) -> InputStatistics:
    statistics = InputStatistics("linear", channels, sample, second_moment=True)
    for part in parts:
        statistics.update(part)
    return statistics


def rows_of(x: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.tolist()}


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    channels=st.sampled_from([32, 96]),
    keep=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_streaming_equals_one_shot(sizes, channels, keep, seed):
    """Integers, so that the second moment is exact in any order; ties of the peak included."""
    x = inputs.small_integers(sum(sizes), channels, seed)
    sample = draw_sample(len(x), keep, seed)
    once, streamed = (collect(list(p), sample, channels) for p in (x.split(len(x)), x.split(sizes)))
    assert once.tokens == streamed.tokens == len(x)
    oracle.assert_same(streamed.amax, x.abs().amax(0), "amax")
    oracle.assert_same(once.amax, streamed.amax, "amax in one go")
    oracle.assert_same(streamed.take_gram() + 0, x.T @ x + 0, "gram")
    oracle.assert_same(once.take_gram() + 0, x.T @ x + 0, "gram in one go")
    for statistics in (once, streamed):
        samples = statistics.samples()
        oracle.assert_same(samples[: len(sample)], x[sample], "random rows, in order")
        peaks = samples[len(sample) :]
        assert rows_of(peaks) <= rows_of(x) | {(0.0,) * channels}
        oracle.assert_same(peaks.abs().amax(0), x.abs().amax(0), "each channel's peak row is there")
        assert len(peaks) <= channels


def test_the_peak_rows_are_the_rows_themselves():
    """The row that holds channel c's peak comes whole, also when a later batch outdoes it."""
    x = inputs.gaussian(200, 64, seed=0)
    x[[3, 77, 150], [5, 5, 40]] = torch.tensor([50.0, -60.0, 70.0])
    statistics = collect(list(x.split(13)), torch.tensor([], dtype=torch.int64), 64)
    samples = rows_of(statistics.samples())
    holders = x.abs().argmax(0)
    assert samples == rows_of(x[holders.unique()])
    assert tuple(x[77].tolist()) in samples
    assert tuple(x[3].tolist()) not in samples or 3 in holders.tolist()


def test_under_any_rescaling_of_channels_the_peak_is_among_the_samples():
    x = inputs.outliers(300, 64, seed=1)
    samples = collect(list(x.split(50)), draw_sample(300, 20, 0), 64).samples()
    for seed in range(20):
        scales = torch.exp(torch.randn(64, generator=inputs.generator(seed)) * 3)
        oracle.assert_same((samples * scales).abs().max(), (x * scales).abs().max(), "peak")


def test_merged_over_ranks_they_are_those_of_one_process(tmp_path):
    """Two ranks hold a peak; a channel is silent everywhere, another on the first rank alone."""
    x = inputs.outliers(90, 64, seed=1)
    x[:, 7] = 0
    x[:30, 9] = 0
    x[[20, 70], 11] = torch.tensor([1e4, -1e4])
    sizes, sample = [30, 20, 40], draw_sample(90, 25, seed=2)

    def merged(ranks: Ranks) -> tuple[torch.Tensor, ...]:
        before = sum(sizes[: ranks.index])
        own = InputStatistics("x", 64, sample, second_moment=True, before=before)
        for part in x.split(sizes)[ranks.index].split(10):
            own.update(part)
        own.merge(ranks)
        return own.samples(), own.amax, own.take_gram(ranks), torch.tensor(own.tokens)

    alone = collect(list(x.split(10)), sample, 64)
    expected = alone.samples(), alone.amax, alone.take_gram(), torch.tensor(90)
    for found in together(3, merged, tmp_path):
        for name, own, one in zip(NAMES, found, expected, strict=True):
            oracle.assert_same(own, one, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(12, 32), (3, 4, 32), (1, 12, 32)])
def test_dtypes_and_leading_dimensions(dtype, shape):
    x = inputs.small_integers(12, 32, seed=2)
    statistics = collect([x.to(dtype).view(shape)], torch.arange(0, 12, 3), 32)
    oracle.assert_same(statistics.amax, x.abs().amax(0), "amax")
    gram = statistics.take_gram()
    oracle.assert_same(gram, x.T @ x, "gram")
    oracle.assert_same(statistics.samples()[:4], x[::3], "samples")
    assert statistics.samples().dtype == gram.dtype == torch.float32


def test_samples_survive_the_batch_they_came_from():
    x = inputs.gaussian(10, 32, seed=3)
    batch = x.clone()
    statistics = collect([batch], torch.arange(10), 32)
    batch.zero_()
    oracle.assert_same(statistics.samples()[:10], x, "samples")
    oracle.assert_same(statistics.samples()[10:].abs().amax(0), x.abs().amax(0), "peaks")


def test_the_second_moment_is_only_taken_on_request():
    statistics = InputStatistics("linear", 32, torch.arange(1), second_moment=False)
    statistics.update(torch.ones(2, 32))
    with pytest.raises(ValueError, match="second moments are not kept"):
        statistics.take_gram()
    assert statistics.amax.tolist() == [1.0] * 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 31), (6, 7)])
def test_nan_and_infinity_name_the_linear(value, place):
    x = torch.ones(7, 32)
    x[place] = value
    statistics = InputStatistics(
        "model.layers.3.mlp.down_proj", 32, torch.arange(2), second_moment=True
    )
    with pytest.raises(InputError) as error:
        statistics.update(x)
    assert str(error.value) == (
        "the input of model.layers.3.mlp.down_proj has NaN or infinite values in calibration"
    )


def test_draw_sample_is_seeded_ascending_and_without_repetition():
    sample = draw_sample(1000, 64, seed=5)
    oracle.assert_same(sample, draw_sample(1000, 64, seed=5), "same seed")
    assert (sample != draw_sample(1000, 64, seed=6)).any()
    assert sample.dtype == torch.int64
    assert (sample.diff() > 0).all()
    assert 0 <= sample[0] <= sample[-1] < 1000
    assert sample.float().mean() == pytest.approx(500, abs=150)
    assert draw_sample(3, 64, seed=0).tolist() == [0, 1, 2]
