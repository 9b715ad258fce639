"""How far values are from optimal, proved from the model.

Let T be the Bellman optimality operator, (TV)(s) = max_a r(s, a) + γ Σ_s' p(s' | s, a) V(s'), and V* = TV*. All that is
known about values V is their residual ‖TV − V‖∞. Multiplied by a factor, it bounds ‖V − V*‖∞:

- 1 / (1 − γ), for T is a γ-contraction (M. Puterman, *Markov Decision Processes*, 1994, theorem 6.3.1);
- L, if every episode ends within L steps whatever the actions, for T^L V = V* then;
- max(−V) / (c − residual), with γ = 1, if every step costs at least c > residual: an episode of a policy with value V
  has at most that many steps in the mean, and each of them is wrong by at most the residual.

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


def rounding(mdp: TabularMDP, values: NDArray[np.float64], discount: float) -> float:
    """Return a bound of the rounding error in one application of T to values V.

    A scalar product of k terms is wrong by at most about k ε times the sum of magnitudes (N. Higham, *Accuracy and
    Stability of Numerical Algorithms*, 2nd ed., section 3.1); adding the reward, taking the residual and probabilities
    that sum to one only up to rounding are allowed for.
    """
    terms = int(np.diff(mdp.transitions.indptr).max())
    scale = np.abs(mdp.rewards).max() + discount * np.abs(values).max()
    return float((2 * terms + 6) * np.finfo(np.float64).eps * scale)


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
