"""Copies of an environment, seen through one convention whatever their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from aligngym.core.spaces import allowed_actions, encode


@dataclass
class Step:
    """What one step of n copies did.

    Attributes:
        next_observations: ``[n, …]``, encoded, what each copy showed after its action, also at the end of an episode.
        rewards: ``[n]``.
        terminated: ``[n]`` booleans.
        truncated: ``[n]`` booleans.
        acted: ``[n]`` booleans, false where a copy began an episode instead of taking its action.
        next_action_mask: ``[n, A]`` booleans, the actions allowed after it, or ``None`` if the environment does not
            say; all of them where an episode ended.
    """

    next_observations: NDArray[Any]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    acted: NDArray[np.bool_]
    next_action_mask: NDArray[np.bool_] | None


class Copies:
    """Steps a vector environment, and hides in which of Gymnasium's three ways it begins its next episodes.

    In the next step (whose action is ignored), in the same step (and the last observation is in the infos), or when
    told: see https://farama.org/Vector-Autoreset-Mode.

    Attributes:
        observations: ``[n, …]``, encoded, what the next actions are chosen by.
        action_mask: ``[n, A]`` booleans, the actions allowed now, or ``None`` if the environment does not say.

    Args:
        env: the copies.

    Raises:
        TypeError: for observations that cannot be encoded, or actions that are neither discrete nor a box.
    """

    def __init__(self, env: VectorEnv) -> None:
        self.env, self.num_envs = env, env.num_envs
        self.mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.space = env.single_observation_space
        self.actions = env.single_action_space
        if not isinstance(self.actions, (spaces.Discrete, spaces.Box)):
            raise TypeError(f"actions are Discrete or a Box, and this environment's are {self.actions}: wrap it")
        self._over = np.zeros(self.num_envs, dtype=bool)
        self._steps = 0

    def reset(self, seed: int | Sequence[int]) -> None:
        """Begin an episode in every copy."""
        observations, infos = self.env.reset(seed=seed)  # type: ignore[arg-type]
        self._over = np.zeros(self.num_envs, dtype=bool)
        self._steps = 0
        self.observations = self._encoded(observations)
        self.action_mask = self._mask(observations, infos)

    def step(self, actions: NDArray[Any]) -> Step:
        """Take ``[n]`` or ``[n, D]`` actions; continuous ones are clipped to what the environment allows.

        Raises:
            FloatingPointError: for a reward or an observation that is not finite; the message says where.
            ValueError: if what comes back is not what Gymnasium's interface promises.
        """
        if isinstance(self.actions, spaces.Box):
            actions = actions.clip(self.actions.low, self.actions.high)
        self._steps += 1
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        acted = ~self._over
        rewards = self._checked_rewards(rewards)
        for name, ends in (("terminations", terminated), ("truncations", truncated)):
            if np.shape(ends) != (self.num_envs,):
                raise ValueError(f"{name} of {self.env} have shape {np.shape(ends)}, not {(self.num_envs,)}")
        over = terminated | truncated
        encoded = shown = self._encoded(observations)
        mask = self._mask(observations, infos)
        if self.mode is AutoresetMode.NEXT_STEP:
            self._over = over
        elif over.any():
            shown = encoded.copy()
            if self.mode is AutoresetMode.SAME_STEP:
                shown[over] = [encode(self.space, final) for final in infos["final_obs"][over]]
                self._check_finite(shown)
            else:
                observations, infos = self.env.reset(options={"reset_mask": over})
                encoded = self._encoded(observations)
                began = self._mask(observations, infos)
                # The infos of a reset speak of the copies that were reset.
                mask = None if mask is None or began is None else np.where(over[:, None], began, mask)
        self.observations, self.action_mask = encoded, mask
        next_mask = None if mask is None else mask | over[:, None]
        return Step(shown, rewards, terminated, truncated, acted, next_mask)

    def _checked_rewards(self, rewards: Any) -> NDArray[np.float64]:
        rewards = np.asarray(rewards, dtype=np.float64)
        if rewards.shape != (self.num_envs,):
            raise ValueError(f"rewards of {self.env} have shape {rewards.shape}, not {(self.num_envs,)}")
        if not np.isfinite(rewards).all():
            copy = int((~np.isfinite(rewards)).argmax())
            raise FloatingPointError(f"copy {copy} paid {rewards[copy]} in step {self._steps} after its reset")
        return rewards

    def _encoded(self, observations: Any) -> NDArray[Any]:
        encoded = encode(self.space, observations)
        if len(encoded) != self.num_envs:
            raise ValueError(f"{self.env} showed {len(encoded)} observations, not {self.num_envs}")
        self._check_finite(encoded)
        return encoded

    def _check_finite(self, encoded: NDArray[Any]) -> None:
        if encoded.dtype.kind == "f" and not np.isfinite(encoded).all():
            copy, *place = (int(x) for x in np.argwhere(~np.isfinite(encoded))[0])
            raise FloatingPointError(
                f"copy {copy} showed {encoded[copy, *place]} at place {place} of its observation in step {self._steps} "
                "after its reset"
            )

    def _mask(self, observations: Any, infos: dict[str, Any]) -> NDArray[np.bool_] | None:
        mask = allowed_actions(observations, infos)
        if mask is None:
            return None
        # A copy that begins its episode in the next step says nothing, and its action is ignored.
        mask[~mask.any(axis=1)] = True
        return mask
