"""How good is a way of acting? Played out, in one implementation for every agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from aligngym.core.callbacks import Metrics
from aligngym.core.spaces import allowed_actions


def evaluate_episodes(
    act: Callable[..., Any],
    env: gymnasium.Env,
    episodes: int = 100,
    seed: int = 0,
    discount: float = 1.0,
    max_steps: int = 10_000,
    *,
    action_masks: bool = False,
) -> Metrics:
    """Play whole episodes and return the mean return with its standard error.

    A truncated episode counts with the rewards it collected: the time limit stopped the recording, not the task, so
    where ``truncated`` is above 0 the mean return is that of the limited task.

    Args:
        act: gives an action for an observation.
        env: the environment.
        episodes: how many, at least 1.
        seed: of the environment; the same seed plays the same episodes.
        discount: γ of the return Σ γ^t r_t, in [0, 1].
        max_steps: truncates episodes of environments without a time limit of their own.
        action_masks: whether ``act`` is told as well which actions are allowed: ``[A]`` booleans, or ``None`` where the
            environment does not say.

    Returns:
        ``return`` and its ``return_standard_error`` (s / √n; NaN for one episode), ``length`` in steps, and
        ``truncated``, the fraction of episodes that did not end by themselves.

    Raises:
        ValueError: for fewer than one episode or step.
    """
    if episodes < 1 or max_steps < 1:
        raise ValueError(f"evaluation needs at least one episode and step, not {episodes} and {max_steps}")
    generator = np.random.default_rng(seed)
    returns, lengths, truncations = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes)
    for episode in range(episodes):
        observation, info = env.reset(seed=int(generator.integers(2**31)))
        terminated = truncated = False
        length = 0
        while not (terminated or truncated):
            known = (observation, allowed_actions(observation, info)) if action_masks else (observation,)
            observation, reward, terminated, truncated, info = env.step(act(*known))
            returns[episode] += discount**length * float(reward)
            length += 1
            truncated = truncated or length >= max_steps
        lengths[episode], truncations[episode] = length, not terminated
    error = returns.std(ddof=1) / np.sqrt(episodes) if episodes > 1 else np.nan
    return {
        "return": float(returns.mean()),
        "return_standard_error": float(error),
        "length": float(lengths.mean()),
        "truncated": float(truncations.mean()),
    }
