"""Reading Gymnasium's tables ``P[s][a] = [(probability, next state, reward, terminated), …]``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: rows s · A + a, next states, probabilities, rewards
Arrays = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]


def read_model(table: Any, initial: Any = None) -> tuple[Arrays, NDArray[np.float64], NDArray[np.bool_], int]:
    """Return (outcomes, initial distribution, terminal states, number of actions) with endings that really end.

    What becomes a terminal state is said in :meth:`aligngym.envs.tabular_mdp.TabularMDP.from_env`.

    Args:
        table: ``P``, a dictionary or list over states of dictionaries or lists over actions.
        initial: ``[S]`` probabilities; uniform over the states that are not terminal if not given.

    Raises:
        ValueError: if states offer different numbers of actions.
    """
    num_states, num_actions = len(table), len(table[0])
    entries: list[tuple[int, int, float, int, float, bool]] = []
    for state in range(num_states):
        if len(table[state]) != num_actions:
            raise ValueError(f"P[{state}] has {len(table[state])} actions and P[0] has {num_actions}")
        entries += [(state, action, *outcome) for action in range(num_actions) for outcome in table[state][action]]
    columns = [np.array(column) for column in zip(*entries, strict=True)]
    states, actions, probabilities, next_states, rewards, ended = columns
    ended = ended.astype(bool) & (probabilities > 0)

    terminal = _terminal_states(num_states, states, next_states, ended, probabilities > 0)
    if initial is not None:
        terminal &= np.asarray(initial) == 0
    lost = ended & ~terminal[next_states]
    if lost.any():
        next_states = np.where(lost, num_states, next_states)
        terminal = np.append(terminal, True)
    start = (~terminal).astype(np.float64)
    if initial is not None:
        start[:num_states], start[num_states:] = initial, 0.0
    rows = states * num_actions + actions
    return (
        (rows, next_states, probabilities.astype(float), rewards.astype(float)),
        start / start.sum(),
        terminal,
        num_actions,
    )


def _terminal_states(
    num_states: int,
    states: NDArray[Any],
    next_states: NDArray[Any],
    ended: NDArray[np.bool_],
    possible: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Return which states are entered, and from other states only with the flag; loops say nothing about entering."""
    entered = np.zeros(num_states, dtype=bool)
    entered[next_states[ended]] = True
    open_ended = np.zeros(num_states, dtype=bool)
    open_ended[next_states[possible & ~ended & (states != next_states)]] = True
    return entered & ~open_ended
