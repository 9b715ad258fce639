"""The gambler's problem."""

from __future__ import annotations

import numpy as np

from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP


class GamblersProblem(TabularEnv):
    """Bet on a coin until the capital is lost or reaches a goal, which pays 1. Undiscounted.

    A state is the capital, 0 … goal. Action a stakes a + 1: the stake is won with heads and lost with tails. A stake of
    more than there is, or than is missing to the goal, counts as the largest one allowed, min(s, goal − s). A stake of
    0, which the book allows, is left out: it leads nowhere, and with a discount of 1 a policy that never bets would
    never end. Episodes start with a capital drawn uniformly from 1 … goal − 1.

    V(s) is the probability of reaching the goal. With a biased coin, p_heads < 1/2, many stakes tie; staking as much as
    is allowed is optimal everywhere (L. Dubins and L. Savage, *How to Gamble If You Must*, 1965).
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., example 4.3.

    Args:
        p_heads: the probability of winning a bet.
        goal: the capital to reach, at least 2.

    Raises:
        ValueError: for a probability outside [0, 1] or a goal below 2.
    """

    def __init__(self, p_heads: float = 0.4, goal: int = 100) -> None:
        if not 0 <= p_heads <= 1:
            raise ValueError(f"p_heads is a probability, and {p_heads} is not between 0 and 1")
        if goal < 2:
            raise ValueError(f"goal is a capital to reach, at least 2, not {goal}")
        self.p_heads, self.goal = p_heads, goal
        num_actions = goal // 2
        capital = np.arange(1, goal)[:, None]
        stakes = np.minimum(np.arange(1, num_actions + 1), np.minimum(capital, goal - capital))
        rows = (capital * num_actions + np.arange(num_actions)).ravel()
        next_states = np.concatenate([(capital + stakes).ravel(), (capital - stakes).ravel()])
        outcomes = Outcomes(
            np.tile(rows, 2),
            next_states,
            np.repeat([p_heads, 1 - p_heads], len(rows)),
            (next_states == goal).astype(np.float64),
        )
        terminal = np.isin(np.arange(goal + 1), (0, goal))
        super().__init__(TabularMDP(outcomes, ~terminal / (goal - 1), terminal, num_actions))
