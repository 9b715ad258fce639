"""What a policy makes of a model: a Markov chain with rewards, and how often it visits each state."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, eye_array
from scipy.sparse.linalg import spsolve

from aligngym.agents.endless_tasks import endless_states
from aligngym.envs.tabular_mdp import ROW_SUM_TOLERANCE, TabularMDP


def checked_policy(policy: ArrayLike, shape: tuple[int, int], name: str = "policy") -> NDArray[np.float64]:
    """Return π(a | s) as ``[S, A]`` floats.

    Raises:
        ValueError: for another shape, or a row that is no distribution over actions.
    """
    table = np.array(policy, dtype=np.float64)
    if table.shape != shape:
        raise ValueError(f"{name} has shape {table.shape}; it needs a row per state and a column per action: {shape}")
    misses = np.where((table >= 0).all(axis=1), np.abs(table.sum(axis=1) - 1), np.inf)
    worst = int(misses.argmax())
    if not misses[worst] <= ROW_SUM_TOLERANCE:
        raise ValueError(f"{name}, state {worst}: {table[worst]} is no distribution over actions")
    return table


def markov_chain(mdp: TabularMDP, policy: ArrayLike) -> tuple[csr_array, NDArray[np.float64]]:
    """Return the chain that a policy makes of a model.

    Args:
        mdp: the model.
        policy: ``[S, A]``, π(a | s).

    Returns:
        Sparse ``[S, S]``, P_π(s' | s) = Σ_a π(a | s) p(s' | s, a), and ``[S]``, r_π(s) = Σ_a π(a | s) r(s, a).

    Raises:
        ValueError: if the policy does not fit.
    """
    table = checked_policy(policy, (mdp.num_states, mdp.num_actions))
    starts = np.arange(0, table.size + 1, mdp.num_actions)
    choice = csr_array((table.ravel(), np.arange(table.size), starts), shape=(mdp.num_states, table.size))
    chain = csr_array(choice @ mdp.transitions)
    chain.eliminate_zeros()
    return chain, (table * mdp.rewards).sum(axis=1)


def state_distribution(mdp: TabularMDP, policy: ArrayLike, steps: int | None = None) -> NDArray[np.float64]:
    """Return ``[S]``, μ(s), the fraction of steps that a policy takes from each state; 0 in terminal states.

    With episodes it is μ ∝ η, η = (I − P_πᵀ)^(−1) h over states that are not terminal, h being the distribution of the
    first state; in a task that never ends, the stationary distribution μ = P_πᵀ μ. R. Sutton and A. Barto,
    *Reinforcement Learning*, 2nd ed., section 9.2.

    Args:
        mdp: the model.
        policy: ``[S, A]``, π(a | s).
        steps: if given, episodes are cut after so many steps: μ ∝ Σ_{t < steps} (P_πᵀ)^t h.

    Raises:
        ValueError: if episodes start in a state from which they may never end, although there are terminal states; or
            if a task without end has several stationary distributions. Say ``steps`` then.
    """
    chain, _ = markov_chain(mdp, policy)
    going_on = ~mdp.terminal
    first = mdp.initial * going_on
    if steps is not None:
        visits, now = np.zeros(mdp.num_states), first
        for _ in range(steps):
            visits += now
            now = (now @ chain) * going_on
        return visits / visits.sum()
    if mdp.terminal.any():
        state = stuck_state(mdp, chain)
        if state is not None:
            raise ValueError(f"episodes reach state {state} and may never end there: cut them, with steps")
        inner = csr_array(chain[going_on][:, going_on])
        visits = np.zeros(mdp.num_states)
        visits[going_on] = spsolve((eye_array(inner.shape[0]) - inner.T).tocsc(), first[going_on])
        return visits / visits.sum()
    return _stationary(chain)


def stuck_state(mdp: TabularMDP, chain: csr_array) -> int | None:
    """Return a state that episodes of the chain ``[S, S]`` reach and never end from; ``None`` if there is none."""
    stuck = endless_states(mdp, chain)
    return int(stuck[0]) if len(stuck) else None


def _stationary(chain: csr_array) -> NDArray[Any]:
    """Return the only μ with μ = Pᵀ μ and Σ μ = 1."""
    size = chain.shape[0]
    equations = np.vstack([np.eye(size) - chain.toarray().T, np.ones(size)])
    solution, _, rank, _ = np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)
    if rank < size:
        raise ValueError("this chain has several stationary distributions: say how many steps an episode has, as steps")
    return np.maximum(solution, 0.0) / np.maximum(solution, 0.0).sum()
