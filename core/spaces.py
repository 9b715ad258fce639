"""What the spaces of an environment mean for a table, and for a network."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

#: The entry of a dictionary of observations, or of the infos, that says which actions are allowed.
ACTION_MASK = "action_mask"


def table_shape(env: gymnasium.Env) -> tuple[int, int]:
    """Return S and A, the rows and columns of a table that fits an environment.

    Raises:
        TypeError: unless its observations and actions are discrete and counted from 0.
    """
    for space in single_spaces(env):
        if not isinstance(space, spaces.Discrete) or space.start != 0:
            raise TypeError(f"a table needs discrete observations and actions counted from 0, not {space}")
    observations, actions = single_spaces(env)
    return int(observations.n), int(actions.n)  # type: ignore[attr-defined]


def single_spaces(env: gymnasium.Env | gymnasium.vector.VectorEnv) -> tuple[spaces.Space, spaces.Space]:
    """Return the observation and action space of one copy of an environment."""
    if isinstance(env, gymnasium.vector.VectorEnv):
        return env.single_observation_space, env.single_action_space
    return env.observation_space, env.action_space


def encode(space: spaces.Space, observations: Any) -> NDArray[Any]:
    """Return observations as one array: what :class:`Trajectories` hold and networks read.

    Discrete ones become numbers from 0, ``[…]`` integers; boxes keep their shape, ``[…, *shape]``, images their bytes
    and everything else float32. Any other space is flattened to a vector ``[…, D]`` in Gymnasium's order, with
    discrete parts one-hot; an entry ``"action_mask"`` of a dictionary is left out.

    Raises:
        TypeError: for a space that has no such form: text, graphs, sequences.
    """
    if isinstance(space, spaces.Discrete):
        numbers = np.asarray(observations).astype(np.int64, copy=False)
        return numbers - int(space.start) if space.start else numbers
    if isinstance(space, spaces.Box):
        values = np.asarray(observations)
        return values if values.dtype == np.uint8 else values.astype(np.float32, copy=False)
    return _flatten(space, observations)


def encoded_shape(space: spaces.Space) -> tuple[int, ...]:
    """Return the shape of one encoded observation: ``()`` for a number, ``(H, W, C)`` for an image, ``(D,)``.

    Raises:
        TypeError: for a space that cannot be encoded.
    """
    if isinstance(space, spaces.Discrete):
        return ()
    if isinstance(space, spaces.Box):
        return tuple(space.shape)
    return _flatten(space, space.sample()).shape


def allowed_actions(observation: Any, info: dict[str, Any]) -> NDArray[np.bool_] | None:
    """Return ``[…, A]`` booleans, which actions an environment, or a batch, allows now; ``None`` if it does not say."""
    mask = observation.get(ACTION_MASK) if isinstance(observation, dict) else info.get(ACTION_MASK)
    return None if mask is None else np.asarray(mask).astype(bool)


def is_image(space: spaces.Space) -> bool:
    """Return whether observations have rows, columns and channels."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3


def _flatten(space: spaces.Space, values: Any) -> NDArray[np.float32]:
    """Return ``[…, D]`` from a batch ``[…]`` of any space made of boxes and discrete parts."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        return np.concatenate(
            [_flatten(part, values[name]) for name, part in parts if name != ACTION_MASK],  # type: ignore[attr-defined]
            axis=-1,
        )
    if isinstance(space, spaces.Discrete):
        return np.eye(int(space.n), dtype=np.float32)[np.asarray(values) - int(space.start)]
    if isinstance(space, spaces.MultiDiscrete):
        numbers = np.asarray(values) - space.start
        lead, choices = numbers.ndim - space.nvec.ndim, space.nvec.reshape(-1)
        numbers = numbers.reshape(*numbers.shape[:lead], -1)
        return np.concatenate(
            [np.eye(n, dtype=np.float32)[numbers[..., place]] for place, n in enumerate(choices)], axis=-1
        )
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        numbers = np.asarray(values, dtype=np.float32)
        lead = numbers.ndim - len(space.shape)
        return numbers.reshape(*numbers.shape[:lead], -1)
    raise TypeError(
        f"observations of {space} cannot be made a vector of numbers: wrap the environment so that they can"
    )
