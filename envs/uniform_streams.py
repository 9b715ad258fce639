"""The uniform numbers of many generators, drawn ahead in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gymnasium.utils.seeding import np_random
from numpy.typing import NDArray

#: Numbers drawn at a time from one generator: enough to make the call cheap, few enough to stay in a cache.
BLOCK = 512


class UniformStreams:
    """For each of many copies, the numbers in [0, 1) that its own generator would give one at a time.

    ``generator.random(n)`` gives the same n numbers as n calls of ``generator.random()``, and takes hardly longer than
    one of them. So every copy draws a block ahead. What its generator has given is therefore more than what the copy
    has used. Generators are made when a number is first needed, as Gymnasium makes them.

    Attributes:
        seeds: the seed of each copy, once it is known.

    Args:
        count: the number of copies.
    """

    def __init__(self, count: int) -> None:
        self.seeds: list[int | None] = [None] * count
        self._generators: list[np.random.Generator | None] = [None] * count
        # A ring of two blocks for each copy: one that it reads, and one drawn ahead.
        self._numbers = np.empty((count, 2 * BLOCK))
        self._rings = np.arange(count) * 2 * BLOCK
        self._used = np.zeros(count, dtype=np.int64)
        self._drawn = np.zeros(count, dtype=np.int64)
        self._left = 0

    def seed(self, copies: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        """Start the streams of some copies anew, with a seed for each; ``None`` lets a stream go on."""
        for copy, seed in zip(copies.tolist(), seeds, strict=True):
            if seed is not None:
                self.seeds[copy], self._generators[copy] = seed, None
                self._used[copy] = self._drawn[copy] = self._left = 0

    def generator(self, copy: int) -> np.random.Generator:
        """Return the generator of a copy, which may be up to two blocks ahead of the copy."""
        generator = self._generators[copy]
        if generator is None:
            generator, self.seeds[copy] = np_random(self.seeds[copy])
            self._generators[copy] = generator
        return generator

    def take_where(self, needed: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return ``[count]``, the next number of every copy, which is used up only where it is needed."""
        self._draw_ahead()
        numbers = self._numbers.take(self._rings + (self._used & (2 * BLOCK - 1)))
        self._used += needed
        return numbers

    def take(self, copies: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the next number of each of some different copies, and use it up."""
        self._draw_ahead()
        numbers = self._numbers[copies, self._used[copies] & (2 * BLOCK - 1)]
        self._used[copies] += 1
        return numbers

    def _draw_ahead(self) -> None:
        """See to it that every copy has a number, counting that it will use it."""
        if self._left == 0:
            low = np.flatnonzero(self._drawn - self._used <= BLOCK)
            for copy, begin in zip(low.tolist(), (self._drawn[low] % (2 * BLOCK)).tolist(), strict=True):
                self.generator(copy).random(out=self._numbers[copy, begin : begin + BLOCK])
            self._drawn[low] += BLOCK
            # Nobody can have used up more than this before it is looked at again.
            self._left = int((self._drawn - self._used).min())
        self._left -= 1
