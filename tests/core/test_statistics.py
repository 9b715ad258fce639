from itertools import product

import numpy as np
import pytest
from scipy import stats

from aligngym.core.statistics import (
    bootstrap_interval,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    steps_to_threshold,
    wilson_interval,
)


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


class TestInterquartileMean:
    def test_examples_computed_by_hand(self):
        assert interquartile_mean([5, 8, 4, 38, 8, 6, 9, 7, 7, 3, 1, 6]) == 6.5  # the mean of 5, 6, 6, 7, 7, 8
        assert interquartile_mean(np.arange(10)) == 4.5  # two of ten left out at either end
        assert interquartile_mean([[0, 1], [2, 1000]]) == 1.5  # runs and tasks are pooled

    def test_it_reduces_one_axis(self):
        scores = np.random.default_rng(0).normal(size=(9, 4))
        expected = [np.sort(column)[2:7].mean() for column in scores.T]
        np.testing.assert_allclose(interquartile_mean(scores, axis=0), expected)


class TestBootstrapInterval:
    scores = np.array([[0.0, 10.0], [1.0, 30.0], [5.0, 80.0]])

    def enumerated(self, statistic, confidence):
        """The interval from all 27 · 27 ways to redraw three runs within each of two tasks."""
        draws = list(product(range(3), repeat=3))
        values = [statistic(np.r_[self.scores[list(a), 0], self.scores[list(b), 1]]) for a in draws for b in draws]
        return np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")

    @pytest.mark.parametrize("statistic", [np.mean, interquartile_mean])
    @pytest.mark.parametrize("confidence", [0.6, 0.9])
    def test_it_redraws_runs_within_each_task(self, statistic, confidence):
        interval = bootstrap_interval(self.scores, statistic, confidence, resamples=30_000)
        assert interval == pytest.approx(self.enumerated(statistic, confidence), abs=0.2)

    def test_the_interval_of_a_mean_has_the_closed_form(self):
        """A redrawn mean of n has variance (n − 1)/n · s²/n."""
        sample = np.random.default_rng(1).normal(size=400)
        half = stats.norm.ppf(0.975) * sample.std() / 20
        interval = bootstrap_interval(sample, np.mean, resamples=20_000)
        assert interval == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.03 * half)

    def test_it_covers_as_often_as_it_says(self):
        """Ten runs redrawn vary by √(9/10) of what they should: 93.7 % for 95 %, within three standard errors."""
        generator, tasks = np.random.default_rng(2), np.arange(10)
        holds = []
        for seed in range(400):
            low, high = bootstrap_interval(tasks + generator.normal(size=(10, 10)), resamples=300, seed=seed)
            holds.append(low <= 4.5 <= high)  # the middle of a symmetric distribution
        expected = 2 * stats.norm.cdf(stats.norm.ppf(0.975) * np.sqrt(0.9)) - 1
        assert np.mean(holds) == pytest.approx(expected, abs=3 * np.sqrt(expected * (1 - expected) / 400) + 0.01)

    def test_every_point_gets_the_interval_it_would_get_alone(self):
        curves = np.random.default_rng(3).normal(size=(6, 2, 4)).cumsum(axis=2)
        low, high = bootstrap_interval(curves, seed=5)
        alone = np.array([bootstrap_interval(curves[:, :, point], seed=5) for point in range(4)])
        np.testing.assert_allclose([low, high], alone.T)

    def test_a_seed_repeats_it_and_another_does_not(self):
        assert bootstrap_interval(self.scores, seed=3) == bootstrap_interval(self.scores, seed=3)
        sample = np.random.default_rng(0).normal(size=50)
        assert bootstrap_interval(sample, seed=3) != bootstrap_interval(sample, seed=4)

    @pytest.mark.parametrize(
        ("scores", "options", "message"),
        [
            ([1.0], {}, r"scores of shape \(1,\).*two or more runs"),
            (np.zeros((3, 0)), {}, r"shape \(3, 0\)"),
            ([[1.0, 2.0], [np.nan, 3.0]], {}, r"scores\[1, 0\] is nan"),
            ([1.0, 2.0], {"confidence": 95}, "confidence in .0, 1.*not 95"),
            ([1.0, 2.0], {"resamples": 0}, "resamples ≥ 1"),
        ],
    )
    def test_bad_input_is_named(self, scores, options, message):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(scores, **options)


class TestProbabilityOfImprovement:
    def test_the_tortoises_and_the_hares(self):
        """The race with which textbooks explain U: T H H H H H T T T T T H, so U = 11 of 36 for the tortoises."""
        ahead = {animal: [12 - place for place, who in enumerate("THHHHHTTTTTH") if who == animal] for animal in "TH"}
        assert probability_of_improvement(ahead["T"], ahead["H"]).value == pytest.approx(11 / 36)
        assert probability_of_improvement(ahead["H"], ahead["T"]).value == pytest.approx(25 / 36)

    def test_it_is_the_mean_of_scipys_u_with_ties_and_unequal_runs(self):
        generator = np.random.default_rng(0)
        x, y = generator.integers(0, 5, size=(7, 3)), generator.integers(0, 5, size=(4, 3))
        expected = stats.mannwhitneyu(x, y, axis=0).statistic.mean() / 28
        found = probability_of_improvement(x, y)
        assert found.value == pytest.approx(expected)
        assert found.low < found.value < found.high

    def test_its_interval_covers(self):
        """With X ~ N(1, 1) and Y ~ N(0, 1) on two tasks, P(X > Y) = Φ(1/√2)."""
        generator, truth = np.random.default_rng(1), stats.norm.cdf(np.sqrt(0.5))
        holds = []
        for seed in range(300):
            x, y = 1 + generator.normal(size=(20, 2)), generator.normal(size=(20, 2))
            found = probability_of_improvement(x, y, resamples=300, seed=seed)
            holds.append(found.low <= truth <= found.high)
        assert np.mean(holds) == pytest.approx(0.94, abs=3 * np.sqrt(0.06 * 0.94 / 300))

    def test_other_tasks_are_refused(self):
        with pytest.raises(ValueError, match="x has 2 tasks and y has 3"):
            probability_of_improvement(np.zeros((4, 2)), np.zeros((4, 3)))
        with pytest.raises(ValueError, match="y of shape"):
            probability_of_improvement(np.zeros((4, 2)), np.zeros((1, 2)))


class TestPerformanceProfile:
    scores = np.array([[0.0, 0.5], [0.25, 1.0]])

    def test_it_is_the_share_above(self):
        np.testing.assert_array_equal(performance_profile(self.scores, [-1, 0, 0.25, 0.6, 1]), [1, 0.75, 0.5, 0.25, 0])

    def test_the_area_below_it_is_the_mean(self):
        scores = np.random.default_rng(0).uniform(size=(6, 5))
        grid = (np.arange(20_000) + 0.5) / 20_000
        assert performance_profile(scores, grid).mean() == pytest.approx(scores.mean(), abs=1e-4)

    def test_its_band_is_a_bootstrap_of_shares(self):
        above = np.random.default_rng(0).uniform(size=(10, 8, 1)) > np.array([0.2, 0.5, 2.0])
        low, high = bootstrap_interval(above, np.mean)
        share = above.mean(axis=(0, 1))
        assert (low <= share).all()
        assert (share <= high).all()
        assert low[2] == high[2] == 0


class TestStepsToThreshold:
    def test_the_first_point_at_or_above_it(self):
        curves = [[0.0, 2.0, 1.0, 3.0], [0.0, 0.5, 0.6, 0.7], [1.0, 0.0, 0.0, 0.0]]
        np.testing.assert_array_equal(steps_to_threshold(curves, [10, 20, 30, 40], 1.0), [20, np.inf, 10])
        assert steps_to_threshold([0.0, 1.0, 2.0], [1, 5, 9], 1.5) == 9

    def test_runs_that_never_get_there_may_be_a_quarter(self):
        """The interquartile mean leaves them out."""
        curves = np.eye(8)
        curves[6:] = 0
        assert interquartile_mean(steps_to_threshold(curves, np.arange(1, 9), 1.0)) == 4.5

    @pytest.mark.parametrize(
        ("curve", "points", "message"),
        [
            ([1.0, 2.0], [1, 2, 3], r"shape \(2,\) with \(3,\) points"),
            ([1.0, 2.0], [2, 2], "larger than the one before"),
            ([], [], r"shape \(0,\)"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, curve, points, message):
        with pytest.raises(ValueError, match=message):
            steps_to_threshold(curve, points, 1.0)
