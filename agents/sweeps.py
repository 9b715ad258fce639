"""The loops that planners spend their time in, and the order in which these visit the states.

Gathering, adding up, the maximum over actions and the change are one pass: a table of action values is never written.
Each loop writes V' to ``updated`` while it reads V from ``values``. Given the same array twice it works in place, with
what it has just computed, which is the difference between Jacobi's and Gauss and Seidel's method.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligngym.core.compilation import compiled
from aligngym.envs.outcomes import Integers
from aligngym.envs.tabular_mdp import TabularMDP

Values = NDArray[np.float64]
#: Unsigned numbers index without a test whether they count from the end.
Numbers = NDArray[Any]


class Rows(NamedTuple):
    """A model by rows s · A + a.

    Attributes:
        starts: ``[S·A + 1]``, where a row's entries begin.
        next_states: ``[N]``, s'.
        probabilities: ``[N]``, p(s' | s, a).
        rewards: ``[S, A]``, r(s, a).
    """

    starts: Numbers
    next_states: Numbers
    probabilities: Values
    rewards: Values


class Chain(NamedTuple):
    """What a policy makes of a model: V(s) ← reward(s) + Σ_s' weight(s, s') V(s').

    Attributes:
        starts: ``[S + 1]``, where a state's entries begin.
        next_states: room for N numbers, s'.
        weights: room for N numbers, γ p(s' | s, π(s)).
        rewards: ``[S]``, r(s, π(s)).
    """

    starts: Numbers
    next_states: Numbers
    weights: Values
    rewards: Values


def rows_of(mdp: TabularMDP) -> Rows:
    """Return a model as the loops read it, without a copy."""
    matrix = mdp.transitions
    return Rows(_unsigned(matrix.indptr), _unsigned(matrix.indices), matrix.data, mdp.rewards)


def empty_chain(rows: Rows) -> Chain:
    """Return room for any deterministic policy's chain."""
    num_states, num_actions = rows.rewards.shape
    # The longest row of each state is as much as a policy can take.
    size = int(np.diff(rows.starts).reshape(num_states, num_actions).max(axis=1).sum(dtype=np.int64))
    starts = np.zeros(num_states + 1, dtype=rows.starts.dtype)
    return Chain(starts, np.empty(size, dtype=rows.next_states.dtype), np.empty(size), np.empty(num_states))


@compiled
def sweep(values: Values, updated: Values, rows: Rows, discount: float) -> float:
    """Write max_a r(s, a) + γ Σ_s' p(s' | s, a) V(s') for every state and return the largest change."""
    num_states, num_actions = rows.rewards.shape
    largest, first = 0.0, rows.starts[0]
    for state in range(num_states):
        best = -np.inf
        for action in range(num_actions):
            end = rows.starts[state * num_actions + action + 1]
            following = 0.0
            for index in range(first, end):
                following += rows.probabilities[index] * values[rows.next_states[index]]
            first = end
            best = max(best, rows.rewards[state, action] + discount * following)
        largest = max(largest, abs(best - values[state]))
        updated[state] = best
    return largest


@compiled
def improve(values: Values, updated: Values, rows: Rows, discount: float, actions: NDArray[np.int64]) -> float:
    """Do a :func:`sweep`, and write to ``actions`` what is best in it, the first of those that tie."""
    num_states, num_actions = rows.rewards.shape
    largest, first = 0.0, rows.starts[0]
    for state in range(num_states):
        best, chosen = -np.inf, 0
        for action in range(num_actions):
            end = rows.starts[state * num_actions + action + 1]
            following = 0.0
            for index in range(first, end):
                following += rows.probabilities[index] * values[rows.next_states[index]]
            first = end
            following = rows.rewards[state, action] + discount * following
            # Which action is best cannot be foreseen, so nothing here is a jump.
            chosen = action if following > best else chosen
            best = max(best, following)
        actions[state] = chosen
        largest = max(largest, abs(best - values[state]))
        updated[state] = best
    return largest


@compiled
def follow(actions: NDArray[np.int64], rows: Rows, discount: float, chain: Chain, solve_loops: bool) -> None:
    """Write the chain of the deterministic policy ``actions``.

    Args:
        actions: ``[S]``, one for each state.
        rows: the model.
        discount: γ.
        chain: written to.
        solve_loops: whether V(s) = r + γ p(s | s) V(s) + … is solved for V(s), so that a sweep does not have to.
    """
    place, num_actions = 0, rows.rewards.shape[1]
    for state in range(len(actions)):
        row = state * num_actions + actions[state]
        staying = 0.0
        for index in range(rows.starts[row], rows.starts[row + 1]):
            if solve_loops and rows.next_states[index] == state:
                staying += discount * rows.probabilities[index]
        # Who stays for certain, without a discount, keeps the value that there is: nothing can be solved.
        factor = 1 / (1 - staying) if staying < 1 else 1.0
        for index in range(rows.starts[row], rows.starts[row + 1]):
            # A loop remains as an entry of weight 0: rows of one length are read faster than rows of several.
            solved = factor > 1 and rows.next_states[index] == state
            chain.next_states[place] = rows.next_states[index]
            chain.weights[place] = 0.0 if solved else discount * rows.probabilities[index] * factor
            place += 1
        chain.rewards[state] = rows.rewards[state, actions[state]] * factor
        chain.starts[state + 1] = place


@compiled
def follow_sweep(values: Values, updated: Values, chain: Chain) -> float:
    """Write reward(s) + Σ_s' weight(s, s') V(s') for every state and return the largest change."""
    largest, first = 0.0, chain.starts[0]
    for state in range(len(values)):
        end = chain.starts[state + 1]
        value = chain.rewards[state]
        for index in range(first, end):
            value += chain.weights[index] * values[chain.next_states[index]]
        first = end
        largest = max(largest, abs(value - values[state]))
        updated[state] = value
    return largest


def _unsigned(numbers: Integers) -> Numbers:
    return numbers.view(np.uint32 if numbers.itemsize == 4 else np.uint64)
