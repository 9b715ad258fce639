"""Four ways to estimate the gradient of an expectation, on two problems whose gradient is known exactly.

The problem is ∇_θ J(θ) with J(θ) = E_{x ~ p_θ}[f(x)]: policy gradient with one action and no state. A *score-function*
estimator needs only values of f; a *pathwise* one needs the gradient of f, and x as a differentiable function of θ and
noise. Discrete samples have no such function; *Gumbel–softmax* puts a smooth one in its place, at the price of a bias.
S. Mohamed et al., *Monte Carlo gradient estimation in machine learning*, 2020, is a survey.

An estimator says what to differentiate, its *surrogate*; torch does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, OneHotCategorical
from torch.nn import functional as F

from aligngym.core import objectives
from aligngym.core.advantages import leave_one_out
from aligngym.core.randomness import seeded

Function = Callable[[Tensor], Tensor]


class Problem(ABC):
    """J(θ) = E_{x ~ p_θ}[f(x)].

    Attributes:
        parameters: ``[d]``, θ, in double precision.
        function: f, from ``[…]`` samples (``[…, K]`` for one-hot ones) to ``[…]`` values.
    """

    parameters: Tensor
    function: Function

    @abstractmethod
    def distribution(self, parameters: Tensor) -> Distribution:
        """Return p_θ for ``[…, d]`` parameters, with batch shape ``[…]``."""

    @property
    @abstractmethod
    def exact_value(self) -> float:
        """J(θ)."""

    @property
    @abstractmethod
    def exact_gradient(self) -> Tensor:
        """``[d]``, ∇J(θ)."""


class CategoricalProblem(Problem):
    """E_{a ~ softmax(θ)}[f(e_a)], where e_a is the one-hot vector of choice a.

    The gradient is π_a (f(e_a) − Σ_b π_b f(e_b)). f is given on the whole simplex, because relaxations look inside.

    Args:
        logits: ``[K]``, θ.
        function: f, from ``[…, K]`` points of the simplex to ``[…]``.

    Raises:
        ValueError: if there are fewer than two logits, they or values of f are not finite, or f returns another shape.
    """

    def __init__(self, logits: Tensor | list[float], function: Function) -> None:
        self.parameters = torch.as_tensor(logits, dtype=torch.float64)
        if self.parameters.dim() != 1 or len(self.parameters) < 2 or not self.parameters.isfinite().all():
            raise ValueError(f"logits are two or more finite numbers, not {self.parameters.tolist()}")
        self.function = function
        self._values = _checked_values(function, torch.eye(len(self.parameters), dtype=torch.float64))

    def distribution(self, parameters: Tensor) -> Distribution:
        return OneHotCategorical(logits=parameters)

    @property
    def exact_value(self) -> float:
        return float(self.parameters.softmax(dim=0) @ self._values)

    @property
    def exact_gradient(self) -> Tensor:
        return self.parameters.softmax(dim=0) * (self._values - self.exact_value)


class GaussianProblem(Problem):
    """E_{x ~ N(μ, σ²)}[f(x)] with θ = (μ, log σ).

    The exact gradient is E[f(x) z] / σ and E[f(x) (z² − 1)] with z = (x − μ)/σ, by Gauss–Hermite quadrature: exact for
    polynomials f up to degree 2 · ``nodes`` − 3, very nearly so for other smooth ones, and poor across jumps.

    Args:
        mean: μ.
        std: σ.
        function: f, elementwise.
        nodes: of the quadrature.

    Raises:
        ValueError: if σ is not positive, μ not finite, or f not finite at a node.
    """

    def __init__(self, mean: float, std: float, function: Function, nodes: int = 64) -> None:
        if not (np.isfinite(mean) and 0 < std < np.inf):
            raise ValueError(f"a Gaussian has a finite mean and a positive std, not {mean} and {std}")
        self.parameters = torch.tensor([mean, np.log(std)], dtype=torch.float64)
        self.function = function
        z, weights = (torch.from_numpy(column) for column in np.polynomial.hermite_e.hermegauss(nodes))
        self._z, self._weighted = z, weights / weights.sum() * _checked_values(function, mean + std * z)

    def distribution(self, parameters: Tensor) -> Distribution:
        return Normal(parameters[..., 0], parameters[..., 1].exp())

    @property
    def exact_value(self) -> float:
        return float(self._weighted.sum())

    @property
    def exact_gradient(self) -> Tensor:
        z, std = self._z, self.parameters[1].exp()
        return torch.stack([(self._weighted * z).sum() / std, (self._weighted * (z**2 - 1)).sum()])


class GradientEstimator(ABC):
    """A random gradient of J, the mean over k samples."""

    @abstractmethod
    def surrogate(self, problem: Problem, parameters: Tensor, samples: int) -> Tensor:
        """Return ``[k, R]`` terms whose mean over k has the estimate as its gradient in ``[R, d]`` parameters.

        It draws from torch's global generator, which :meth:`gradients` seeds.

        Raises:
            TypeError: if the estimator does not apply to the problem.
        """

    def gradients(self, problem: Problem, samples: int, repetitions: int, seed: int = 0) -> Tensor:
        """Return ``[R, d]``, independent estimates of ∇J.

        Args:
            problem: J.
            samples: k, for each estimate.
            repetitions: R.
            seed: of the samples.

        Raises:
            TypeError: if the estimator does not apply to the problem.
            ValueError: if there are fewer samples than it needs, or no repetitions.
        """
        if samples < 1 or repetitions < 1:
            raise ValueError(f"at least one sample and one repetition are needed, not {samples} and {repetitions}")
        # Every repetition has parameters of its own, so one backward pass gives all estimates.
        parameters = problem.parameters.repeat(repetitions, 1).requires_grad_()
        with seeded(seed):
            terms = self.surrogate(problem, parameters, samples)
        return torch.autograd.grad(terms.sum() / samples, parameters)[0]


class ScoreFunction(GradientEstimator):
    """REINFORCE: the mean of f(x) ∇log p_θ(x), unbiased for every f and every distribution with a density.

    R. Williams, *Simple statistical gradient-following algorithms*, 1992.
    """

    def surrogate(self, problem: Problem, parameters: Tensor, samples: int) -> Tensor:
        distribution = problem.distribution(parameters)
        x = distribution.sample((samples,))
        # The objective is a loss, to be minimised, and J is to be maximised.
        return -objectives.score_function(distribution.log_prob(x), self.advantages(problem.function(x)))

    def advantages(self, values: Tensor) -> Tensor:
        """Return what stands for f(x), ``[k, R]``, given f(x): f(x) itself."""
        return values


class LeaveOneOut(ScoreFunction):
    """RLOO: from each f(x) subtract the mean of the other k − 1, which costs no bias and saves most of the variance.

    W. Kool et al., *Buy 4 REINFORCE samples, get a baseline for free!*, 2019.
    """

    def advantages(self, values: Tensor) -> Tensor:
        group = torch.arange(values.shape[1]).expand_as(values)
        return leave_one_out(values.flatten(), group.flatten()).view_as(values)


class Pathwise(GradientEstimator):
    """Reparameterisation: the mean of ∇_θ f(x(θ, ε)) with noise ε, unbiased where f is continuous.

    D. Kingma and M. Welling, *Auto-encoding variational Bayes*, 2014, section 2.4; x = μ + σε for a Gaussian.
    """

    def surrogate(self, problem: Problem, parameters: Tensor, samples: int) -> Tensor:
        distribution = problem.distribution(parameters)
        if not distribution.has_rsample:
            raise TypeError(
                f"samples of a {type(problem).__name__} jump when the parameters move, so no path leads through them: "
                "use ScoreFunction, LeaveOneOut, or the relaxation GumbelSoftmax"
            )
        return _differentiable(problem, distribution.rsample((samples,)), self)


@dataclass(frozen=True)
class GumbelSoftmax(GradientEstimator):
    """Replace the one-hot sample argmax(θ + g) by softmax((θ + g)/τ), with Gumbel noise g, and follow the path.

    As τ → 0 the bias vanishes and the variance grows like 1/τ. E. Jang et al., *Categorical reparameterization with
    Gumbel-softmax*, 2017; C. Maddison et al., *The concrete distribution*, 2017.

    Args:
        temperature: τ > 0.
        straight_through: f sees the one-hot sample, and only its gradient is that of the softmax (Jang et al.,
            section 2.2).

    Raises:
        ValueError: if the temperature is not positive.
    """

    temperature: float = 1.0
    straight_through: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be positive, not {self.temperature}")

    def surrogate(self, problem: Problem, parameters: Tensor, samples: int) -> Tensor:
        if not isinstance(problem, CategoricalProblem):
            raise TypeError(
                f"Gumbel–softmax relaxes a choice among K, and a {type(problem).__name__} has none: use Pathwise, "
                "which needs no relaxation, or ScoreFunction"
            )
        logits = parameters.expand(samples, *parameters.shape)
        x = F.gumbel_softmax(logits, self.temperature, hard=self.straight_through)
        return _differentiable(problem, x, self)


@dataclass(frozen=True)
class Measurement:
    """How good an estimator is: its distribution over many repetitions, beside the exact gradient.

    Attributes:
        exact: ``[d]``, ∇J.
        bias: ``[d]``, the mean estimate minus ∇J.
        standard_error: ``[d]``, of the bias.
        variance: of one estimate, summed over the d components.
        mean_squared_error: E‖estimate − ∇J‖², which is ‖bias‖² + variance.
    """

    exact: Tensor
    bias: Tensor
    standard_error: Tensor
    variance: float
    mean_squared_error: float


def measure(
    estimator: GradientEstimator, problem: Problem, samples: int, repetitions: int = 10_000, seed: int = 0
) -> Measurement:
    """Measure an estimator's bias and variance against the exact gradient.

    Args:
        estimator: what is measured.
        problem: whose gradient it estimates.
        samples: k, of each estimate.
        repetitions: how many estimates, at least 2.
        seed: of the samples.

    Raises:
        TypeError: if the estimator does not apply to the problem.
        ValueError: for too few samples or repetitions.
    """
    if repetitions < 2:
        raise ValueError(f"a variance needs at least two repetitions, not {repetitions}")
    exact = problem.exact_gradient
    errors = estimator.gradients(problem, samples, repetitions, seed) - exact
    variances = errors.var(dim=0)
    return Measurement(
        exact,
        errors.mean(dim=0),
        (variances / repetitions).sqrt(),
        float(variances.sum()),
        float((errors**2).sum(dim=1).mean()),
    )


def _checked_values(function: Function, points: Tensor) -> Tensor:
    """Return f at ``points``, one for each row, or say what is wrong with f."""
    values = torch.as_tensor(function(points), dtype=torch.float64)
    if values.shape != points.shape[:1] or not values.isfinite().all():
        raise ValueError(
            f"the function gave {values.tolist()} for {tuple(points.shape)} samples: each needs one finite value"
        )
    return values


def _differentiable(problem: Problem, x: Tensor, estimator: GradientEstimator) -> Tensor:
    """Return f(x), or say that no gradient comes through f."""
    values = problem.function(x)
    if not values.requires_grad:
        raise TypeError(
            f"{type(estimator).__name__} follows the gradient of the function, and torch finds none: it is piecewise "
            "constant, or computed outside torch; use ScoreFunction or LeaveOneOut, which need its values only"
        )
    return values
