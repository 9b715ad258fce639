"""Thousands of grid worlds at once."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import AutoresetMode

from aligngym.envs.grid_map import ZHAO_MAP, GridMap
from aligngym.envs.grid_world import GridWorld
from aligngym.envs.vector_tabular_env import VectorTabularEnv


class VectorGridWorld(VectorTabularEnv):
    """Copies of one :class:`GridWorld`, stepped at once: see :class:`VectorTabularEnv`.

    ``gymnasium.make_vec("aligngym/GridWorld-v0", num_envs=4096, slip=0.2)`` makes one, with the registered time limit.

    Args:
        num_envs: the number of copies.
        map: of the grid world.
        max_episode_steps: steps after which an episode is truncated; ``None`` or −1 for no limit.
        autoreset_mode: when a copy whose episode is over begins another one.
        world: the other arguments of :class:`GridWorld`. A ``render_mode`` may be ``"ansi"`` or ``"rgb_array"``.

    Raises:
        TypeError: for an argument that :class:`GridWorld` does not have, or ``render_mode="human"``.
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        num_envs: int = 1,
        map: str | GridMap = ZHAO_MAP,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        **world: Any,
    ) -> None:
        super().__init__(
            GridWorld(map, **world), num_envs, max_episode_steps=max_episode_steps, autoreset_mode=autoreset_mode
        )
