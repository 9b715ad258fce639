"""Feature maps x(s): what linear agents know of an observation. v(s) = wᵀ x(s).

R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 9.5; S. Zhao, *Mathematical Foundations of
Reinforcement Learning*, section 8.2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import product
from typing import Self

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.envs.grid_map import GridMap

Floats = NDArray[np.float64]


class Features(ABC):
    """A feature map.

    Attributes:
        size: d, how many features an observation has.
    """

    size: int

    @abstractmethod
    def __call__(self, observations: ArrayLike) -> Floats:
        """Return ``[..., d]``, x(s) of each observation."""


class FeatureTable(Features):
    """Features written in a table: x(s) is its row s.

    Args:
        table: ``[S, d]``.

    Raises:
        ValueError: if it has other axes.
    """

    def __init__(self, table: ArrayLike) -> None:
        self.table = np.array(table, dtype=np.float64)
        if self.table.ndim != 2:
            raise ValueError(
                f"a table of features is [S, d], a row for each state, and this has shape {self.table.shape}"
            )
        self.size = self.table.shape[1]

    def __call__(self, observations: ArrayLike) -> Floats:
        return self.table[_state_numbers(observations, len(self.table))]


class OneHot(FeatureTable):
    """The tabular case: x(s) is 1 in place s and 0 elsewhere. Linear methods become tabular ones with it.

    Args:
        num_states: S, which is the number of features too.
    """

    def __init__(self, num_states: int) -> None:
        super().__init__(np.eye(num_states))


class Aggregation(FeatureTable):
    """State aggregation: x(s) says which group s belongs to. Sutton and Barto, section 9.3.

    Args:
        groups: ``[S]``, the group of each state, counted from 0; states in group −1 have no feature and are worth 0.

    Raises:
        ValueError: if a number between 0 and the largest is the group of no state.
    """

    def __init__(self, groups: ArrayLike) -> None:
        self.groups = np.asarray(groups, dtype=np.int64)
        names = np.arange(self.groups.max() + 1)
        missing = np.setdiff1d(names, self.groups)
        if len(missing) or self.groups.min() < -1:
            raise ValueError(f"groups are 0, 1, 2, … without a gap, and −1 for none, not {np.unique(self.groups)}")
        super().__init__(self.groups[:, None] == names)

    @classmethod
    def blocks(cls, num_states: int, size: int) -> Self:
        """Return groups of ``size`` neighbouring states each; the last may be smaller."""
        return cls(np.arange(num_states) // size)


class Coordinates:
    """Where an observation is, as k numbers in [0, 1]; what is beyond the bounds is moved to them.

    Args:
        low: ``[k]``, what becomes 0.
        high: ``[k]``, what becomes 1.
        table: ``[S, k]``, the place of each state, if observations are state numbers.

    Raises:
        ValueError: if a bound is not finite, or low is not below high.
    """

    def __init__(self, low: ArrayLike, high: ArrayLike, table: ArrayLike | None = None) -> None:
        self.low = np.atleast_1d(np.asarray(low, dtype=np.float64))
        self.high = np.atleast_1d(np.asarray(high, dtype=np.float64))
        self.table = None if table is None else np.asarray(table, dtype=np.float64)
        bad = ~(np.isfinite(self.low) & np.isfinite(self.high) & (self.low < self.high))
        if bad.any():
            place = int(bad.argmax())
            raise ValueError(
                f"coordinate {place} runs from {self.low[place]:g} to {self.high[place]:g}: features need finite "
                "bounds, the lower below the higher; give low and high yourself, as far as the task really goes"
            )
        self.dimensions = len(self.low)

    @classmethod
    def of_space(cls, space: gymnasium.Space, low: ArrayLike | None = None, high: ArrayLike | None = None) -> Self:
        """Return coordinates of a ``Box`` with one axis.

        Args:
            space: the observation space.
            low: replaces the lower bounds of the space.
            high: replaces the upper bounds of the space.

        Raises:
            TypeError: for another space.
            ValueError: for bounds that are not finite.
        """
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise TypeError(f"coordinates come from a Box with one axis, not from {space}")
        return cls(space.low if low is None else low, space.high if high is None else high)

    @classmethod
    def of_grid(cls, map: GridMap) -> Self:
        """Return row and column of each cell of a grid."""
        return cls.of_table(map.cells)

    @classmethod
    def of_table(cls, table: ArrayLike) -> Self:
        """Return coordinates that are written in a table ``[S]`` or ``[S, k]``, scaled to its own range."""
        table = np.asarray(table, dtype=np.float64)
        table = table[:, None] if table.ndim == 1 else table
        return cls(table.min(axis=0), table.max(axis=0), table)

    def __call__(self, observations: ArrayLike) -> Floats:
        """Return ``[..., k]``.

        Raises:
            ValueError: for observations with another number of coordinates.
        """
        if self.table is not None:
            places = self.table[_state_numbers(observations, len(self.table))]
        else:
            places = np.asarray(observations, dtype=np.float64)
        if places.shape[-1:] != (self.dimensions,):
            raise ValueError(f"observations of shape {places.shape} do not end in {self.dimensions} coordinates")
        return np.clip((places - self.low) / (self.high - self.low), 0.0, 1.0)


class Polynomial(Features):
    """Products of powers Π_i y_i^(e_i) of coordinates y = 2c − 1 in [−1, 1], the constant 1 first.

    Zhao's polynomials of order q (section 8.2.4) have e_1 + … + e_k ≤ q: 1, x, y for q = 1; 6 features for q = 2 on a
    grid. Sutton and Barto's (section 9.5.1) have every e_i ≤ q, (q + 1)^k features: ``mixed=True``.

    Args:
        coordinates: of the observations.
        order: q, at least 0.
        mixed: whether each exponent or their sum is bounded by q.
    """

    def __init__(self, coordinates: Coordinates, order: int, *, mixed: bool = False) -> None:
        exponents = _multi_indices(coordinates.dimensions, order)
        kept = exponents if mixed else exponents[exponents.sum(axis=1) <= order]
        # By degree, so that the features of a lower order come first.
        self.exponents = kept[np.argsort(kept.sum(axis=1), kind="stable")]
        self.coordinates, self.order, self.size = coordinates, order, len(self.exponents)

    def __call__(self, observations: ArrayLike) -> Floats:
        centred = 2 * self.coordinates(observations) - 1
        return (centred[..., None, :] ** self.exponents).prod(axis=-1)


class Fourier(Features):
    """The Fourier cosine basis: cos(π cᵀ y) for all c in {0, …, q}^k and coordinates y in [0, 1], the constant first.

    G. Konidaris, S. Osentoski and P. Thomas, *Value function approximation in reinforcement learning using the Fourier
    basis*, 2011; Sutton and Barto, section 9.5.2; Zhao, section 8.2.4.

    Args:
        coordinates: of the observations.
        order: q, at least 0; there are (q + 1)^k features.
    """

    def __init__(self, coordinates: Coordinates, order: int) -> None:
        self.frequencies = _multi_indices(coordinates.dimensions, order)
        self.coordinates, self.order, self.size = coordinates, order, len(self.frequencies)

    def __call__(self, observations: ArrayLike) -> Floats:
        return np.cos(np.pi * (self.coordinates(observations) @ self.frequencies.T))


class TileCoding(Features):
    """Several grids laid over the coordinates, each a little further on; 1 for the tile of each grid that holds y.

    Grid number i is moved by i / tilings of a tile along the first coordinate, 3i / tilings along the second, 5i along
    the third, modulo one tile: asymmetric offsets, which leave fewer artefacts than equal ones. Exactly ``tilings``
    features are 1, so a step size is usually a fraction of 1 / tilings. Sutton and Barto, section 9.5.4.

    Args:
        coordinates: of the observations.
        tiles: how many tiles of a grid the range of a coordinate is wide.
        tilings: how many grids; a power of two at least four times the number of coordinates is recommended.

    Raises:
        ValueError: for fewer than one tile or tiling.
    """

    def __init__(self, coordinates: Coordinates, tiles: int = 8, tilings: int = 8) -> None:
        if tiles < 1 or tilings < 1:
            raise ValueError(f"tile coding needs at least one tile and one tiling, not {tiles} and {tilings}")
        self.coordinates, self.tiles, self.tilings = coordinates, tiles, tilings
        odd = 2 * np.arange(coordinates.dimensions) + 1
        self.offsets = np.arange(tilings)[:, None] * odd % tilings / tilings
        # One tile more than the range is wide, because a grid that is moved needs it.
        self._places = (tiles + 1) ** np.arange(coordinates.dimensions)
        self._firsts = np.arange(tilings) * (tiles + 1) ** coordinates.dimensions
        self.size = tilings * (tiles + 1) ** coordinates.dimensions

    def indices(self, observations: ArrayLike) -> NDArray[np.int64]:
        """Return ``[..., tilings]``, the features that are 1."""
        # The far end of the range belongs to the last tile of the grid that is not moved, and needs none of its own.
        places = np.minimum(self.coordinates(observations) * self.tiles, np.nextafter(self.tiles, 0))
        return (places[..., None, :] + self.offsets).astype(np.int64) @ self._places + self._firsts

    def __call__(self, observations: ArrayLike) -> Floats:
        indices = self.indices(observations)
        rows = indices.reshape(-1, self.tilings)
        features = np.zeros((len(rows), self.size))
        features[np.arange(len(rows))[:, None], rows] = 1.0
        return features.reshape(*indices.shape[:-1], self.size)


def _multi_indices(dimensions: int, order: int) -> NDArray[np.int64]:
    """Return all of {0, …, order}^dimensions, one a row, zeros first."""
    if order < 0:
        raise ValueError(f"the order of a basis is at least 0, not {order}")
    return np.array(list(product(range(order + 1), repeat=dimensions)))


def _state_numbers(observations: ArrayLike, num_states: int) -> NDArray[np.int64]:
    numbers = np.asarray(observations)
    if not np.issubdtype(numbers.dtype, np.integer) or (
        numbers.size and not 0 <= numbers.min() <= numbers.max() < num_states
    ):
        raise ValueError(f"observations are state numbers 0 … {num_states - 1}, not {observations!r}")
    return numbers
