"""Baird's counterexample, on which off-policy learning with a linear approximation diverges."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP


def _constant(values: ArrayLike) -> NDArray[np.float64]:
    array = np.array(values, dtype=np.float64)
    array.flags.writeable = False
    return array


class BairdsCounterexample(TabularEnv):
    """Seven states, two actions, rewards of 0, no end, and a linear approximation that could be exact.

    Action 0, *dashed*, leads to one of the states 0 … 5, each as likely; action 1, *solid*, leads to state 6; both from
    any state. Episodes start in any state. The discount is 0.99. All values are 0, and the weights 0 represent them.

    The behaviour visits all states equally often, the target policy always takes the solid action. With
    V(s) = x(s) · w, the expected semi-gradient update of off-policy TD(0), the same as the synchronous one of dynamic
    programming, is w ← w + α A w with

        A = 1/7 Σ_s x(s) (γ x(6) − x(s))ᵀ,

    which has an eigenvalue with a positive real part: it diverges for every α > 0. R. Sutton and A. Barto,
    *Reinforcement Learning*, 2nd ed., figures 11.1 and 11.2; L. Baird, *Residual algorithms*, 1995.

    Attributes:
        features: ``[7, 8]``, x(s), such that V(s) = 2 w_s + w_7 for s < 6 and V(6) = w_6 + 2 w_7.
        initial_weights: ``[8]``, the book's (1, 1, 1, 1, 1, 1, 10, 1).
        behaviour: ``[7, 2]``, dashed with probability 6/7 and solid with 1/7.
        target: ``[7, 2]``, always solid.
        discount: 0.99.
    """

    features = _constant([*(2 * np.eye(7, 8) + np.eye(8)[7])[:6].tolist(), [0, 0, 0, 0, 0, 0, 1, 2]])
    initial_weights = _constant([1, 1, 1, 1, 1, 1, 10, 1])
    behaviour = _constant([[6 / 7, 1 / 7]] * 7)
    target = _constant([[0.0, 1.0]] * 7)
    discount = 0.99

    def __init__(self) -> None:
        # In every state, six outcomes of the dashed action and one of the solid one.
        rows = (2 * np.arange(7)[:, None] + np.array([0, 0, 0, 0, 0, 0, 1])).ravel()
        probabilities = np.tile([1 / 6] * 6 + [1.0], 7)
        outcomes = Outcomes(rows, np.tile(np.arange(7), 7), probabilities, np.zeros(49))
        super().__init__(TabularMDP(outcomes, np.full(7, 1 / 7), np.zeros(7, dtype=bool), 2))
