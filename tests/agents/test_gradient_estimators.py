from itertools import product

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from aligngym.agents.gradient_estimators import (
    CategoricalProblem,
    GaussianProblem,
    GumbelSoftmax,
    LeaveOneOut,
    Pathwise,
    ScoreFunction,
    measure,
)

TARGET = torch.tensor([0.45, -1.0, 0.7], dtype=torch.float64)
CHOICE = CategoricalProblem([0.5, 0.0, -1.0], lambda x: ((x - TARGET) ** 2).sum(dim=-1))
GAUSSIAN = GaussianProblem(1.0, 0.5, lambda x: (x - 2) ** 2)


def assert_unbiased(found):
    """Every component within 4.5 standard errors of 0, and known well enough for that to mean something."""
    assert (found.bias.abs() <= 4.5 * found.standard_error).all()
    assert found.standard_error.norm() < 0.06 * found.exact.norm()


def quadratic_on_two(x):
    """Much like the toy problem of G. Tucker et al., *REBAR*, 2017."""
    return (x[..., 0] - 0.3) ** 2 + x[..., 1]


def relaxed_moments(difference, temperature, straight_through):
    """Mean and variance of one Gumbel–softmax estimate for two choices, by quadrature.

    The difference of two Gumbels is logistic, so x_0 = σ((θ_0 − θ_1 + L)/τ), and the estimate is
    (1, −1) · df/dx_0 · x_0 (1 − x_0) / τ with df/dx_0 = 2 (x_0 − 0.3) − 1 at the sample that f sees.
    """

    def estimate(noise):
        soft = 1 / (1 + np.exp(-(difference + noise) / temperature))
        seen = float(difference + noise > 0) if straight_through else soft
        return (2 * (seen - 0.3) - 1) * soft * (1 - soft) / temperature

    def expectation(power):
        parts = [(-60, -difference), (-difference, 60)]
        integrand = lambda noise: estimate(noise) ** power * stats.logistic.pdf(noise)  # noqa: E731
        return sum(integrate.quad(integrand, *part, limit=400, epsabs=1e-10)[0] for part in parts)

    mean = expectation(1)
    return mean, 2 * (expectation(2) - mean**2)


class TestExactGradients:
    def test_of_a_choice_by_differentiating_the_expectation(self):
        logits = CHOICE.parameters.clone().requires_grad_()
        value = logits.softmax(dim=0) @ CHOICE.function(torch.eye(3).double())
        value.backward()
        assert CHOICE.exact_value == pytest.approx(value.item())
        torch.testing.assert_close(CHOICE.exact_gradient, logits.grad)

    @pytest.mark.parametrize(
        ("function", "value", "by_mean", "by_log_std"),
        [
            (lambda x: (x - 2) ** 2, lambda m, s: (m - 2) ** 2 + s**2, lambda m, s: 2 * (m - 2), lambda m, s: 2 * s**2),
            (
                lambda x: x**3,
                lambda m, s: m**3 + 3 * m * s**2,
                lambda m, s: 3 * (m**2 + s**2),
                lambda m, s: 6 * m * s**2,
            ),
            (
                torch.exp,
                lambda m, s: np.exp(m + s**2 / 2),
                lambda m, s: np.exp(m + s**2 / 2),
                lambda m, s: s**2 * np.exp(m + s**2 / 2),
            ),
            (
                torch.sin,
                lambda m, s: np.exp(-(s**2) / 2) * np.sin(m),
                lambda m, s: np.exp(-(s**2) / 2) * np.cos(m),
                lambda m, s: -(s**2) * np.exp(-(s**2) / 2) * np.sin(m),
            ),
        ],
    )
    def test_of_a_gaussian_in_closed_form(self, function, value, by_mean, by_log_std):
        mean, std = 0.7, 1.3
        problem = GaussianProblem(mean, std, function)
        assert problem.exact_value == pytest.approx(value(mean, std))
        expected = [by_mean(mean, std), by_log_std(mean, std)]
        np.testing.assert_allclose(problem.exact_gradient, expected, rtol=1e-9)


class TestScoreFunction:
    @pytest.mark.parametrize("estimator", [ScoreFunction(), LeaveOneOut()])
    @pytest.mark.parametrize("problem", [CHOICE, GAUSSIAN], ids=["choice", "gaussian"])
    def test_it_is_unbiased(self, estimator, problem):
        assert_unbiased(measure(estimator, problem, samples=4, repetitions=60_000))

    def test_it_needs_no_slope(self):
        """P(x > 0.2) under N(0, 1) has the gradient φ(0.2) by the mean, and 0.2 φ(0.2) by log σ."""
        problem = GaussianProblem(0.0, 1.0, lambda x: (x > 0.2).double())
        estimates = LeaveOneOut().gradients(problem, 4, 50_000)
        density = stats.norm.pdf(0.2)
        errors = estimates.mean(dim=0) - torch.tensor([density, 0.2 * density])
        assert (errors.abs() < 4 * estimates.std(dim=0) / 50_000**0.5).all()

    def test_variances_of_a_choice_by_enumeration(self):
        """All 3^k ways to choose, with their probabilities."""
        probabilities = CHOICE.parameters.softmax(dim=0)
        values, scores = CHOICE.function(torch.eye(3).double()), torch.eye(3).double() - probabilities
        for samples in (2, 3):
            weights, plain, reduced = [], [], []
            for choice in map(list, product(range(3), repeat=samples)):
                f = values[choice]
                others = torch.stack([f[torch.arange(samples) != i].mean() for i in range(samples)])
                weights.append(probabilities[choice].prod())
                plain.append((f[:, None] * scores[choice]).mean(dim=0))
                reduced.append(((f - others)[:, None] * scores[choice]).mean(dim=0))
            for estimator, estimates in ((ScoreFunction(), plain), (LeaveOneOut(), reduced)):
                errors = torch.stack(estimates) - CHOICE.exact_gradient
                expected = float(torch.stack(weights) @ (errors**2).sum(dim=1))
                found = measure(estimator, CHOICE, samples, 60_000)
                assert found.variance == pytest.approx(expected, rel=0.03)
                assert found.mean_squared_error == pytest.approx(expected, rel=0.03)

    def test_variance_for_a_gaussian_by_quadrature(self):
        def second_moment(score):
            return stats.norm.expect(lambda z: ((1 + 0.5 * z - 2) ** 2 * score(z)) ** 2)

        expected = second_moment(lambda z: z / 0.5) + second_moment(lambda z: z**2 - 1)
        expected -= float((GAUSSIAN.exact_gradient**2).sum())
        found = measure(ScoreFunction(), GAUSSIAN, samples=1, repetitions=200_000)
        assert found.variance == pytest.approx(expected, rel=0.05)

    def test_leaving_one_out_does_not_see_a_constant(self):
        higher = CategoricalProblem(CHOICE.parameters, lambda x: CHOICE.function(x) + 100)
        same = LeaveOneOut().gradients(CHOICE, 5, 20)
        torch.testing.assert_close(LeaveOneOut().gradients(higher, 5, 20), same)
        assert measure(ScoreFunction(), higher, 5).variance > 1000 * measure(LeaveOneOut(), higher, 5).variance


class TestPathwise:
    def test_it_is_unbiased(self):
        assert_unbiased(measure(Pathwise(), GAUSSIAN, samples=4, repetitions=20_000))
        assert_unbiased(measure(Pathwise(), GaussianProblem(0.5, 1.5, torch.sin), samples=4, repetitions=20_000))

    def test_its_variance_has_a_closed_form(self):
        """For (x − c)² the terms are 2 (x − c) and 2 (x − c) σε: variances 4σ² and 4σ² (m² + 2σ²) with m = μ − c."""
        m, std, samples = 1.0 - 2, 0.5, 3
        found = measure(Pathwise(), GAUSSIAN, samples, 100_000)
        expected = 4 * std**2 * (1 + m**2 + 2 * std**2) / samples
        assert found.variance == pytest.approx(expected, rel=0.03)
        np.testing.assert_allclose(found.standard_error[0] ** 2 * 100_000, 4 * std**2 / samples, rtol=0.03)

    def test_what_it_needs_is_said(self):
        with pytest.raises(TypeError, match="CategoricalProblem jump when the parameters move"):
            measure(Pathwise(), CHOICE, 4)
        with pytest.raises(TypeError, match="Pathwise follows the gradient of the function, and torch finds none"):
            measure(Pathwise(), GaussianProblem(0.0, 1.0, lambda x: (x > 0).double()), 4)


class TestGumbelSoftmax:
    problem = CategoricalProblem([0.4, -0.2], quadratic_on_two)

    @pytest.mark.parametrize("temperature", [2.0, 0.5, 0.1])
    @pytest.mark.parametrize("straight_through", [False, True])
    def test_bias_and_variance_are_those_of_the_relaxed_problem(self, temperature, straight_through):
        mean, variance = relaxed_moments(0.6, temperature, straight_through)
        found = measure(GumbelSoftmax(temperature, straight_through), self.problem, samples=1, repetitions=100_000)
        expected = torch.tensor([mean, -mean]) - found.exact
        assert ((found.bias - expected).abs() < 4 * found.standard_error).all()
        assert found.variance == pytest.approx(variance, rel=0.05)
        assert found.mean_squared_error == pytest.approx(variance + float(expected @ expected), rel=0.05)

    @pytest.mark.parametrize("straight_through", [False, True])
    def test_cooling_trades_bias_for_variance(self, straight_through):
        """The bias is real at τ = 1 (ten standard errors) and shrinks; the variance grows like 1/τ."""
        found = [measure(GumbelSoftmax(t, straight_through), CHOICE, 4, 40_000) for t in (1.0, 0.1, 0.05)]
        biases, variances = [m.bias.norm() for m in found], [m.variance for m in found]
        assert biases[0] > 10 * found[0].standard_error.norm()
        assert biases[1] < biases[0] / 3
        assert variances[0] < variances[1]
        assert variances[2] / variances[1] == pytest.approx(2, rel=0.15)

    def test_for_a_linear_function_straight_through_is_the_same(self):
        """Its slope is the same at the corner and inside, so the same noise gives the same gradient."""
        linear = CategoricalProblem(CHOICE.parameters, lambda x: x @ TARGET)
        soft = GumbelSoftmax(0.7).gradients(linear, 6, 50, seed=2)
        torch.testing.assert_close(GumbelSoftmax(0.7, straight_through=True).gradients(linear, 6, 50, seed=2), soft)

    def test_straight_through_shows_the_function_corners_only(self):
        seen = []
        problem = CategoricalProblem([0.0, 1.0, 2.0], lambda x: seen.append(x.detach()) or (x**2).sum(dim=-1))
        for straight_through in (False, True):
            GumbelSoftmax(1.0, straight_through).gradients(problem, 5, 40)
        soft, hard = (x.max(dim=-1).values for x in seen[1:])
        assert (soft < 0.999).any()
        torch.testing.assert_close(hard, torch.ones_like(hard))

    def test_what_it_needs_is_said(self):
        with pytest.raises(TypeError, match="a GaussianProblem has none: use Pathwise"):
            measure(GumbelSoftmax(), GAUSSIAN, 4)
        table = CategoricalProblem([0.0, 1.0], lambda x: x.argmax(dim=-1).double())
        with pytest.raises(TypeError, match="GumbelSoftmax follows the gradient of the function"):
            measure(GumbelSoftmax(), table, 4)
        with pytest.raises(ValueError, match="temperature must be positive, not 0"):
            GumbelSoftmax(0)


class TestMeasure:
    def test_it_summarises_the_estimates(self):
        found = measure(ScoreFunction(), CHOICE, samples=3, repetitions=50, seed=4)
        estimates = ScoreFunction().gradients(CHOICE, samples=3, repetitions=50, seed=4).numpy()
        exact = CHOICE.exact_gradient.numpy()
        np.testing.assert_allclose(found.bias, estimates.mean(axis=0) - exact)
        np.testing.assert_allclose(found.standard_error, stats.sem(estimates, axis=0))
        assert found.variance == pytest.approx(estimates.var(axis=0, ddof=1).sum())
        assert found.mean_squared_error == pytest.approx(((estimates - exact) ** 2).sum(axis=1).mean())

    def test_a_seed_repeats_it_and_the_global_generator_stays(self):
        before = torch.random.get_rng_state()
        first, again, other = (GumbelSoftmax().gradients(CHOICE, 3, 4, seed) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_the_mean_of_more_samples_varies_less(self):
        few, many = (measure(ScoreFunction(), CHOICE, samples, 30_000).variance for samples in (2, 8))
        assert few / many == pytest.approx(4, rel=0.05)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: measure(ScoreFunction(), CHOICE, 0), "at least one sample"),
            (lambda: measure(LeaveOneOut(), CHOICE, 1), "at least two members"),
            (lambda: measure(ScoreFunction(), CHOICE, 4, repetitions=1), "at least two repetitions, not 1"),
            (lambda: CategoricalProblem([1.0], lambda x: x[..., 0]), "two or more finite numbers"),
            (lambda: CategoricalProblem([1.0, np.nan], lambda x: x[..., 0]), "two or more finite numbers"),
            (lambda: CategoricalProblem([1.0, 2.0], lambda x: x.sum()), "each needs one finite value"),
            (lambda: CategoricalProblem([1.0, 2.0], lambda x: x[..., 0].log()), "each needs one finite value"),
            (lambda: GaussianProblem(0.0, 0.0, torch.sin), "a positive std, not 0.0 and 0.0"),
            (lambda: GaussianProblem(np.inf, 1.0, torch.sin), "finite mean"),
        ],
    )
    def test_bad_input_is_named(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()
