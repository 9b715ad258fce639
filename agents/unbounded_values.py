"""Without a discount, some tasks have no finite values: a proof, before a planner waits for ever.

With γ = 1 the value of a state is a sum that may have no end. Two kinds of it are found, whatever the model:

- *+∞*: some choice of actions can stay among states for ever, never pays for it, and earns something again and again.
  The states are the maximal end components of the actions with r(s, a) ≥ 0 (L. de Alfaro, *Formal verification of
  probabilistic systems*, 1997, section 3.3), and one of these actions has r(s, a) > 0;
- *−∞*: no action ever earns anything, no terminal state can be reached, nor a place to rest for nothing.

What is left may still be infinite, where gains and costs alternate for ever; a limit of iterations helps there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from aligngym.agents.sweep_order import nearest_first, predecessors
from aligngym.agents.sweeps import rows_of
from aligngym.envs.tabular_mdp import TabularMDP


def refuse_unbounded_values(mdp: TabularMDP) -> None:
    """Raise if the model is seen to have an infinite optimal value without a discount, see above.

    Raises:
        ValueError: naming a state.
    """
    rewards = np.where(mdp.terminal[:, None], 0.0, mdp.rewards)
    if (rewards > 0).any():
        earning = _end_components(mdp, (rewards >= 0) & ~mdp.terminal[:, None]) & (rewards > 0)
        if earning.any():
            state, action = np.argwhere(earning)[0]
            raise ValueError(
                f"from state {state} an episode can go on for ever and earn {rewards[state, action]} again and again: "
                "its value is infinite with a discount of 1; take a smaller one, or make terminal states unavoidable"
            )
    before = predecessors(rows_of(mdp))
    order, reached = nearest_first(before, np.flatnonzero(mdp.terminal))
    stuck = np.sort(order[reached:]).astype(np.int64)
    if len(stuck) and (rewards[stuck] <= 0).all():
        resting = _end_components(mdp, (rewards == 0) & ~mdp.terminal[:, None]).any(axis=1)
        order, reached = nearest_first(before, np.flatnonzero(resting | mdp.terminal))
        lost = np.sort(order[reached:])
        if len(lost):
            raise ValueError(
                f"from state {lost[0]} no terminal state can be reached, and every way on has its cost for ever: its "
                "value is −∞ with a discount of 1; take a smaller one, or make a terminal state reachable"
            )


def _end_components(mdp: TabularMDP, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return ``[S, A]`` booleans, the allowed actions with which one can stay, and come back, for ever."""
    matrix = mdp.transitions
    rows = np.repeat(np.arange(mdp.rewards.size), np.diff(matrix.indptr))
    states, next_states = rows // mdp.num_actions, matrix.indices
    while True:
        kept = np.repeat(allowed.ravel(), np.diff(matrix.indptr))
        edges = csr_array((np.ones(int(kept.sum())), (states[kept], next_states[kept])), shape=(mdp.num_states,) * 2)
        component = connected_components(edges, connection="strong")[1]
        # An action stays if all its outcomes lie in the component of its state. One without actions is left by all.
        idle = np.asarray(~allowed.any(axis=1))
        leaves = (component[states] != component[next_states]) | idle[next_states]
        staying = allowed & np.equal(np.bincount(rows, leaves, mdp.rewards.size), 0).reshape(allowed.shape)
        if np.array_equal(staying, allowed):
            return allowed
        allowed = staying
