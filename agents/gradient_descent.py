"""Gradient descent on a loss over data: all of them, a few, or one at a time.

The three are one iteration, w ← w − α_k ∇̃J(w), whose measurement is the mean gradient over a batch. They differ in the
size of the batch and so in its noise: none for all data, σ²/m for m data drawn independently. S. Zhao, *Mathematical
Foundations of Reinforcement Learning*, section 6.4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.stochastic_approximation import StochasticApproximation
from aligngym.core.callbacks import Metrics
from aligngym.core.schedules import Power, Schedule

Array = NDArray[np.float64]


class DataLoss(ABC):
    """J(w) = 1/n Σ_i J_i(w), a loss over n data with w in d dimensions.

    Attributes:
        size: n.
        dimension: d.
    """

    size: int
    dimension: int

    @abstractmethod
    def gradients(self, weights: Array, indices: NDArray[np.int64]) -> Array:
        """Return ``[m, d]``, ∇J_i(w) for each of m data.

        Args:
            weights: ``[d]``, w.
            indices: ``[m]``, the numbers i of the data.
        """

    @abstractmethod
    def loss(self, weights: Array) -> float:
        """Return J(w) for ``[d]`` weights."""

    @property
    @abstractmethod
    def solution(self) -> Array:
        """``[d]``, the w that minimises J, in closed form."""

    @property
    @abstractmethod
    def hessian(self) -> Array:
        """``[d, d]``, ∇²J, the same everywhere. BGD needs a step size below 2 / its largest eigenvalue."""


class MeanLoss(DataLoss):
    """J(w) = 1/n Σ_i ‖w − x_i‖² / 2, whose minimum is the mean of the samples.

    Args:
        samples: ``[n, d]``, or ``[n]`` for d = 1.

    Raises:
        ValueError: if there are none, or they are not finite.
    """

    def __init__(self, samples: ArrayLike) -> None:
        self.samples = _table(samples, "samples")
        self.size, self.dimension = self.samples.shape

    def gradients(self, weights: Array, indices: NDArray[np.int64]) -> Array:
        """Return ``[m, d]``, w − x_i."""
        return weights - self.samples[indices]

    def loss(self, weights: Array) -> float:
        return float(((weights - self.samples) ** 2).sum(axis=1).mean() / 2)

    @property
    def solution(self) -> Array:
        return self.samples.mean(axis=0)

    @property
    def hessian(self) -> Array:
        return np.eye(self.dimension)


class LeastSquares(DataLoss):
    """J(w) = 1/n Σ_i (x_iᵀ w − y_i)² / 2, linear regression.

    Args:
        features: ``[n, d]``, the rows x_i, or ``[n]`` for d = 1.
        targets: ``[n]``, y_i.

    Raises:
        ValueError: if there are none, shapes do not fit, or numbers are not finite; or if the features do not determine
            the weights.
    """

    def __init__(self, features: ArrayLike, targets: ArrayLike) -> None:
        self.features, self.targets = _table(features, "features"), np.array(targets, dtype=np.float64)
        self.size, self.dimension = self.features.shape
        if self.targets.shape != (self.size,) or not np.isfinite(self.targets).all():
            raise ValueError(f"targets of shape {self.targets.shape}: {self.size} finite numbers are needed")
        solution, _, rank, _ = np.linalg.lstsq(self.features, self.targets, rcond=None)
        self._solution = np.asarray(solution, dtype=np.float64)
        if rank < self.dimension:
            raise ValueError(
                f"features of rank {rank} do not determine {self.dimension} weights: leave columns out, or add data"
            )

    def gradients(self, weights: Array, indices: NDArray[np.int64]) -> Array:
        """Return ``[m, d]``, (x_iᵀ w − y_i) x_i."""
        rows = self.features[indices]
        return (rows @ weights - self.targets[indices])[:, None] * rows

    def loss(self, weights: Array) -> float:
        return float(((self.features @ weights - self.targets) ** 2).mean() / 2)

    @property
    def solution(self) -> Array:
        return self._solution

    @property
    def hessian(self) -> Array:
        return np.asarray(self.features.T @ self.features / self.size, dtype=np.float64)


class GradientDescent(StochasticApproximation):
    """Minimise a loss over data by the mean gradient of a batch.

    - ``batch_size=None``: batch gradient descent (BGD), all data, without noise;
    - ``batch_size=m``: mini-batch gradient descent (MBGD), m data drawn anew in each iteration;
    - ``batch_size=1``: stochastic gradient descent (SGD).

    A batch drawn with replacement may hold a datum twice, so even n draws are not all data.

    Args:
        problem: J.
        batch_size: m, at most n if drawn without replacement; ``None`` for all data.
        step_size: α; see :class:`StochasticApproximation`.
        initial: ``[d]``, w_0; 0 by default.
        replacement: whether a datum may be drawn twice for the same batch.
        record_every: see :class:`StochasticApproximation`.
        seed: of the draws.

    Raises:
        ValueError: for a batch of fewer than one datum, or of more than there are to draw without replacement.
    """

    def __init__(
        self,
        problem: DataLoss,
        batch_size: int | None = 1,
        step_size: float | Schedule = Power(),  # noqa: B008 (frozen)
        initial: ArrayLike | None = None,
        replacement: bool = True,
        record_every: int = 1,
        seed: int = 0,
    ) -> None:
        if batch_size is not None and not 1 <= batch_size <= (np.inf if replacement else problem.size):
            raise ValueError(f"a batch of {batch_size} cannot be drawn from {problem.size} data")
        self.problem, self.batch_size, self.replacement = problem, batch_size, replacement
        start = np.zeros(problem.dimension) if initial is None else initial
        super().__init__(start, step_size, problem.solution, record_every, seed)
        if self.estimate.shape != (problem.dimension,):
            raise ValueError(f"initial has shape {self.estimate.shape}, and the problem {problem.dimension} dimensions")

    def measure(self, estimate: Array, generator: np.random.Generator) -> Array:
        """Return the mean gradient of a batch."""
        indices = np.arange(self.problem.size)
        if self.batch_size is not None:
            indices = generator.choice(self.problem.size, self.batch_size, replace=self.replacement)
        return self.problem.gradients(estimate, indices).mean(axis=0)

    def evaluate(self) -> Metrics:
        """Return ``error``, the root mean square of w − w*, and the ``loss`` J(w) over all data."""
        return {**super().evaluate(), "loss": self.problem.loss(self.estimate)}


def _table(rows: ArrayLike, name: str) -> Array:
    table = np.array(rows, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"{name} of shape {table.shape}: a table of one or more rows of finite numbers is needed")
    return table
