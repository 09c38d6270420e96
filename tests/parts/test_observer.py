import numpy as np
import pytest
import torch

from efficientdnns.errors import DataError
from efficientdnns.parts.observer import (
    Entropy,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    best_entropy_bins,
    expected_squared_error,
    make_observer,
)
from efficientdnns.parts.quantizer import QuantSpec, fake_quantize, scale_and_zero_point

NAMES = ("min-max", "moving-average", "percentile", "mse", "entropy")


def normal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_every_observer_gives_a_range_inside_the_extremes(name):
    observer = make_observer(name, QuantSpec())
    x = normal(5000) + 0.5
    assert observer(x) is x
    low, high = observer.range()
    assert x.min() <= low < 0 < high <= x.max()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_seen_is_an_error(name):
    observer = make_observer(name, QuantSpec())
    observer(torch.empty(0))
    with pytest.raises(DataError, match="saw no tensor"):
        observer.range()


@pytest.mark.parametrize("name", NAMES)
def test_constants(name):
    for value in (0.0, 3.0, -2.0):
        observer = make_observer(name, QuantSpec())
        observer(torch.full((100,), value))
        low, high = observer.range()
        assert low <= high
        scale, zero = scale_and_zero_point(low, high, QuantSpec())
        assert fake_quantize(torch.tensor([value]), scale, zero, QuantSpec()).item() == pytest.approx(value, rel=0.01)


def test_values_that_are_not_finite_are_an_error():
    observer = MinMax()
    observer(torch.tensor([1.0, float("inf")]))
    with pytest.raises(DataError, match="not finite"):
        observer.range()


def test_min_max_gives_the_extremes():
    observer = MinMax()
    x = normal(1000)
    for part in x.split(77):
        observer(part)
    assert observer.range() == (x.min(), x.max())


def test_moving_average_starts_at_the_first_batch():
    observer = MovingAverage(0.1)
    observer(torch.tensor([-1.0, 2.0]))
    assert [float(v) for v in observer.range()] == [-1, 2]
    observer(torch.tensor([-2.0, 4.0]))
    assert [float(v) for v in observer.range()] == pytest.approx([-1.1, 2.2])


def test_percentile_ignores_one_outlier_in_a_hundred_thousand():
    x = torch.cat([normal(100_000), torch.tensor([1000.0])])
    observer = Percentile(99.99)
    observer(x)
    low, high = observer.range()
    expected = np.percentile(x.numpy(), [0.01, 99.99])
    assert [float(low), float(high)] == pytest.approx(expected.tolist(), abs=0.1)


def test_histogram_does_not_depend_on_the_batches():
    x = torch.cat([normal(3000), normal(3000, 1) * 10, torch.tensor([500.0, -3.0])])
    results = []
    for size in (1, 100, 6002):
        part = x[:500] if size == 1 else x
        observer = Histogram(256)
        for batch in part.split(size):
            observer(batch)
        whole = Histogram(256)
        whole(part)
        assert torch.equal(observer.counts, whole.counts)
        assert torch.equal(observer.place, whole.place)
        results.append(observer.counts.sum())
    assert results == [500, 6002, 6002]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_histogram_uses_at_least_half_of_its_bins(scale):
    observer = Histogram(1024)
    observer(torch.linspace(-0.3, 1, 100_000) * scale)
    assert 512 <= (observer.counts > 0).sum() <= 1024


def test_expected_error_is_the_error_of_quantizing():
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 - 1
    edges, counts = np.array([-1.0, 2.0]), np.array([200_000.0])
    for bits, low, high in ((8, -1.0, 2.0), (4, -0.5, 1.2), (3, 0.0, 1.0)):
        spec = QuantSpec(bits)
        scale, zero = scale_and_zero_point(torch.tensor(low), torch.tensor(high), spec)
        actual = (fake_quantize(x.float(), scale, zero, spec) - x).square().sum()
        assert expected_squared_error(edges, counts, low, high, spec) == pytest.approx(float(actual), rel=0.01)


def test_least_squared_error_clips_outliers_and_beats_the_full_range():
    x = torch.cat([normal(100_000), torch.full((5,), 60.0)])
    spec = QuantSpec(4)
    observer, full = MeanSquaredError(spec), MinMax()
    observer(x)
    full(x)

    def error(o):
        return (fake_quantize(x, *scale_and_zero_point(*o.range(), spec), spec) - x)[:100_000].square().mean()

    assert observer.range()[1] < 30
    assert error(observer) < error(full) / 4


def test_entropy_chooses_far_more_than_the_least_bins_for_a_gaussian():
    counts, _ = np.histogram(normal(1_000_000).abs().numpy(), bins=2048)
    assert best_entropy_bins(counts.astype(float), 128) > 1000


def test_entropy_clips_a_far_outlier():
    x = torch.cat([normal(200_000), torch.tensor([80.0])])
    observer = Entropy(QuantSpec())
    observer(x)
    low, high = observer.range()
    assert high < 40
    assert -low <= 5.5


def test_observers_keep_their_statistics_in_the_state():
    observer, again = Percentile(99), Percentile(99)
    observer(normal(1000))
    again.load_state_dict(observer.state_dict())
    assert again.range() == observer.range()
