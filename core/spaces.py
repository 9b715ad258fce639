"""What the spaces of an environment mean for a table."""

from __future__ import annotations

import gymnasium


def table_shape(env: gymnasium.Env) -> tuple[int, int]:
    """Return S and A, the rows and columns of a table that fits an environment.

    Raises:
        TypeError: unless its observations and actions are discrete and counted from 0.
    """
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gymnasium.spaces.Discrete) or space.start != 0:
            raise TypeError(f"a table needs discrete observations and actions counted from 0, not {space}")
    return int(env.observation_space.n), int(env.action_space.n)  # type: ignore[attr-defined]
