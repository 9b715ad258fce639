"""How far values are from optimal, proved from the model.

Let T be the Bellman optimality operator, (TV)(s) = max_a r(s, a) + γ Σ_s' p(s' | s, a) V(s'), and V* = TV*. All that is
known about values V is their residual ‖TV − V‖∞. Multiplied by a factor, it bounds ‖V − V*‖∞:

- 1 / (1 − γ), for T is a γ-contraction (M. Puterman, *Markov Decision Processes*, 1994, theorem 6.3.1);
- L, if every episode ends within L steps whatever the actions, for T^L V = V* then;
- h / (1 − u), if an episode from any state goes on for at most h of the first k steps in the mean, and still goes on
  after them with probability at most u, whatever the actions: the sum of what the residual can do in k steps, and of
  what is left then, which is u times the error itself;
- max(−V) / (c − residual), with γ = 1, if every step costs at least c > residual: an episode of a policy with value V
  has at most that many steps in the mean, and each of them is wrong by at most the residual.

A sweep in place, from V to V', reads values of both, which are ‖V' − V‖∞ apart at most: its residual ‖TV' − V'‖∞ is at
most γ ‖V' − V‖∞, as it is for V' = TV.

The same holds for the soft operator of :mod:`aligngym.agents.soft_value_iteration`, whose penalty is one more cost.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from aligngym.envs.tabular_mdp import TabularMDP


def error_bound(
    mdp: TabularMDP, values: NDArray[np.float64], residual: float, discount: float, longest: float = math.inf
) -> float:
    """Return an upper bound of ‖V − V*‖∞, infinite if none of the proofs above applies.

    Args:
        mdp: the model.
        values: ``[S]``, V, 0 in terminal states.
        residual: at least ‖TV − V‖∞, with what rounding may have hidden (see :func:`rounding`).
        discount: γ in [0, 1].
        longest: L, as :func:`longest_episode` returns it.
    """
    if not math.isfinite(residual):
        return math.inf
    factors = [longest]
    if discount < 1:
        factors.append(1 / (1 - discount))
    elif not mdp.terminal.all():
        cost = -mdp.rewards[~mdp.terminal].max()
        if cost > residual:
            factors.append(max(0.0, -values.min()) / (cost - residual))
    return residual * min(factors)


def rounding(mdp: TabularMDP, values: NDArray[np.float64], discount: float, change: float = 0.0) -> float:
    """Return a bound of the rounding error in one application of T to values V, or to any that differ by ``change``.

    A scalar product of k terms is wrong by at most about k ε times the sum of magnitudes (N. Higham, *Accuracy and
    Stability of Numerical Algorithms*, 2nd ed., section 3.1); adding the reward, taking the residual and probabilities
    that sum to one only up to rounding are allowed for.
    """
    scale = mdp.largest_reward + discount * (max(values.max(), -values.min()) + change)
    return float((2 * mdp.longest_row + 6) * np.finfo(np.float64).eps * scale)


def longest_episode(mdp: TabularMDP) -> float:
    """Return L, the most steps an episode from any state can take; infinite if it can return to where it was."""
    ended, steps = mdp.terminal, 0
    while not ended.all():
        goes_on = mdp.transitions @ (~ended).astype(np.float64) > 0
        now_ended = ~goes_on.reshape(mdp.rewards.shape).any(axis=1)
        if np.array_equal(now_ended, ended):
            return math.inf
        ended, steps = now_ended, steps + 1
    return steps


def expected_steps(mdp: TabularMDP, discount: float, limit: int = 10_000) -> float:
    """Return h / (1 − u) of the proof above, the steps an episode can take in the mean; infinite if not found.

    It is looked for only with γ = 1 where costs prove nothing, and at most until half of all episodes have ended.

    Args:
        mdp: the model.
        discount: γ.
        limit: k at most.
    """
    if discount < 1 or mdp.terminal.all() or mdp.rewards[~mdp.terminal].max() < 0 or endless(mdp).any():
        return longest_episode(mdp)
    going_on = (~mdp.terminal).astype(np.float64)
    steps = np.zeros(mdp.num_states)
    for _ in range(limit):
        steps += going_on
        going_on = (mdp.transitions @ going_on).reshape(mdp.rewards.shape).max(axis=1)
        if going_on.max() <= 0.5:
            # Sums of positive numbers: their relative error is far below this allowance.
            return float(steps.max() / (1 - going_on.max()) * (1 + 1e-9))
    return math.inf


def endless(mdp: TabularMDP) -> NDArray[np.bool_]:
    """Return ``[S]`` booleans, the states from which some choice of actions never ends the episode."""
    going_on = ~mdp.terminal
    while True:
        leaves = (mdp.transitions @ (~going_on).astype(np.float64) > 0).reshape(mdp.rewards.shape)
        still = going_on & ~leaves.all(axis=1)
        if np.array_equal(still, going_on):
            return going_on
        going_on = still


def lowest_values(mdp: TabularMDP, discount: float) -> NDArray[np.float64]:
    """Return ``[S]``, a lower bound of V* that sweeps only raise: TV ≥ V, so that they rise towards V* (Puterman, 6.4).

    It is min_s max_a r(s, a) / (1 − γ), what is earned by always taking the highest reward; at most 0 if there are
    terminal states, and 0 there. With γ = 1 there may be none, and it is 0.
    """
    values = np.zeros(mdp.num_states)
    if discount < 1 and not mdp.terminal.all():
        lowest = float(mdp.rewards.max(axis=1)[~mdp.terminal].min()) / (1 - discount)
        values[~mdp.terminal] = min(lowest, 0.0) if mdp.terminal.any() else lowest
    return values
