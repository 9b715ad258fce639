import pytest
from scipy import stats

from aligngym.core.statistics import wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_intervals(successes, trials, low, high):
    """R. Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_scipy_agrees(confidence):
    for successes, trials in [(0, 7), (3, 7), (7, 7), (400, 1000)]:
        expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
        assert wilson_interval(successes, trials, confidence) == pytest.approx((expected.low, expected.high))


def test_coverage_is_near_what_is_claimed():
    """Averaged over p, the exact probability that the interval holds p is 95 % within half a per cent."""
    trials, coverage = 30, []
    intervals = [wilson_interval(k, trials) for k in range(trials + 1)]
    for step in range(1, 200):
        p = step / 200
        coverage.append(sum(stats.binom.pmf(k, trials, p) for k, (lo, hi) in enumerate(intervals) if lo <= p <= hi))
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (4, 3), (-1, 3)])
def test_what_is_no_proportion_is_refused(successes, trials):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(successes, trials)
