"""In which order to visit the states: nearest to the end first.

Values spread backwards, from where an episode ends to where it may start. A sweep in place that begins at the end
carries them through the whole model at once, where one in any other order carries them a step, or a few.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligngym.agents.sweeps import Rows, Values, rows_of
from aligngym.core.compilation import compiled
from aligngym.envs.outcomes import Integers
from aligngym.envs.tabular_mdp import TabularMDP


class Predecessors(NamedTuple):
    """From where each state can be entered.

    Attributes:
        starts: ``[S + 1]``, where the entries of a state begin.
        states: ``[N]``, a state that leads there by some action; once for each action.
        probabilities: ``[N]``, p(s' | s, a); empty if not asked for.
    """

    starts: Integers
    states: Integers
    probabilities: Values


class SweepOrder(NamedTuple):
    """A model whose states are renumbered in the order of their distance, so that a sweep reads memory in order.

    Attributes:
        states: ``[S]``, the model's number of the state at each position.
        positions: ``[S]``, the position of each state.
        rows: the model, its states numbered by position.
    """

    states: Integers
    positions: Integers
    rows: Rows


def order_by_distance(mdp: TabularMDP) -> SweepOrder:
    """Sort states by the fewest steps to a terminal state; without any, to the states that can pay most.

    States that cannot get there are last.
    """
    rows = rows_of(mdp)
    states = nearest_first(predecessors(rows), np.flatnonzero(destinations(mdp)))[0]
    positions = np.empty_like(states)
    positions[states] = np.arange(len(states), dtype=states.dtype)
    ordered = Rows._make(np.empty_like(array) for array in rows)
    ordered.starts[0] = 0
    _renumber(rows, states, positions, ordered)
    return SweepOrder(states, positions, ordered)


def destinations(mdp: TabularMDP) -> NDArray[np.bool_]:
    """Return ``[S]`` booleans, the terminal states or, without any, those with an action of the highest reward."""
    return mdp.terminal if mdp.terminal.any() else (mdp.rewards == mdp.rewards.max()).any(axis=1)


def predecessors(rows: Rows, with_probabilities: bool = False) -> Predecessors:
    """Return from where each state can be entered."""
    num_states, size = len(rows.rewards), len(rows.next_states)
    numbers = rows.starts.dtype
    found = Predecessors(
        np.zeros(num_states + 2, dtype=numbers),
        np.empty(size, dtype=numbers),
        np.empty(size if with_probabilities else 0),
    )
    _find_predecessors(rows, found)
    return Predecessors(found.starts[:-1], found.states, found.probabilities)


@compiled
def nearest_first(predecessors: Predecessors, sources: NDArray[np.int64]) -> tuple[Integers, int]:
    """Search breadth first, backwards from ``sources``.

    Returns:
        ``[S]``, all states in the order in which they are found, those that cannot reach a source at the end; and how
        many can.
    """
    num_states = len(predecessors.starts) - 1
    order = np.empty(num_states, dtype=predecessors.states.dtype)
    found = np.zeros(num_states, dtype=np.bool_)
    end = 0
    for source in sources:
        order[end], found[source] = source, True
        end += 1
    current = 0
    while current < end:
        state = order[current]
        for index in range(predecessors.starts[state], predecessors.starts[state + 1]):
            before = predecessors.states[index]
            if not found[before]:
                order[end], found[before] = before, True
                end += 1
        current += 1
    reached = end
    for state in range(num_states):
        if not found[state]:
            order[end] = state
            end += 1
    return order, reached


@compiled
def _find_predecessors(rows: Rows, found: Predecessors) -> None:
    """Sort the entries of a model by next state, by counting; ``found.starts`` has one place more than it needs."""
    starts, num_actions = found.starts, rows.rewards.shape[1]
    for next_state in rows.next_states:
        starts[int(next_state) + 2] += 1
    for state in range(2, len(starts)):
        starts[state] += starts[state - 1]
    for row in range(len(rows.starts) - 1):
        for index in range(rows.starts[row], rows.starts[row + 1]):
            # One place further on is where the next entry goes; in the end it is where the next state's begin.
            following = int(rows.next_states[index]) + 1
            place = starts[following]
            found.states[place] = row // num_actions
            if len(found.probabilities) > 0:
                found.probabilities[place] = rows.probabilities[index]
            starts[following] += 1


@compiled
def _renumber(rows: Rows, states: Integers, positions: Integers, ordered: Rows) -> None:
    """Write a model with its states in another order."""
    num_states, num_actions = rows.rewards.shape
    end = 0
    for position in range(num_states):
        for action in range(num_actions):
            row = states[position] * num_actions + action
            ordered.rewards[position, action] = rows.rewards[states[position], action]
            for index in range(rows.starts[row], rows.starts[row + 1]):
                ordered.next_states[end] = positions[rows.next_states[index]]
                ordered.probabilities[end] = rows.probabilities[index]
                end += 1
            ordered.starts[position * num_actions + action + 1] = end
