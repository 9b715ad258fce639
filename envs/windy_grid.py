"""A grid with a wind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aligngym.envs.grid_world import MOVES, GridWorld
from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_mdp import TabularMDP
from aligngym.envs.textbook_grids import every_step

#: Row and column steps of the actions up right, down right, down left and up left.
DIAGONALS = np.array([(-1, 1), (1, 1), (1, -1), (-1, -1)])

WINDY_MAP = "\n".join(["." * 10] * 3 + ["S......G.."] + ["." * 10] * 3)


class WindyGrid(GridWorld):
    """The 7 × 10 grid with an upward wind, at −1 a step.

    A step adds the move and the wind of the column that it departs from, and ends at the nearest cell of the grid. The
    shortest path takes 15 steps, and 7 with king's moves. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed.,
    example 6.5 and exercises 6.9 and 6.10.

    Actions are 0 up, 1 right, 2 down, 3 left; then, with ``kings_moves``, 4 up right, 5 down right, 6 down left, 7 up
    left; and last, with ``stay``, to move with the wind only.

    Args:
        kings_moves: whether there are diagonal moves (exercise 6.9).
        stay: whether there is one more action, which does not move (the ninth one of exercise 6.9).
        stochastic: whether the wind, where there is any, is one cell weaker or stronger a third of the time each
            (exercise 6.10).
        wind: cells that each column's wind moves the agent up.
        render_mode: see :class:`GridWorld`.

    Raises:
        ValueError: for a wind that is not one integer a column.
    """

    def __init__(
        self,
        *,
        kings_moves: bool = False,
        stay: bool = False,
        stochastic: bool = False,
        wind: Sequence[int] = (0, 0, 0, 1, 1, 1, 2, 2, 1, 0),
        render_mode: str | None = None,
    ) -> None:
        self.wind = np.array(wind)
        if self.wind.shape != (10,) or self.wind.dtype.kind != "i":
            raise ValueError(f"wind is one integer for each of the 10 columns, not {wind}")
        self.kings_moves, self.stochastic = kings_moves, stochastic
        super().__init__(WINDY_MAP, stay=stay, render_mode=render_mode, **every_step(-1.0))

    def _moves_of_actions(self, stay: bool) -> NDArray[np.int64]:
        return np.concatenate([MOVES[:4], DIAGONALS[: 4 * self.kings_moves], MOVES[4 : 4 + stay]])

    def _make_model(self) -> TabularMDP:
        gusts = np.array([-1, 0, 1] if self.stochastic else [0])
        wind = self.wind[self.map.cells[:, 1]]
        rising = wind[:, None] + gusts * (wind != 0)[:, None]
        # [S, A, gust, 2]: a cell, a move, and what the wind does to it.
        landing = np.repeat((self.map.cells[:, None] + self.moves)[:, :, None], len(gusts), axis=2)
        landing[..., 0] -= rising[:, None, :]
        landing = landing.clip(0, [self.map.height - 1, self.map.width - 1])
        next_states = self.map.numbers[landing[..., 0], landing[..., 1]].ravel()
        rows = np.repeat(np.arange(self.map.num_states * len(self.moves)), len(gusts))
        probabilities = np.full(len(rows), 1 / len(gusts))
        outcomes = Outcomes(rows, next_states, probabilities, np.full(len(rows), self.step_reward))
        return TabularMDP(outcomes, self.map.initial, self.map.target, len(self.moves))
