"""A random walk between two ends."""

from __future__ import annotations

import numpy as np

from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP


class RandomWalk(TabularEnv):
    """Jump left or right at random until an end is reached; there is nothing to decide, and one action.

    States 1 … N lie in a row, with the left end, state 0, and the right end, state N + 1, on either side. A step leads
    to each of the ``reach`` states to the left and to the right with the same probability; whatever would go beyond an
    end ends there. Episodes start in the middle, state (N + 1) // 2. All rewards are 0 but for those at the ends. With
    a reach of 1 and no discount, V(s) = left + (right − left) · s / (N + 1).

    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed.: example 6.2 is ``RandomWalk(5)``, example 7.1
    ``RandomWalk(19, left_reward=-1)``, and example 9.1 ``RandomWalk(1000, reach=100, left_reward=-1)``.

    Args:
        num_states: N, without the ends.
        reach: the longest jump.
        left_reward: paid by the step to the left end.
        right_reward: paid by the step to the right end.

    Raises:
        ValueError: for fewer than one state, a reach below 1, or a reward that is not finite.
    """

    def __init__(
        self, num_states: int = 5, *, reach: int = 1, left_reward: float = 0.0, right_reward: float = 1.0
    ) -> None:
        if num_states < 1 or reach < 1:
            raise ValueError(f"a random walk needs at least one state and a reach of 1, not {num_states} and {reach}")
        states, end = np.arange(1, num_states + 1), num_states + 1
        jumps = np.concatenate([np.arange(-reach, 0), np.arange(1, reach + 1)])
        next_states = (states[:, None] + jumps).clip(0, end).ravel()
        rewards = np.select([next_states == 0, next_states == end], [left_reward, right_reward], 0.0)
        probabilities = np.full(len(next_states), 1 / len(jumps))
        outcomes = Outcomes(np.repeat(states, len(jumps)), next_states, probabilities, rewards)
        every = np.arange(num_states + 2)
        super().__init__(TabularMDP(outcomes, every == (num_states + 1) // 2, (every == 0) | (every == end), 1))
