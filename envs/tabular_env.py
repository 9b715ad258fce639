"""Environments that sample from their own exact model."""

from __future__ import annotations

from typing import Any

import gymnasium

from aligngym.envs.tabular_mdp import TabularMDP


class TabularEnv(gymnasium.Env[Any, Any]):
    """A simulator of a :class:`TabularMDP`: model and simulator cannot disagree.

    Observations are the model's states and actions its actions. A reset with ``options={"state": s}`` starts in s, for
    algorithms that must start anywhere.

    Attributes:
        mdp: the exact model.
        state: the current state.

    Args:
        mdp: the exact model.

    Raises:
        ValueError: for an action or a starting state that there is not.
    """

    def __init__(self, mdp: TabularMDP) -> None:
        self.mdp = mdp
        self.observation_space = gymnasium.spaces.Discrete(mdp.num_states)
        self.action_space = gymnasium.spaces.Discrete(mdp.num_actions)
        self.state = int(mdp.initial.argmax())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Draw a first state, or take ``options["state"]``, and return (its number, {})."""
        super().reset(seed=seed)
        start = (options or {}).get("state")
        if start is not None and not 0 <= start < self.mdp.num_states:
            raise ValueError(f"options: state {start} is not one of 0 … {self.mdp.num_states - 1}")
        self.state = self.mdp.sample_start(self.np_random) if start is None else int(start)
        self._show()
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Draw (s', r) and return (s', r, whether s' is terminal, False, {})."""
        if not 0 <= action < self.mdp.num_actions:
            raise ValueError(f"action {action} is not one of 0 … {self.mdp.num_actions - 1}")
        self.state, reward = self.mdp.sample(self.state, int(action), self.np_random)
        self._show()
        return self.state, reward, bool(self.mdp.terminal[self.state]), False, {}

    def _show(self) -> None:
        """Show the state after a reset or a step, where a subclass has a window for it."""


def model_of(env: gymnasium.Env) -> TabularMDP | None:
    """Return the model that an environment samples from, if that is all that its steps do; otherwise ``None``.

    ``gymnasium.make`` wraps environments in checks that change nothing and in a time limit, which are looked through.
    """
    while isinstance(env, gymnasium.Wrapper):
        if type(env) not in (
            gymnasium.wrappers.OrderEnforcing,
            gymnasium.wrappers.PassiveEnvChecker,
            gymnasium.wrappers.TimeLimit,
        ):
            return None
        env = env.env
    if not isinstance(env, TabularEnv) or env.render_mode == "human":
        return None
    return env.mdp if type(env).step is TabularEnv.step and type(env).reset is TabularEnv.reset else None
