import math

import numpy as np
import pytest
from scipy import stats

from aligngym.agents.gradient_descent import GradientDescent, LeastSquares, MeanLoss
from aligngym.agents.noise import GaussianNoise, StateDependentNoise, StudentNoise, UniformNoise
from aligngym.agents.stochastic_approximation import IncrementalMean, RobbinsMonro, StochasticApproximation
from aligngym.core.schedules import Constant, Geometric, Power

#: Independent runs at once, as entries of one estimate; an empirical variance is then chi-squared.
RUNS = 20_000


def within_chi_squared(sample, variance):
    """Whether the mean square of Gaussian runs is that of the variance, wrong with probability 1e-6."""
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], sample.size) / sample.size
    return low < np.mean(sample**2) / variance < high


def test_the_root_of_a_bounded_function_is_found_step_by_step():
    # S. Zhao, Mathematical Foundations of Reinforcement Learning, section 6.2.1: g(w) = tanh(w − 1), w_1 = 3,
    # a_k = 1/k, no noise.
    agent = RobbinsMonro(lambda w: np.tanh(w - 1), initial=3.0, solution=1.0).learn(2000, progress=False)
    second = 3 - math.tanh(2)
    third = second - math.tanh(second - 1) / 2
    np.testing.assert_allclose(agent.trajectory[:3], [3, second, third], rtol=1e-15)
    distances = np.abs(agent.trajectory - 1)
    assert (np.diff(distances) < 0).all()
    assert agent.evaluate()["error"] == distances[-1] < 1e-3


def test_with_noise_it_converges_and_without_an_upper_bound_of_the_slope_it_may_explode():
    # The slope of g(w) = w³ − 5 has no upper bound. At the root it is c = 3 · 5^(2/3), so that near it the error has
    # variance σ² / (k (2c − 1)) with α ~ 1/k.
    def make(initial, **options):
        cubic = {"function": lambda w: w**3 - 5, "noise": GaussianNoise(1.0), "solution": 5 ** (1 / 3), **options}
        return RobbinsMonro(initial=initial, step_size=Power(1 / 20, offset=20.0), **cubic)

    errors = [make(0.0, seed=seed).learn(500, progress=False).evaluate()["error"] for seed in range(5)]
    assert max(errors) < stats.norm.ppf(1 - 1e-6) / math.sqrt(520 * (6 * 5 ** (2 / 3) - 1))
    agent = make(50.0)
    with pytest.raises(FloatingPointError, match=r"iteration \d+ went beyond all numbers .* take a smaller one"):
        agent.learn(100, progress=False)
    assert np.isfinite(agent.estimate)


@pytest.mark.parametrize(("gain", "slope"), [(1.0, 1.0), (2.0, 0.7), (0.8, 1.0)])
def test_the_variance_on_a_linear_function_is_the_closed_form_at_every_step(gain, slope):
    # e ← (1 − a c / k) e − (a / k) η: its variance by the same recursion, and a² σ² / (2 a c − 1) / k in the limit.
    agent = RobbinsMonro(
        lambda w: slope * (w - 3.0), np.full(RUNS, 3.0), Power(gain), GaussianNoise(2.0), solution=3.0, seed=1
    )
    agent.learn(400, progress=False)
    variance = 0.0
    for k in range(1, 401):
        variance = (1 - gain * slope / k) ** 2 * variance + (2 * gain / k) ** 2
        if k in (1, 10, 100, 400):
            assert within_chi_squared(agent.trajectory[k] - 3.0, variance)
    limit = (2 * gain) ** 2 / (2 * gain * slope - 1) / 400
    assert variance == pytest.approx(limit, rel=0.08)


@pytest.mark.parametrize("noise", [GaussianNoise(0.5), UniformNoise(0.5 * math.sqrt(3))])
def test_a_constant_step_size_hovers_with_the_variance_of_theory(noise):
    # On g(w) = w: e_k is a stationary first-order autoregression with variance α σ² / (2 − α), and its mean decays
    # as (1 − α)^k. For uniform noise the runs are nearly Gaussian, being sums.
    alpha = 0.1
    agent = RobbinsMonro(lambda w: w, np.full(RUNS, 10.0), alpha, noise, solution=0.0, record_every=0)
    agent.learn(300, progress=False)
    mean = 10 * (1 - alpha) ** 300
    assert within_chi_squared(agent.estimate - mean, alpha * 0.25 / (2 - alpha))
    assert agent.step_size.is_robbins_monro is False


@pytest.mark.parametrize(
    ("schedule", "remaining"),
    [
        # Π_{k ≥ 0} (1 − 1/(k + 2)²) = 1/2, and Euler's Π_{k ≥ 1} (1 − 2^(−k)).
        (Power(0.25, exponent=2.0, offset=2.0), 0.5),
        (Geometric(0.5, 0.5), 0.288788095),
    ],
)
def test_steps_of_finite_sum_stop_short_of_the_root(schedule, remaining):
    agent = RobbinsMonro(lambda w: w, 7.0, schedule, solution=0.0).learn(3000, progress=False)
    assert agent.estimate == pytest.approx(7 * remaining, rel=1e-3)
    assert not schedule.sum_diverges


def test_steps_of_infinite_sum_of_squares_keep_the_noise():
    agents = {
        exponent: RobbinsMonro(lambda w: w, np.zeros(RUNS), Power(exponent=exponent), GaussianNoise(1.0), solution=0.0)
        for exponent in (0.0, 0.75, 1.0)
    }
    errors = {exponent: agent.learn(300, progress=False).evaluate()["error"] for exponent, agent in agents.items()}
    # α = 1 forgets everything but the last measurement, 1/k averages all of them: 1 / √300.
    assert errors[0.0] == pytest.approx(1, rel=0.03)
    assert errors[1.0] == pytest.approx(300**-0.5, rel=0.03)
    assert errors[1.0] < errors[0.75] < errors[0.0] / 5


def test_the_incremental_mean_with_one_over_k_is_the_sample_mean():
    samples = np.random.default_rng(0).normal(size=(500, 3))
    agent = IncrementalMean(samples, initial=[100.0, -5.0, 0.0], solution=samples.mean(axis=0))
    agent.learn(progress=False)
    assert agent.finished
    assert agent.iteration == 500
    means = samples.cumsum(axis=0) / np.arange(1, 501)[:, None]
    np.testing.assert_allclose(agent.trajectory[1:], means, atol=1e-12)
    np.testing.assert_array_equal(agent.act(), agent.estimate)
    assert agent.evaluate()["error"] < 1e-12


def test_the_incremental_mean_with_a_constant_is_the_exponential_average():
    samples = np.random.default_rng(0).normal(size=40)
    agent = IncrementalMean(samples, initial=2.0, step_size=0.2).learn(progress=False)
    weights = 0.2 * 0.8 ** np.arange(39, -1, -1)
    assert agent.estimate == pytest.approx(weights @ samples + 0.8**40 * 2.0, abs=1e-12)
    drawn = IncrementalMean(lambda generator: generator.exponential(size=5000), solution=np.ones(5000))
    assert drawn.learn(100, progress=False).evaluate()["error"] == pytest.approx(0.1, rel=0.05)


def data(size=60):
    generator = np.random.default_rng(3)
    features = generator.normal(size=(size, 3)) @ np.diag([1.0, 0.7, 0.4])
    return features, features @ [1.0, -2.0, 3.0] + 0.5 * generator.normal(size=size)


def test_batch_gradient_descent_is_the_closed_form():
    features, targets = data()
    problem = LeastSquares(features, targets)
    np.testing.assert_allclose(problem.solution, np.linalg.solve(features.T @ features, features.T @ targets))
    start, alpha = np.array([5.0, 5.0, 5.0]), 0.8
    agent = GradientDescent(problem, None, alpha, start).learn(25, progress=False)
    shrink = np.linalg.matrix_power(np.eye(3) - alpha * problem.hessian, 25)
    np.testing.assert_allclose(agent.estimate, problem.solution + shrink @ (start - problem.solution), atol=1e-12)
    residuals = features @ agent.estimate - targets
    assert agent.evaluate()["loss"] == pytest.approx((residuals**2).mean() / 2)
    samples = features[:, :2]
    mean = GradientDescent(MeanLoss(samples), None, 0.3, [4.0, 4.0]).learn(9, progress=False)
    np.testing.assert_allclose(mean.estimate, samples.mean(axis=0) + 0.7**9 * (4.0 - samples.mean(axis=0)), atol=1e-12)
    assert MeanLoss(samples).loss(samples.mean(axis=0)) == pytest.approx(samples.var(axis=0).sum() / 2)


@pytest.mark.parametrize("problem", [LeastSquares(*data()), MeanLoss(data()[0])])
def test_gradients_are_the_slopes_of_the_loss(problem):
    weights, everything, step = np.array([0.3, -1.0, 2.0]), np.arange(problem.size), 1e-5
    slopes = [(problem.loss(weights + e) - problem.loss(weights - e)) / (2 * step) for e in step * np.eye(3)]
    np.testing.assert_allclose(problem.gradients(weights, everything).mean(axis=0), slopes, atol=1e-8)
    np.testing.assert_allclose(problem.gradients(problem.solution, everything).mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(
        problem.gradients(weights, everything).mean(axis=0), problem.hessian @ (weights - problem.solution), atol=1e-12
    )


def test_a_batch_of_everything_without_replacement_is_batch_descent_and_with_it_is_not():
    problem = LeastSquares(*data(20))
    whole, drawn, twice = (
        GradientDescent(problem, size, 0.5, replacement=replacement).learn(30, progress=False)
        for size, replacement in [(None, True), (20, False), (20, True)]
    )
    np.testing.assert_allclose(drawn.trajectory, whole.trajectory, atol=1e-12)
    assert np.abs(twice.estimate - whole.estimate).max() > 1e-3


@pytest.mark.parametrize(("batch", "replacement"), [(1, True), (8, True), (8, False)])
def test_the_gradient_noise_of_a_batch_is_that_of_sampling_theory(batch, replacement):
    # Constant α on the mean problem: stationary variance α v / (2 − α), with v = σ²/m for independent draws, times
    # (n − m) / (n − 1) without replacement.
    samples, alpha = np.random.default_rng(5).normal(size=(24, 400)), 0.25
    agent = GradientDescent(MeanLoss(samples), batch, alpha, samples.mean(axis=0), replacement, record_every=1)
    # The columns share their draws, so what is averaged over is time; 20 steps make it nearly independent.
    agent.learn(2000, progress=False)
    deviations = agent.trajectory[100::20] - samples.mean(axis=0)
    variance = samples.var(axis=0) / batch * (1 if replacement else (24 - batch) / 23)
    ratio = (deviations**2 / (variance * alpha / (2 - alpha))).mean()
    # 95 nearly independent times, times the 23 directions in which 24 samples differ.
    assert ratio == pytest.approx(1, abs=4 * math.sqrt(2 / (95 * 23)))


def test_stochastic_descent_converges_as_fast_as_its_exact_expectation():
    # e ← A_i e + b_i with A_i = I − α x_i x_iᵀ and b_i = −α (x_iᵀ w* − y_i) x_i, i uniform: the mean m and the second
    # moment M of e follow by exact recursions.
    features, targets = data()
    problem, steps = LeastSquares(features, targets), Power(0.2, exponent=0.8, offset=50.0)
    assert steps.is_robbins_monro
    outer = features[:, :, None] * features[:, None, :]
    mean = -problem.solution
    second, expected = np.outer(mean, mean), []
    for k in range(300):
        shrink = np.eye(3) - steps(k) * outer
        push = -steps(k) * (features @ problem.solution - targets)[:, None] * features
        across = (shrink @ mean)[:, :, None] * push[:, None, :]
        terms = shrink @ second @ shrink + across + across.swapaxes(1, 2) + push[:, :, None] * push[:, None, :]
        mean, second = (shrink @ mean + push).mean(axis=0), terms.mean(axis=0)
        expected.append(np.trace(second))
    runs = [GradientDescent(problem, 1, steps, seed=seed).learn(300, progress=False) for seed in range(20)]
    errors = np.array([((run.trajectory[1:] - run.solution) ** 2).sum(axis=1) for run in runs])
    for k in (9, 99, 299):
        standard_error = errors[:, k].std(ddof=1) / math.sqrt(len(runs))
        assert errors[:, k].mean() == pytest.approx(expected[k], abs=3.5 * standard_error)
    assert expected[299] < 0.03 < 10 < expected[0]


@pytest.mark.parametrize("noise", [GaussianNoise(0.7), UniformNoise(1.3), StudentNoise(9.0, 0.5)])
def test_noise_has_mean_zero_and_the_variance_it_says(noise):
    drawn = noise(np.zeros(400_000), np.random.default_rng(0))
    variance = noise.variance(np.zeros(1))[0]
    assert noise.variance_is_bounded
    assert abs(drawn.mean()) < 5 * math.sqrt(variance / drawn.size)
    # The fourth moment of Student's t with 9 degrees is 4.2 times the squared variance, the largest of the three.
    assert (drawn**2).mean() == pytest.approx(variance, rel=5 * math.sqrt(3.2 / drawn.size))


def test_noise_may_be_heavy_or_depend_on_the_state():
    heavy = StudentNoise(1.5)
    assert heavy.variance_is_bounded is False
    assert heavy.variance(np.zeros(2)).tolist() == [math.inf, math.inf]
    # Where a Gaussian of the same quartiles never goes.
    assert np.abs(heavy(np.zeros(20_000), np.random.default_rng(0))).max() > 100
    scaled = StateDependentNoise(GaussianNoise(2.0), np.abs)
    np.testing.assert_array_equal(scaled.variance(np.array([0.0, 3.0])), [0.0, 36.0])
    assert scaled(np.array([0.0, 3.0]), np.random.default_rng(0))[0] == 0
    assert scaled.variance_is_bounded is None
    assert StateDependentNoise(GaussianNoise(1.0), np.tanh, bounded=True).variance_is_bounded is True
    assert StateDependentNoise(heavy, np.tanh, bounded=True).variance_is_bounded is False


def test_noise_that_grows_with_the_distance_still_vanishes_at_the_root():
    # e ← (1 − α − α η) e with η ~ N(0, 1): E[e²] shrinks by (1 − α)² + α² a step, exactly.
    agent = RobbinsMonro(
        lambda w: w, np.ones(RUNS), 0.5, StateDependentNoise(GaussianNoise(1.0), lambda w: w), solution=0.0
    )
    agent.learn(4, progress=False)
    # E[e⁴] / E[e²]² = (Σ_j C(4, j) …) is (0.5⁴ E[(1 − η)⁴] / 0.25)⁴ = 2.5⁴ after four steps.
    bound = 5 * math.sqrt((2.5**4 - 1) / RUNS)
    assert np.mean(agent.estimate**2) == pytest.approx(0.5**4, rel=bound)


def test_a_saved_run_continues_bit_for_bit(tmp_path):
    def make(seed=4):
        return RobbinsMonro(np.tanh, [3.0, -2.0], Power(), StudentNoise(3.0), record_every=5, seed=seed)

    through, halfway = make().learn(50, progress=False), make().learn(23, progress=False)
    halfway.save(tmp_path / "run.safetensors")
    resumed = make().load(tmp_path / "run.safetensors").learn(27, progress=False)
    np.testing.assert_array_equal(resumed.trajectory, through.trajectory)
    np.testing.assert_array_equal(resumed.estimate, through.estimate)
    np.testing.assert_array_equal(resumed.recorded_at, np.arange(0, 51, 5))
    assert (make(seed=5).learn(50, progress=False).estimate != through.estimate).any()
    with pytest.raises(ValueError, match=r"shape \(2,\), and this one has \(\)"):
        RobbinsMonro(np.tanh, 0.0).load(tmp_path / "run.safetensors")


def test_an_algorithm_is_what_it_measures():
    class Median(StochasticApproximation):
        """The root of P(X < w) − 1/2, from nothing but comparisons."""

        def measure(self, estimate, generator):
            return (generator.exponential(size=estimate.shape) < estimate) - 0.5

    agent = Median(np.zeros(RUNS), Power(2.0), solution=math.log(2)).learn(1000, progress=False)
    # The slope is the density 1/2 and the noise has variance 1/4, so with a = 2 the variance tends to 1/k.
    assert agent.evaluate()["error"] == pytest.approx(1000**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RobbinsMonro(np.tanh, math.nan), "finite, and this is nan"),
        (lambda: RobbinsMonro(np.sum, [1.0, 2.0]), r"makes shape \(\) out of an estimate of shape \(2,\)"),
        (lambda: RobbinsMonro(np.tanh, 0.0, solution=[1.0, 2.0]), r"solution of shape \(2,\) does not fit \(\)"),
        (lambda: RobbinsMonro(np.tanh, 0.0, record_every=-1), "at least 0, not -1"),
        (lambda: IncrementalMean([]), "one or more samples"),
        (lambda: IncrementalMean(3.0), "one or more samples"),
        (lambda: GaussianNoise(-1.0), "this is -1"),
        (lambda: UniformNoise(math.inf), "this is inf"),
        (lambda: StudentNoise(1.0), "has no mean"),
        (lambda: MeanLoss([]), "one or more rows"),
        (lambda: MeanLoss([1.0, math.nan]), "finite"),
        (lambda: LeastSquares([1.0, 2.0], [1.0]), r"targets of shape \(1,\): 2 finite numbers"),
        (lambda: LeastSquares([[1.0, 2.0], [2.0, 4.0]], [1.0, 2.0]), "rank 1 do not determine 2 weights"),
        (lambda: GradientDescent(MeanLoss([1.0, 2.0]), 0), "batch of 0"),
        (lambda: GradientDescent(MeanLoss([1.0, 2.0]), 3, replacement=False), "batch of 3 .* from 2 data"),
        (lambda: GradientDescent(MeanLoss([1.0, 2.0]), initial=[1.0, 2.0]), r"shape \(2,\), and the problem 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_constant_schedules_come_from_numbers():
    assert RobbinsMonro(np.tanh, 0.0, 0.1).step_size == Constant(0.1)
