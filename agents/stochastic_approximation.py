"""Stochastic approximation: finding what can only be measured with noise.

Every iteration moves an estimate against a noisy measurement,

    w ← w − α_k g̃(w, η_k),    E[g̃(w, η) | w] = g(w),

and the algorithms differ in what they measure: a function whose root is sought, the distance from a sample, the
gradient of a loss on a few data. So do the temporal-difference methods, whose measurement is a TD error.
H. Robbins and S. Monro, *A stochastic approximation method*, 1951; S. Zhao, *Mathematical Foundations of Reinforcement
Learning*, chapter 6.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.noise import Noise
from aligngym.core.agent import Agent
from aligngym.core.callbacks import Metrics
from aligngym.core.schedules import Power, Schedule, as_schedule

Array = NDArray[np.float64]


class StochasticApproximation(Agent):
    """The iteration w ← w − α_k g̃(w, η_k). A subclass says what is measured.

    The noise of an iteration comes from the seed and the iteration's number, so a saved run continues exactly. The
    estimate may have any shape: with a function of each entry alone, its entries are as many independent runs at once.

    Attributes:
        estimate: w.
        solution: w*, if somebody knows it; nothing is learned from it, it only judges.

    Args:
        initial: w_0, of any shape.
        step_size: α; a schedule is evaluated at the iteration, from 0. The default is 1/(k + 1).
        solution: w*, in a shape that fits.
        record_every: iterations between two points of :attr:`trajectory`; 0 records nothing but the start.
        seed: of the noise.

    Raises:
        ValueError: for an estimate to start from that is not finite, or a solution of another shape.
    """

    headline = ("step_size", "error")

    def __init__(
        self,
        initial: ArrayLike,
        step_size: float | Schedule = Power(),  # noqa: B008 (frozen)
        solution: ArrayLike | None = None,
        record_every: int = 1,
        seed: int = 0,
    ) -> None:
        self.estimate = np.array(initial, dtype=np.float64)
        if not np.isfinite(self.estimate).all():
            raise ValueError(f"the estimate to start from is finite, and this is {self.estimate}")
        self.solution = None if solution is None else np.asarray(solution, dtype=np.float64)
        if self.solution is not None and np.broadcast(self.solution, self.estimate).shape != self.estimate.shape:
            raise ValueError(f"a solution of shape {self.solution.shape} does not fit {self.estimate.shape} estimates")
        if record_every < 0:
            raise ValueError(f"record_every is a number of iterations, at least 0, not {record_every}")
        self.step_size, self.record_every, self.seed = as_schedule(step_size), record_every, seed
        self._recorded, self._recorded_at = [self.estimate.copy()], [0]

    @abstractmethod
    def measure(self, estimate: Array, generator: np.random.Generator) -> Array:
        """Return g̃(w, η), in the shape of w.

        Args:
            estimate: w.
            generator: draws the noise.
        """

    def iterate(self) -> Metrics:
        """Measure once, and make a step.

        Raises:
            FloatingPointError: if the estimate has left the finite numbers; it keeps its last finite value.
        """
        step_size = self.step_size(self.iteration)
        generator = np.random.default_rng([self.seed, self.iteration])
        with np.errstate(over="ignore", invalid="ignore"):
            estimate = self.estimate - step_size * self.measure(self.estimate, generator)
        if not np.isfinite(estimate).all():
            raise FloatingPointError(
                f"iteration {self.iteration} went beyond all numbers with the step size {step_size:.3g}: take a "
                "smaller one, begin closer to the solution, or bound what is measured"
            )
        self.estimate = estimate
        done = self.iteration + 1
        if self.record_every and done % self.record_every == 0:
            self._recorded.append(estimate.copy())
            self._recorded_at.append(done)
        return {"step_size": step_size, **self._error()}

    @property
    def trajectory(self) -> Array:
        """``[n, *shape of w]``, the estimates after the iterations :attr:`recorded_at`, the start first."""
        return np.stack(self._recorded)

    @property
    def recorded_at(self) -> NDArray[np.int64]:
        """``[n]``, how many iterations came before each point of :attr:`trajectory`."""
        return np.array(self._recorded_at)

    def act(self, observations: Any = None, *, greedy: bool = True) -> Array:
        """Return the estimate: there is nothing to observe, and this is the answer."""
        return self.estimate.copy()

    def evaluate(self) -> Metrics:
        """Return ``error``, the root of the mean of (w − w*)² over all entries; nothing if nobody knows w*."""
        return self._error()

    def _error(self) -> Metrics:
        if self.solution is None:
            return {}
        with np.errstate(over="ignore"):
            return {"error": float(np.sqrt(np.mean((self.estimate - self.solution) ** 2)))}

    def state_dict(self) -> dict[str, Any]:
        """Return the estimate and the trajectory."""
        return {"estimate": self.estimate.copy(), "trajectory": self.trajectory, "recorded_at": self.recorded_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if the estimate has another shape.
        """
        if state["estimate"].shape != self.estimate.shape:
            raise ValueError(
                f"a saved estimate of shape {state['estimate'].shape}, and this one has {self.estimate.shape}"
            )
        self.estimate = state["estimate"].copy()
        self._recorded, self._recorded_at = list(state["trajectory"]), state["recorded_at"].tolist()


class RobbinsMonro(StochasticApproximation):
    """Find the root of a function g that rises through it, from noisy measurements g(w) + η.

    It converges almost surely if the slope of g lies between two positive bounds, the step sizes meet
    :func:`aligngym.core.schedules.robbins_monro_conditions`, and the noise has mean 0 and bounded variance. A slope
    without an upper bound (a cubic) may still converge from nearby, and explode from afar. S. Zhao, *Mathematical
    Foundations of Reinforcement Learning*, section 6.2.

    For measurements of another form, derive from :class:`StochasticApproximation`.

    Args:
        function: g, which takes w and returns an array of its shape.
        initial: w_0, of any shape.
        step_size: α; see :class:`StochasticApproximation`.
        noise: η; without it g is measured exactly.
        solution: the root, if known.
        record_every: see :class:`StochasticApproximation`.
        seed: of the noise.

    Raises:
        ValueError: if the function changes the shape, or what :class:`StochasticApproximation` refuses.
    """

    def __init__(
        self,
        function: Callable[[Array], ArrayLike],
        initial: ArrayLike,
        step_size: float | Schedule = Power(),  # noqa: B008 (frozen)
        noise: Noise | None = None,
        solution: ArrayLike | None = None,
        record_every: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(initial, step_size, solution, record_every, seed)
        self.function, self.noise = function, noise
        shape = np.shape(function(self.estimate))
        if shape != self.estimate.shape:
            raise ValueError(f"the function makes shape {shape} out of an estimate of shape {self.estimate.shape}")

    def measure(self, estimate: Array, generator: np.random.Generator) -> Array:
        """Return g(w) + η."""
        value = np.asarray(self.function(estimate), dtype=np.float64)
        return value if self.noise is None else value + self.noise(estimate, generator)


class IncrementalMean(StochasticApproximation):
    """Estimate E[X] from samples, one at a time: w ← w − α_k (w − x_k).

    With α_k = 1/(k + 1), w is the mean of the samples so far, whatever it was at first. With a constant α it is
    Σ_j α (1 − α)^(k − 1 − j) x_j + (1 − α)^k w_0, which forgets old samples, and hovers with variance α σ² / (2 − α).
    S. Zhao, *Mathematical Foundations of Reinforcement Learning*, section 6.1; R. Sutton and A. Barto, *Reinforcement
    Learning*, 2nd ed., sections 2.4 and 2.5.

    Args:
        samples: ``[n, …]``, taken in order, after which the agent is finished; or a function that draws a sample with
            a generator.
        initial: w_0, 0 by default.
        step_size: α; see :class:`StochasticApproximation`.
        solution: E[X], if known.
        record_every: see :class:`StochasticApproximation`.
        seed: of the draws.

    Raises:
        ValueError: if there are no samples.
    """

    def __init__(
        self,
        samples: ArrayLike | Callable[[np.random.Generator], ArrayLike],
        initial: ArrayLike | None = None,
        step_size: float | Schedule = Power(),  # noqa: B008 (frozen)
        solution: ArrayLike | None = None,
        record_every: int = 1,
        seed: int = 0,
    ) -> None:
        self.samples = samples if callable(samples) else np.array(samples, dtype=np.float64)
        if not callable(self.samples) and (self.samples.ndim == 0 or len(self.samples) == 0):
            raise ValueError(
                f"samples is an array of one or more samples, or a function that draws one, not {self.samples}"
            )
        if initial is None:
            initial = np.zeros_like(self.sample(np.random.default_rng(seed)))
        super().__init__(initial, step_size, solution, record_every, seed)

    def sample(self, generator: np.random.Generator) -> Array:
        """Return the next sample."""
        drawn = self.samples(generator) if callable(self.samples) else self.samples[self.iteration]
        return np.asarray(drawn, dtype=np.float64)

    @property
    def finished(self) -> bool:
        """Whether all samples have been used, if there is an end of them."""
        return not callable(self.samples) and self.iteration >= len(self.samples)

    def measure(self, estimate: Array, generator: np.random.Generator) -> Array:
        """Return w − x."""
        return estimate - self.sample(generator)
