"""Step sizes, and which conditions of stochastic approximation they meet.

A stochastic iteration w ← w + α_k (target − w) converges under Robbins and Monro's conditions
Σ α_k = ∞ (it can travel any distance) and Σ α_k² < ∞ (the noise dies out): H. Robbins and S. Monro,
*A stochastic approximation method*, 1951. Tabular agents use a schedule as α_k, gradient agents as the learning rate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class Schedule(ABC):
    """A step size α_k ≥ 0 for every iteration k, counted from 0."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return α_k for ``step`` k, counted from 0."""

    @property
    @abstractmethod
    def sum_diverges(self) -> bool:
        """Whether Σ α_k = ∞."""

    @property
    @abstractmethod
    def sum_of_squares_converges(self) -> bool:
        """Whether Σ α_k² < ∞."""

    @property
    def is_robbins_monro(self) -> bool:
        """Whether both of Robbins and Monro's conditions hold; :func:`robbins_monro_conditions` says which."""
        return self.sum_diverges and self.sum_of_squares_converges

    def table(self, length: int) -> NDArray[np.float64]:
        """Return ``[length]``, α_0 … α_{length − 1}: for plots, and for compiled loops."""
        return np.array([self(step) for step in range(length)], dtype=np.float64)


@dataclass(frozen=True)
class Constant(Schedule):
    """α_k = α. It follows a moving target, and hovers around a fixed one instead of converging."""

    value: float

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise ValueError(f"a schedule is not negative, and this one is {self.value}")

    def __call__(self, step: int) -> float:
        return self.value

    @property
    def sum_diverges(self) -> bool:
        return self.value > 0

    @property
    def sum_of_squares_converges(self) -> bool:
        return self.value == 0


@dataclass(frozen=True)
class Power(Schedule):
    """α_k = α · (1 + k / offset)^(−exponent).

    With ``exponent=1, offset=1`` and α = 1 this is 1/(k+1), the incremental mean. Robbins and Monro's conditions hold
    for 1/2 < exponent ≤ 1.
    """

    value: float = 1.0
    exponent: float = 1.0
    offset: float = 1.0

    def __post_init__(self) -> None:
        if not (self.value >= 0 and self.exponent >= 0 and self.offset > 0):
            raise ValueError(f"Power needs value ≥ 0, exponent ≥ 0 and offset > 0, not {self}")

    def __call__(self, step: int) -> float:
        return self.value * (1 + step / self.offset) ** -self.exponent

    @property
    def sum_diverges(self) -> bool:
        return self.value > 0 and self.exponent <= 1

    @property
    def sum_of_squares_converges(self) -> bool:
        return self.value == 0 or self.exponent > 0.5


@dataclass(frozen=True)
class Geometric(Schedule):
    """α_k = α · ratio^k, with 0 < ratio ≤ 1.

    With ratio < 1 it falls so fast that Σ α_k = α / (1 − ratio): an iteration stops short of where it was going.
    """

    value: float
    ratio: float

    def __post_init__(self) -> None:
        if not (self.value >= 0 and 0 < self.ratio <= 1):
            raise ValueError(f"Geometric needs value ≥ 0 and 0 < ratio ≤ 1, not {self}")

    def __call__(self, step: int) -> float:
        return self.value * self.ratio**step

    @property
    def sum_diverges(self) -> bool:
        return self.value > 0 and self.ratio == 1

    @property
    def sum_of_squares_converges(self) -> bool:
        return self.value == 0 or self.ratio < 1


@dataclass(frozen=True)
class Decay(Schedule):
    """A linear warm-up over ``warmup`` steps to the peak ``value``, then down to 0 at step ``steps``.

    The way down is a straight line (``shape="linear"``) or half a cosine (``shape="cosine"``). After ``steps`` the
    step size stays 0, so Σ α_k is finite: meant for a run of known length, not for stochastic approximation.
    """

    value: float
    steps: int
    warmup: int = 0
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"shape is 'linear' or 'cosine', not {self.shape!r}")
        if not (self.value >= 0 and 0 <= self.warmup <= self.steps):
            raise ValueError(f"Decay needs value ≥ 0 and 0 ≤ warmup ≤ steps, not {self}")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.value * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.value * (1 - progress if self.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2)

    @property
    def sum_diverges(self) -> bool:
        return False

    @property
    def sum_of_squares_converges(self) -> bool:
        return True


@dataclass(frozen=True)
class Conditions:
    """The conditions of a theorem, and which of them hold. It is true where all do, and prints as a list of them.

    Attributes:
        theorem: whose conditions they are, and what follows.
        holds: whether it holds, for each condition by its formula.
    """

    theorem: str
    holds: dict[str, bool]

    def __bool__(self) -> bool:
        return all(self.holds.values())

    def __str__(self) -> str:
        lines = [f"  {'holds' if holds else 'FAILS'}  {condition}" for condition, holds in self.holds.items()]
        return "\n".join([self.theorem, *lines])


def robbins_monro_conditions(step_size: Schedule) -> Conditions:
    """State which conditions of Robbins and Monro on the step size hold.

    Under them w ← w − α_k (g(w) + η_k) converges to the root of g almost surely, if g rises with a slope between two
    positive bounds and the noise η_k has mean 0 and bounded variance, given the past. S. Zhao, *Mathematical
    Foundations of Reinforcement Learning*, theorem 6.1.
    """
    return Conditions(
        "Robbins–Monro: w ← w − α_k (g(w) + η_k) converges to the root of g",
        {"Σ α_k = ∞": step_size.sum_diverges, "Σ α_k² < ∞": step_size.sum_of_squares_converges},
    )


def dvoretzky_conditions(step_size: Schedule, noise_size: Schedule) -> Conditions:
    """State which conditions of Dvoretzky's theorem on two schedules hold.

    Under them Δ ← (1 − α_k) Δ + β_k η_k converges to 0 almost surely, if the noise η_k has mean 0 and bounded variance,
    given the past. With β_k = α_k this is the incremental mean, and Robbins and Monro's theorem follows from it.
    A. Dvoretzky, *On stochastic approximation*, 1956; S. Zhao, *Mathematical Foundations of Reinforcement Learning*,
    theorem 6.2.

    Args:
        step_size: α_k.
        noise_size: β_k.
    """
    return Conditions(
        "Dvoretzky: Δ ← (1 − α_k) Δ + β_k η_k converges to 0",
        {
            "Σ α_k = ∞": step_size.sum_diverges,
            "Σ α_k² < ∞": step_size.sum_of_squares_converges,
            "Σ β_k² < ∞": noise_size.sum_of_squares_converges,
        },
    )


def as_schedule(value: float | Schedule) -> Schedule:
    """Return ``value`` itself if it is a schedule, otherwise the constant schedule of that value."""
    return value if isinstance(value, Schedule) else Constant(float(value))
