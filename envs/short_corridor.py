"""A corridor in which only a random policy is good, and the blindness that makes it so."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike

from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP


class ShortCorridor(TabularEnv):
    """Three states in a row and a goal, at −1 a step; in the second state the actions are switched.

    Actions are 0 left and 1 right. From the start, state 0, left stays and right leads to state 1; from there *right*
    leads back and *left* on to state 2; from there left leads back and right to the goal, state 3.

    An agent that sees the state takes 3 steps. The book's agent cannot tell the states apart: see
    ``AliasedStates(ShortCorridor(), [0, 0, 0, 0])``. If it goes right with probability p, the value of the start is
    (2p − 4) / (p (1 − p)), undiscounted, which is best at p = 2 − √2 ≈ 0.586 with −6 − 4√2 ≈ −11.66.
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., example 13.1.
    """

    def __init__(self) -> None:
        next_states = np.array([0, 1, 2, 0, 1, 3])
        outcomes = Outcomes(np.arange(6), next_states, np.ones(6), -np.ones(6))
        super().__init__(TabularMDP(outcomes, np.arange(4) == 0, np.arange(4) == 3, 2))


class AliasedStates(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Show the agent a label of the state instead of its number: the same one in states it cannot tell apart.

    What the agent sees is then no Markov state in general, so ``mdp`` is refused: the exact model is that of the
    wrapped environment, ``env.unwrapped.mdp``, and a policy for labels is one for its states through ``labels``:
    ``policy[labels]``.

    Attributes:
        labels: ``[S]``.

    Args:
        env: an environment with discrete observations counted from 0.
        labels: ``[S]`` integers from 0, what is seen in each state.

    Raises:
        TypeError: for other observations.
        ValueError: if there is not one integer from 0 for each state.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], labels: ArrayLike) -> None:
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, gymnasium.spaces.Discrete) or space.start != 0:
            raise TypeError(f"labels are for discrete states counted from 0, and the environment shows {space}")
        self.labels = np.array(labels)
        if self.labels.shape != (space.n,) or self.labels.dtype.kind not in "iu" or self.labels.min() < 0:
            raise ValueError(f"labels are {space.n} integers from 0, one for each state, not {self.labels}")
        self.observation_space = gymnasium.spaces.Discrete(int(self.labels.max()) + 1)

    def observation(self, observation: int) -> int:
        """Return the label of a state."""
        return int(self.labels[observation])

    @property
    def mdp(self) -> TabularMDP:
        """Refused, see above.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "an environment with aliased states has no model of what it shows; env.unwrapped.mdp is that of its states"
        )
