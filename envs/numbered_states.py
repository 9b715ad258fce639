"""Numbers for observations that are made of several small ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class NumberedStates(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Number the observations of an environment, for agents that need a table.

    An observation of digits d_1, d_2, …, out of n_1, n_2, … each, is number (d_1 · n_2 + d_2) · n_3 + …: the last one
    runs fastest. So Blackjack's (player's sum, dealer's card, usable ace) is 22 · sum + 2 · card + ace.

    Args:
        env: an environment whose observations are ``Discrete``, ``MultiDiscrete``, ``MultiBinary``, or a ``Tuple`` of
            such.

    Raises:
        TypeError: for other observations.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        starts, sizes = zip(*_digits(env.observation_space), strict=True)
        self._starts, self._sizes = np.array(starts), sizes
        self.observation_space = spaces.Discrete(int(np.prod(sizes)))

    def observation(self, observation: Any) -> int:
        """Return the number of an observation.

        Raises:
            ValueError: if it is not in the environment's space.
        """
        if not self.env.observation_space.contains(observation):
            raise ValueError(f"{observation!r} is no observation of {self.env.observation_space}")
        digits = np.array(list(_leaves(observation))) - self._starts
        return int(np.ravel_multi_index(tuple(digits), self._sizes))

    def digits(self, number: int) -> tuple[int, ...]:
        """Return what a number stands for, without the nesting: the inverse of :meth:`observation`.

        Raises:
            ValueError: for a number that there is not.
        """
        if not self.observation_space.contains(number):
            raise ValueError(f"state {number} is not one of 0 … {int(np.prod(self._sizes)) - 1}")
        digits = np.array(np.unravel_index(number, self._sizes)) + self._starts
        return tuple(int(digit) for digit in digits)


def _digits(space: spaces.Space[Any]) -> Iterator[tuple[int, int]]:
    """Yield the first value and the number of values of every digit of a space."""
    if isinstance(space, spaces.Tuple):
        for part in space.spaces:
            yield from _digits(part)
    elif isinstance(space, spaces.Discrete):
        yield int(space.start), int(space.n)
    elif isinstance(space, spaces.MultiDiscrete):
        yield from zip(space.start.ravel().tolist(), space.nvec.ravel().tolist(), strict=True)
    elif isinstance(space, spaces.MultiBinary):
        yield from [(0, 2)] * int(np.prod(space.shape))
    else:
        raise TypeError(f"{space} cannot be numbered: observations must be Discrete, MultiDiscrete or Tuples of such")


def _leaves(observation: Any) -> Iterator[int]:
    if isinstance(observation, tuple):
        for part in observation:
            yield from _leaves(part)
    else:
        yield from np.ravel(observation).tolist()
