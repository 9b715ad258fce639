"""Tasks that may never end, and how to notice before an agent waits for their end."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order

from aligngym.envs.tabular_env import model_of
from aligngym.envs.tabular_mdp import TabularMDP


def time_limit(env: gymnasium.Env) -> float:
    """Return the steps after which Gymnasium's ``TimeLimit`` truncates an episode; infinite if there is none."""
    limit = math.inf
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            limit = min(limit, env._max_episode_steps)
        env = env.env
    return limit


def endless_states(mdp: TabularMDP, successors: csr_array | None = None) -> NDArray[np.int64]:
    """Return the states that an episode can reach, and from which it never comes to an end.

    Args:
        mdp: the model.
        successors: ``[S, S]``, not 0 where a step may lead from a state to another; by any action if not given.
    """
    if successors is None:
        # The rows s · A … s · A + A − 1 together hold the successors of s.
        successors = csr_array(
            (mdp.transitions.data, mdp.transitions.indices, mdp.transitions.indptr[:: mdp.num_actions]),
            shape=(mdp.num_states, mdp.num_states),
        )
    reached = _reachable(successors, np.flatnonzero(mdp.initial))
    return np.flatnonzero(reached & ~_reachable(csr_array(successors.T), np.flatnonzero(mdp.terminal)))


def refuse_endless_task(env: gymnasium.Env, discount: float, limit: float = math.inf) -> None:
    """Raise if the environment's model shows that episodes may never end, and that this cannot go well.

    Args:
        env: an environment; nothing is known about one that does not sample from an exact model.
        discount: γ. With 1, an agent that earns something for ever has no finite value.
        limit: steps after which the agent itself truncates an episode.

    Raises:
        ValueError: naming a state without an end.
    """
    mdp = model_of(env)
    if mdp is None or (discount < 1 and min(limit, time_limit(env)) < math.inf):
        return
    endless = endless_states(mdp)
    if len(endless) and min(limit, time_limit(env)) == math.inf:
        raise ValueError(
            f"from state {endless[0]} no episode ever ends: limit its length with max_episode_steps, "
            "or wrap the environment in gymnasium.wrappers.TimeLimit"
        )
    earning = endless[(mdp.rewards[endless] != 0).any(axis=1)]
    if len(earning):
        raise ValueError(
            f"from state {earning[0]} the task never ends and keeps paying rewards: its value is not finite with a "
            "discount of 1; take a smaller one"
        )


def _reachable(successors: csr_array, sources: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return ``[S]``, which states can be reached from the sources, which belong to them."""
    # One more state, numbered 0, that leads to all sources: a search from it is a search from all of them.
    indices = np.concatenate([sources, successors.indices]) + 1
    indptr = np.concatenate([[0], len(sources) + successors.indptr])
    size = len(indptr) - 1
    graph = csr_array((np.ones(len(indices)), indices, indptr), shape=(size, size))
    reached = np.zeros(size, dtype=bool)
    reached[breadth_first_order(graph, 0, return_predecessors=False)] = True
    return reached[1:]
