"""The grid worlds of the textbooks.

S&B is R. Sutton and A. Barto, *Reinforcement Learning: An Introduction*, 2nd ed., 2018; Zhao is S. Zhao, *Mathematical
Foundations of Reinforcement Learning*, 2025.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligngym.envs.grid_map import ZHAO_MAP
from aligngym.envs.grid_world import GridWorld


class ZhaoGrid(GridWorld):
    """The 5 × 5 grid with forbidden cells of Zhao, figure 3.4: five actions, and a task that never ends.

    Forbidden cells can be entered. The target pays each time the agent lands or stays in it, so with discount γ its
    optimal value is 1 / (1 − γ).

    Args:
        forbidden_reward: −1 in figures 3.4 (a) to (c), −10 in (d).
        render_mode: see :class:`GridWorld`.
        others: any other argument of :class:`GridWorld`, such as ``terminal_target=True`` for figure 7.2.
    """

    def __init__(self, *, forbidden_reward: float = -1.0, render_mode: str | None = None, **others: Any) -> None:
        arguments = {"stay": True, "terminal_target": False, **others}
        super().__init__(ZHAO_MAP, forbidden_reward=forbidden_reward, render_mode=render_mode, **arguments)


class CornerGrid(GridWorld):
    """The 4 × 4 grid that ends in two opposite corners, at −1 a step. S&B, example 4.1 and figure 4.1.

    Args:
        render_mode: see :class:`GridWorld`.
    """

    def __init__(self, *, render_mode: str | None = None) -> None:
        super().__init__("G...\n....\n....\n...G", render_mode=render_mode, **every_step(-1.0))


class TwoSpecialStates(GridWorld):
    """The 5 × 5 grid with two cells from which every action jumps. S&B, examples 3.5 and 3.8.

    Every action in A, row 1 and column 2, pays +10 and leads to row 5 and column 2; every action in B, row 1 and
    column 4, pays +5 and leads to row 3 and column 4. A move off the grid pays −1, any other 0. The task never ends.
    A and B are drawn as targets; episodes start uniformly in the other cells.

    Args:
        render_mode: see :class:`GridWorld`.
    """

    #: From which cell to which, and the reward; rows and columns from 0.
    jumps = (((0, 1), (4, 1), 10.0), ((0, 3), (2, 3), 5.0))

    def __init__(self, *, render_mode: str | None = None) -> None:
        # Landing in A or B pays nothing: they pay for leaving.
        grid = "\n".join([".G.G.", *["....."] * 4])
        super().__init__(grid, target_reward=0.0, terminal_target=False, render_mode=render_mode)

    def _moves(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        next_states, rewards = super()._moves()
        for cell, landing, reward in self.jumps:
            next_states[self.map.numbers[cell]], rewards[self.map.numbers[cell]] = self.map.numbers[landing], reward
        return next_states, rewards


class CliffWalking(GridWorld):
    """The 4 × 12 grid whose lower edge is a cliff. S&B, example 6.6.

    A step costs 1. A step off the cliff costs 100 and leads back to the start, and the episode goes on. The best path
    takes 13 steps, along the edge. This is Gymnasium's ``CliffWalking-v1``, states and actions included.

    Args:
        slip: see :class:`GridWorld`; 2/3 is Gymnasium's slippery cliff.
        render_mode: see :class:`GridWorld`.
    """

    def __init__(self, *, slip: float = 0.0, render_mode: str | None = None) -> None:
        grid = "\n".join(["." * 12] * 3 + ["S" + "F" * 10 + "G"])
        rewards = {**every_step(-1.0), "forbidden_reward": -100.0}
        super().__init__(grid, slip=slip, render_mode=render_mode, **rewards)

    def _moves(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        next_states, rewards = super()._moves()
        fallen = self.map.forbidden[next_states]
        start = int(self.map.initial.argmax())
        return np.where(fallen, start, next_states), np.where(fallen, self.forbidden_reward, rewards)


class DynaMaze(GridWorld):
    """The 6 × 9 maze in which Dyna learns: reward 1 at the goal, 0 before. S&B, example 8.1 and figure 8.2.

    The shortest path takes 14 steps. The book's discount is 0.95.

    Args:
        render_mode: see :class:`GridWorld`.
    """

    def __init__(self, *, render_mode: str | None = None) -> None:
        grid = ".......#G\n..#....#.\nS.#....#.\n..#......\n.....#...\n........."
        super().__init__(grid, boundary_reward=0.0, render_mode=render_mode)


def every_step(reward: float) -> dict[str, Any]:
    """Return arguments of :class:`GridWorld` with which every step pays the same, wherever it leads."""
    return {name: reward for name in ("step_reward", "boundary_reward", "forbidden_reward", "target_reward")}
