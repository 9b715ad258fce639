"""The outcomes of every action in every state, as flat arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligngym.core.compilation import compiled

#: Of 32 bits or of 64.
Integers = NDArray[Any]


class Outcomes(NamedTuple):
    """Everything that can happen, one entry per outcome.

    Attributes:
        rows: ``[N]``, s · A + a for the state s and the action a that the outcome belongs to.
        next_states: ``[N]``, s'.
        probabilities: ``[N]``, p(s', r | s, a).
        rewards: ``[N]``, r.
    """

    rows: Integers
    next_states: Integers
    probabilities: NDArray[np.float64]
    rewards: NDArray[np.float64]

    def select(self, index: NDArray[Any]) -> Outcomes:
        """Return the outcomes that integers or booleans select."""
        return Outcomes(self.rows[index], self.next_states[index], self.probabilities[index], self.rewards[index])


class RowOutcomes(NamedTuple):
    """Outcomes in order, with where those of a row begin and what they come to.

    Attributes:
        starts: ``[S·A + 1]``, where the outcomes of row s · A + a begin, and where the last ends.
        rows: ``[N]``, s · A + a.
        next_states: ``[N]``, s'.
        probabilities: ``[N]``, p(s', r | s, a).
        rewards: ``[N]``, r.
        expected: ``[S·A]``, r(s, a).
    """

    starts: Integers
    rows: Integers
    next_states: Integers
    probabilities: NDArray[np.float64]
    rewards: NDArray[np.float64]
    expected: NDArray[np.float64]


def merge(outcomes: Outcomes, loops: NDArray[np.bool_]) -> RowOutcomes:
    """Sort by row, next state and reward, add up equal outcomes, drop impossible ones, and normalise rows.

    Numbers of states and rows are of 32 bits where that is enough: half the memory, and less for a sweep to read.

    Args:
        outcomes: in any order.
        loops: ``[S, A]`` booleans, rows whose outcomes are replaced by staying in s for nothing.
    """
    size = len(outcomes.rows) + int(loops.sum())
    numbers = np.int32 if max(size, loops.size) < np.iinfo(np.int32).max else np.int64
    in_order = bool((outcomes.rows[1:] >= outcomes.rows[:-1]).all())
    order = np.zeros(0, dtype=np.int64) if in_order else np.argsort(outcomes.rows, kind="stable")
    # Pages that are never written to take no memory, so what is too long costs nothing.
    merged = RowOutcomes(
        np.zeros(loops.size + 1, dtype=numbers),
        np.empty(size, dtype=numbers),
        np.empty(size, dtype=numbers),
        np.empty(size),
        np.empty(size),
        np.zeros(loops.size),
    )
    size = _merge_rows(outcomes, order, loops, merged)
    columns = {name: getattr(merged, name)[:size] for name in Outcomes._fields}
    return merged._replace(**columns)


@compiled
def _merge_rows(outcomes: Outcomes, order: NDArray[np.int64], loops: NDArray[np.bool_], merged: RowOutcomes) -> int:
    """Write the outcomes of each row to ``merged``, see :func:`merge`, and return how many there are.

    Args:
        outcomes: in any order.
        order: ``[N]``, their places, row by row; empty if they are in order already.
        loops: ``[S, A]``, rows to replace.
        merged: written to.
    """
    places = np.empty(8, dtype=np.int64)
    end, index, num_actions = 0, 0, loops.shape[1]
    for row in range(loops.size):
        first, count = end, 0
        replaced = loops[row // num_actions, row % num_actions]
        while index < len(outcomes.rows):
            place = index if len(order) == 0 else order[index]
            if outcomes.rows[place] != row:
                break
            index += 1
            if outcomes.probabilities[place] > 0 and not replaced:
                if count == len(places):
                    places = np.concatenate((places, places))
                places[count] = place
                count += 1
        _sort(places, count, outcomes.next_states, outcomes.rewards)
        if replaced:
            merged.next_states[end], merged.probabilities[end], merged.rewards[end] = row // num_actions, 1.0, 0.0
            end += 1
        for place in places[:count]:
            next_state, reward = outcomes.next_states[place], outcomes.rewards[place]
            if end > first and merged.next_states[end - 1] == next_state and merged.rewards[end - 1] == reward:
                merged.probabilities[end - 1] += outcomes.probabilities[place]
            else:
                merged.next_states[end], merged.rewards[end] = next_state, reward
                merged.probabilities[end] = outcomes.probabilities[place]
                end += 1
        _normalise(merged, row, first, end)
        merged.starts[row + 1] = end
    return end


@compiled
def _normalise(merged: RowOutcomes, row: int, first: int, end: int) -> None:
    """Number the outcomes of a row, make their probabilities sum to one, and take the mean of their rewards."""
    total = 0.0
    for index in range(first, end):
        total += merged.probabilities[index]
    for index in range(first, end):
        merged.rows[index] = row
        # Sums such as 0.1 + 0.2 + 0.7 miss one by a rounding error, which would add up over a long horizon.
        merged.probabilities[index] /= total
        merged.expected[row] += merged.probabilities[index] * merged.rewards[index]


@compiled
def _sort(places: NDArray[np.int64], count: int, next_states: Integers, rewards: NDArray[np.float64]) -> None:
    """Sort the first ``count`` places by next state, reward and place, as Shell does: fast for few or sorted ones."""
    gap = 1
    while gap < count // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for index in range(gap, count):
            place, hole = places[index], index
            while hole >= gap:
                other = places[hole - gap]
                if next_states[other] != next_states[place]:
                    before = next_states[other] < next_states[place]
                elif rewards[other] != rewards[place]:
                    before = rewards[other] < rewards[place]
                else:
                    before = other < place
                if before:
                    break
                places[hole] = other
                hole -= gap
            places[hole] = place
        gap //= 3
