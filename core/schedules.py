"""Step sizes, and which conditions of stochastic approximation they meet.

A stochastic iteration w ← w + α_k (target − w) converges under Robbins and Monro's conditions
Σ α_k = ∞ (it can travel any distance) and Σ α_k² < ∞ (the noise dies out): H. Robbins and S. Monro,
*A stochastic approximation method*, 1951. Tabular agents use a schedule as α_k, gradient agents as the learning rate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


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
        """Whether both of Robbins and Monro's conditions hold."""
        return self.sum_diverges and self.sum_of_squares_converges


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


def as_schedule(value: float | Schedule) -> Schedule:
    """Return ``value`` itself if it is a schedule, otherwise the constant schedule of that value."""
    return value if isinstance(value, Schedule) else Constant(float(value))
