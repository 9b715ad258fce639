"""Every trajectory of a small problem, and every preference between two of them.

With all trajectories τ listed, the optimum of an algorithm is a sum and not an estimate. The policy that maximises
E[R(τ)] − β KL(π ‖ π_ref) is π*(τ) ∝ π_ref(τ) exp(R(τ)/β), and it is also the optimum of DPO on preferences that follow
the Bradley–Terry model with reward R (R. Rafailov et al., *Direct preference optimization*, 2023, eq. 4 and theorem 1).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from aligngym.core.trajectories import PADDING, Preferences, Trajectories
from aligngym.envs.tabular_mdp import TabularMDP


def enumerate_trajectories(mdp: TabularMDP, horizon: int, limit: int = 100_000) -> Trajectories:
    """List the trajectories of at most ``horizon`` steps of a deterministic model with one start state.

    Observations are states of ``mdp.unrolled(horizon)``, t · S + s. A row ends, terminated, in a terminal state or at
    the horizon; behind that are padding, zeros and a false mask. All rows share one ``group``. Rows are in
    lexicographic order of their actions.

    Args:
        mdp: the model.
        horizon: the longest trajectory, T.
        limit: the most trajectories to list.

    Raises:
        ValueError: if there are several start states or outcomes, if the episode has ended before it began, or if there
            are more trajectories than ``limit``.
    """
    if horizon < 1:
        raise ValueError(f"horizon is a number of steps, at least 1, not {horizon}")
    next_states, start = _deterministic(mdp)
    observations = np.zeros((1, 0), dtype=np.int64)
    actions, rewards = observations, np.zeros((1, 0))
    states = np.array([start])
    for time in range(horizon):
        going = ~mdp.terminal[states]
        copies = np.where(going, mdp.num_actions, 1)
        if copies.sum() > limit:
            raise ValueError(
                f"more than {limit} trajectories of {horizon} steps: already {copies.sum()} at step {time + 1}; "
                "shorten the horizon or raise limit"
            )
        parents = np.repeat(np.arange(len(states)), copies)
        # The copies of a row take the actions 0, 1, …; a row that has ended has one copy, whose "action" is unused.
        action = np.arange(len(parents)) - np.repeat(np.cumsum(copies) - copies, copies)
        state, acting = states[parents], going[parents]
        observation = np.where(acting, time * mdp.num_states + state, PADDING)
        observations = np.column_stack([observations[parents], observation])
        actions = np.column_stack([actions[parents], np.where(acting, action, PADDING)])
        rewards = np.column_stack([rewards[parents], np.where(acting, mdp.rewards[state, action], 0.0)])
        states = np.where(acting, next_states[state, action], state)
    return as_trajectories(observations, actions, rewards)


def _deterministic(mdp: TabularMDP) -> tuple[NDArray[np.int64], int]:
    """Return ``[S, A]`` successors and the start state, or say what is random."""
    starts = np.flatnonzero(mdp.initial)
    if len(starts) > 1:
        raise ValueError(f"trajectories are listed from one start state, and there are {len(starts)}: {starts[:5]} …")
    if mdp.terminal[starts[0]]:
        raise ValueError(f"the start state {starts[0]} is terminal: there is no trajectory")
    successors = np.diff(mdp.transitions.indptr)
    if successors.max() > 1:
        state, action = divmod(int(successors.argmax()), mdp.num_actions)
        raise ValueError(
            f"state {state}, action {action} leads to {successors.max()} states: only the trajectories of a "
            "deterministic model can be listed"
        )
    return mdp.transitions.indices.reshape(mdp.rewards.shape).astype(np.int64), int(starts[0])


def as_trajectories(
    observations: NDArray[np.int64], actions: NDArray[np.int64], rewards: NDArray[np.float64]
) -> Trajectories:
    """Return ``[B, T]`` arrays as one group of trajectories, each of which terminates with its last action."""
    mask = torch.as_tensor(actions != PADDING)
    following = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return Trajectories(
        observations=torch.as_tensor(observations),
        actions=torch.as_tensor(actions),
        mask=mask,
        rewards=torch.as_tensor(rewards, dtype=torch.float32),
        terminated=mask & ~following,
        truncated=torch.zeros_like(mask),
        group=torch.zeros(len(mask), dtype=torch.int64),
    )


def bradley_terry_preferences(
    trajectories: Trajectories,
    scale: float = 1.0,
    probabilities: torch.Tensor | None = None,
    limit: int = 2_000_000,
) -> Preferences:
    """List every ordered pair i ≠ j, weighted with the probability of drawing the pair and preferring i.

    The preference is Bradley and Terry's (*Rank analysis of incomplete block designs*, 1952): P(i ≻ j) = σ(scale ·
    (R_i − R_j)), with R the undiscounted return. Two trajectories are drawn independently and drawn again if they are
    the same, so w_ij = 2 p_i p_j P(i ≻ j) / Σ_{k≠l} p_k p_l. The weights sum to one.

    Args:
        trajectories: B of them, with rewards.
        scale: how decisive rewards are; 0 prefers blindly.
        probabilities: ``[B]``, p, not necessarily normalised; uniform if not given.
        limit: the most pairs to list.

    Returns:
        B (B − 1) pairs with ``[B (B − 1)]`` weights.

    Raises:
        ValueError: for fewer than two trajectories, more pairs than ``limit``, or bad probabilities.
    """
    count = len(trajectories)
    if count < 2:
        raise ValueError(f"a preference is between two trajectories, and there is {count}")
    if count * (count - 1) > limit:
        raise ValueError(f"{count} trajectories make {count * (count - 1)} pairs, more than the limit of {limit}")
    p = torch.ones(count) if probabilities is None else probabilities
    if p.shape != (count,) or not (torch.isfinite(p) & (p >= 0)).all() or (p > 0).sum() < 2:
        raise ValueError(f"probabilities must be {count} numbers ≥ 0, at least two of them positive")
    first, second = (~torch.eye(count, dtype=torch.bool)).nonzero(as_tuple=True)
    drawn = p.double()[first] * p.double()[second]
    returns = trajectories.returns.double()
    preferred = torch.sigmoid(scale * (returns[first] - returns[second]))
    weights = 2 * drawn * preferred / drawn.sum()
    return Preferences(trajectories[first], trajectories[second], weights.float())
