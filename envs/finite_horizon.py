"""Problems that end after a fixed number of steps."""

from __future__ import annotations

from typing import Any

import gymnasium

from aligngym.envs.tabular_mdp import TabularMDP


class FiniteHorizon(gymnasium.Wrapper[Any, Any, Any, Any]):
    """End every episode after ``horizon`` steps, and show the agent the time.

    An observation is t · S + s, as in :meth:`TabularMDP.unrolled`. The end at the horizon belongs to the problem, so it
    is a termination, not a truncation, and the value of what follows is 0.

    Attributes:
        mdp: the exact model, unrolled over the horizon.

    Args:
        env: an environment with an exact model.
        horizon: steps, at least 1.

    Raises:
        TypeError: if the environment has no exact model.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], horizon: int) -> None:
        super().__init__(env)
        model = TabularMDP.from_env(env)
        self.horizon, self.time = horizon, 0
        self.num_states = model.num_states
        self.mdp = model.unrolled(horizon)
        self.observation_space = gymnasium.spaces.Discrete(self.mdp.num_states)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Start an episode at time 0."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.time = 0
        return int(observation), info

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Take a step; the one that reaches the horizon terminates."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.time += 1
        over = self.time >= self.horizon
        return self.time * self.num_states + int(observation), float(reward), terminated or over, truncated, info
