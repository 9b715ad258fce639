"""The outcomes of every action in every state, as flat arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Outcomes(NamedTuple):
    """Everything that can happen, one entry per outcome.

    Attributes:
        rows: ``[N]``, s · A + a for the state s and the action a that the outcome belongs to.
        next_states: ``[N]``, s'.
        probabilities: ``[N]``, p(s', r | s, a).
        rewards: ``[N]``, r.
    """

    rows: NDArray[np.int64]
    next_states: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    rewards: NDArray[np.float64]

    def select(self, index: NDArray[Any]) -> Outcomes:
        """Return the outcomes that integers or booleans select."""
        return Outcomes(self.rows[index], self.next_states[index], self.probabilities[index], self.rewards[index])

    def merged(self, num_rows: int) -> Outcomes:
        """Sort by row, next state and reward, add up equal outcomes, drop impossible ones, and normalise rows."""
        possible = self.select(self.probabilities > 0)
        ordered = possible.select(np.lexsort((possible.rewards, possible.next_states, possible.rows)))
        same = np.ones(len(ordered.rows) - 1, dtype=bool)
        for key in (ordered.rows, ordered.next_states, ordered.rewards):
            same &= key[1:] == key[:-1]
        first = np.append(True, ~same)
        rows, next_states, _, rewards = ordered.select(first)
        probabilities = np.add.reduceat(ordered.probabilities, np.flatnonzero(first))
        # Sums such as 0.1 + 0.2 + 0.7 miss one by a rounding error, which would add up over a long horizon.
        return Outcomes(rows, next_states, probabilities / np.bincount(rows, probabilities, num_rows)[rows], rewards)
