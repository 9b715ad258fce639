"""Mazes whose walls move while an agent learns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligngym.envs.grid_map import GridMap
from aligngym.envs.grid_world import GridWorld


class ChangingMaze(GridWorld):
    """A maze whose map is replaced after given numbers of steps, counted over all episodes.

    States are the cells that are open in any of the maps, in reading order, so that their numbers never change. A state
    that is a wall at present cannot be entered; an agent around which a wall was built walks out of it.

    Steps go on being counted after a reset, seeded or not. ``reset(options={"steps": n})`` sets the counter, for
    instance back to 0, or to where a saved agent stopped.

    Attributes:
        mdp: the exact model of the present map.
        map: the present map.
        maps: all of them, with the same state numbers.
        steps: how many have been taken.

    Args:
        maps: two or more maps of one shape.
        switch_after: the numbers of steps after which the second map, the third and so on replaces the one before.
        step_reward: see :class:`GridWorld`, as the other rewards.
        boundary_reward: see there.
        target_reward: see there.
        render_mode: see there.

    Raises:
        ValueError: for maps of different shapes, or switches that are not increasing, or too many or too few of them.
    """

    def __init__(
        self,
        maps: Sequence[str | GridMap],
        switch_after: Sequence[int],
        *,
        step_reward: float = 0.0,
        boundary_reward: float = 0.0,
        target_reward: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        if len(switch_after) != len(maps) - 1 or not maps:
            raise ValueError(f"{len(maps)} maps need one switch less, not {len(switch_after)}")
        if any(late <= early for early, late in zip((0, *switch_after), switch_after, strict=False)):
            raise ValueError(f"switch_after are increasing numbers of steps from 1, not {list(switch_after)}")
        self.maps = with_common_numbers(maps)
        self.switch_after, self.steps = list(switch_after), 0
        super().__init__(
            self.maps[0],
            step_reward=step_reward,
            boundary_reward=boundary_reward,
            target_reward=target_reward,
            render_mode=render_mode,
        )
        self._models = []
        for grid in self.maps:
            self.map = grid
            self._models.append(self._make_model())
        self._count(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Start an episode, in ``options["state"]`` and with ``options["steps"]`` taken before, if they are given."""
        steps = (options or {}).get("steps", self.steps)
        if steps < 0:
            raise ValueError(f"options: steps is how many have been taken, and {steps} is negative")
        self._count(steps)
        return super().reset(seed=seed, options=options)

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Take a step on the present map, then replace the map if it is time to."""
        result = super().step(action)
        self._count(self.steps + 1)
        return result

    def _count(self, steps: int) -> None:
        self.steps = steps
        present = bisect_right(self.switch_after, steps)
        self.map, self.mdp = self.maps[present], self._models[present]


class BlockingMaze(ChangingMaze):
    """A maze whose short path is blocked and a longer one opened: 10 steps, then 16.

    The wall moves after 1000 steps. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., example 8.2 and figure
    8.4.

    Args:
        switch_after: steps until the wall moves.
        render_mode: see :class:`GridWorld`.
    """

    def __init__(self, switch_after: int = 1000, *, render_mode: str | None = None) -> None:
        super().__init__([wall_maze("########."), wall_maze(".########")], [switch_after], render_mode=render_mode)


class ShortcutMaze(ChangingMaze):
    """A maze in which a shorter path opens without disturbing the longer one: 16 steps, then 10.

    The wall opens after 3000 steps. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., example 8.3 and figure
    8.5.

    Args:
        switch_after: steps until the wall opens.
        render_mode: see :class:`GridWorld`.
    """

    def __init__(self, switch_after: int = 3000, *, render_mode: str | None = None) -> None:
        super().__init__([wall_maze(".########"), wall_maze(".#######.")], [switch_after], render_mode=render_mode)


def wall_maze(wall: str) -> str:
    """Return the 6 × 9 maze of the book's figures 8.4 and 8.5, whose fourth row is a wall."""
    return "\n".join(["........G", *["." * 9] * 2, wall, "." * 9, "...S....."])


def with_common_numbers(maps: Sequence[str | GridMap]) -> list[GridMap]:
    """Return maps in which a cell that is open in any of them is a state, of the same number in all of them.

    A state that is a wall in a map has a cell there, but no entry in ``numbers``: nothing leads to it.

    Raises:
        ValueError: if the maps have different shapes.
    """
    grids = [map if isinstance(map, GridMap) else GridMap(map, f"map {place}") for place, map in enumerate(maps, 1)]
    for place, grid in enumerate(grids, 1):
        if grid.numbers.shape != grids[0].numbers.shape:
            raise ValueError(f"map {place} has shape {grid.numbers.shape}, and map 1 {grids[0].numbers.shape}")
    is_open = np.any([grid.numbers >= 0 for grid in grids], axis=0)
    numbers = np.cumsum(is_open).reshape(is_open.shape) - 1
    return [_renumbered(grid, np.argwhere(is_open), numbers) for grid in grids]


def _renumbered(grid: GridMap, cells: NDArray[np.int64], numbers: NDArray[np.int64]) -> GridMap:
    renumbered, known = copy(grid), numbers[grid.numbers >= 0]
    for name in ("target", "forbidden", "initial"):
        by_state = np.zeros(len(cells), dtype=getattr(grid, name).dtype)
        by_state[known] = getattr(grid, name)
        setattr(renumbered, name, by_state)
    renumbered.cells, renumbered.numbers = cells, np.where(grid.numbers >= 0, numbers, -1)
    return renumbered
