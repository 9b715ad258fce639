"""Models of measurement noise: what stands between g(w) and what is seen of it.

Stochastic approximation asks two things of noise η, given the past: mean 0 and bounded variance. All models here have
mean 0; whether the variance is bounded, each says itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class Noise(ABC):
    """Independent noise for every entry of w, with mean 0."""

    @abstractmethod
    def __call__(self, estimate: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
        """Draw η, in the shape of w.

        Args:
            estimate: w, on which the noise may depend.
            generator: draws.
        """

    @abstractmethod
    def variance(self, estimate: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return E[η² | w] of every entry, infinite where there is none, in the shape of w."""

    @property
    @abstractmethod
    def variance_is_bounded(self) -> bool | None:
        """Whether sup_w E[η² | w] < ∞, as the theorems of Robbins and Monro and of Dvoretzky ask."""


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """η ~ N(0, σ²), with σ = ``scale``."""

    scale: float

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, estimate: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
        return self.scale * generator.standard_normal(estimate.shape)

    def variance(self, estimate: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(estimate.shape, self.scale**2)

    @property
    def variance_is_bounded(self) -> bool:
        return True


@dataclass(frozen=True)
class UniformNoise(Noise):
    """η uniform in [−b, b], with b = ``bound``: never larger, and of variance b² / 3."""

    bound: float

    def __post_init__(self) -> None:
        _check_scale(self.bound)

    def __call__(self, estimate: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
        return generator.uniform(-self.bound, self.bound, estimate.shape)

    def variance(self, estimate: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.full(estimate.shape, self.bound**2 / 3)

    @property
    def variance_is_bounded(self) -> bool:
        return True


@dataclass(frozen=True)
class StudentNoise(Noise):
    """Heavy tails: ``scale`` times Student's t with ν = ``degrees`` of freedom.

    Its variance is scale² ν / (ν − 2), infinite for ν ≤ 2, so that single draws can throw an iteration far back. With
    ν ≤ 1 there is no mean either, and such noise is refused.
    """

    degrees: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not self.degrees > 1:
            raise ValueError(f"Student's t with {self.degrees} degrees of freedom has no mean; it needs more than 1")

    def __call__(self, estimate: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
        return self.scale * generator.standard_t(self.degrees, estimate.shape)

    def variance(self, estimate: NDArray[np.float64]) -> NDArray[np.float64]:
        finite = self.degrees > 2
        return np.full(estimate.shape, self.scale**2 * self.degrees / (self.degrees - 2) if finite else math.inf)

    @property
    def variance_is_bounded(self) -> bool:
        return self.degrees > 2


@dataclass(frozen=True)
class StateDependentNoise(Noise):
    """Another noise, multiplied by a function of w: measurements that are worse in some places.

    Args:
        base: the noise at magnitude 1.
        magnitude: of w, in its shape; the variance is multiplied by its square.
        bounded: whether the magnitude has a bound, as far as the user knows; nobody can see that from the function.
    """

    base: Noise
    magnitude: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    bounded: bool | None = None

    def __call__(self, estimate: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
        return self.magnitude(estimate) * self.base(estimate, generator)

    def variance(self, estimate: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.magnitude(estimate) ** 2 * self.base.variance(estimate)

    @property
    def variance_is_bounded(self) -> bool | None:
        return self.bounded if self.base.variance_is_bounded else False


def _check_scale(scale: float) -> None:
    if not 0 <= scale < math.inf:
        raise ValueError(f"the size of noise is finite and not negative, and this is {scale}")
