"""Agents whose policy is a table of probabilities."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.agents.evaluation import evaluate_episodes
from aligngym.core.agent import Agent
from aligngym.core.callbacks import Metrics


class TabularAgent(Agent):
    """An agent that acts by looking up a row of π(a | s).

    Attributes:
        discount: γ.
    """

    discount: float

    @property
    @abstractmethod
    def policy(self) -> NDArray[np.float64]:
        """``[S, A]``, π(a | s)."""

    def act(
        self, observations: ArrayLike, *, greedy: bool = True, generator: np.random.Generator | None = None
    ) -> NDArray[np.int64]:
        """Return an action for each state number, in the shape of ``observations``.

        Args:
            observations: state numbers.
            greedy: the most probable action, the first one of a tie; otherwise one drawn from the policy.
            generator: draws; needed if not greedy.

        Raises:
            ValueError: without a generator to draw with.
        """
        return _choose(self.policy[np.asarray(observations)], greedy, generator)

    def evaluate(
        self,
        env: gymnasium.Env,
        episodes: int = 100,
        seed: int = 0,
        *,
        greedy: bool = True,
        discount: float | None = None,
        max_steps: int = 10_000,
    ) -> Metrics:
        """Play episodes, see :func:`evaluate_episodes`; returns are discounted as the agent was told to, if not given.

        Raises:
            ValueError: if the environment shows states that the agent does not know.
        """
        policy, generator = self.policy, np.random.default_rng([seed, 1])
        space = env.observation_space
        if not isinstance(space, gymnasium.spaces.Discrete) or space.n > len(policy):
            raise ValueError(f"the agent knows the states 0 … {len(policy) - 1}, and the environment shows {space}")

        def act(observation: Any) -> int:
            return int(_choose(policy[observation], greedy, generator))

        return evaluate_episodes(act, env, episodes, seed, self.discount if discount is None else discount, max_steps)


def uniform_over_best(action_values: NDArray[np.float64], tolerance: float = 0.0) -> NDArray[np.float64]:
    """Return ``[S, A]``, the same probability for every action within ``tolerance`` of the best of its state."""
    best = action_values >= action_values.max(axis=1, keepdims=True) - tolerance
    return best / best.sum(axis=1, keepdims=True)


def _choose(
    probabilities: NDArray[np.float64], greedy: bool, generator: np.random.Generator | None
) -> NDArray[np.int64]:
    if greedy:
        return probabilities.argmax(axis=-1)
    if generator is None:
        raise ValueError(
            "drawing an action from a policy needs a generator: act(…, generator=np.random.default_rng(0))"
        )
    # The first action whose cumulative probability exceeds a uniform number in [0, total).
    cumulative = probabilities.cumsum(axis=-1)
    threshold = generator.random(cumulative.shape[:-1])[..., None] * cumulative[..., -1:]
    return (cumulative <= threshold).sum(axis=-1)
