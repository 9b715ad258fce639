"""A grid world for Gymnasium, with its exact model and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.envs import grid_rendering
from aligngym.envs.grid_map import ZHAO_MAP, GridMap
from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Row and column steps of the actions up, right, down, left and stay.
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1), (0, 0)])

#: What a bounce inside a forbidden cell can pay.
BOUNCES = ("boundary", "boundary+forbidden")


class GridWorld(TabularEnv):
    """Walk on a grid drawn as text.

    Actions are 0 up, 1 right, 2 down, 3 left and, with ``stay``, 4 stay. An observation is the number of the agent's
    cell: cells without a wall are numbered from 0 in reading order (see :class:`GridMap`). The reward is

    - ``boundary_reward`` for a move off the grid or into a wall, which leaves the agent where it is (see ``bounce``),
      and otherwise by the cell that the agent lands in, also if it stayed there:
    - ``target_reward`` in a target,
    - ``forbidden_reward`` in a forbidden cell,
    - ``step_reward`` anywhere else.

    The defaults are those of S. Zhao, *Mathematical Foundations of Reinforcement Learning*, figure 3.4 (a), except that
    the target ends the episode.

    Args:
        map: rows of ``S`` start, ``G`` target, ``#`` wall, ``F`` forbidden and ``.`` free, or a :class:`GridMap`.
            Episodes start uniformly in the cells marked ``S``, or in all free cells if there is none.
        stay: whether there is a fifth action, to stay.
        slip: probability that a move goes off at a right angle, half of it to either side; staying never slips. The
            usual 0.8, 0.1, 0.1 is ``slip=0.2``.
        step_reward: see above, as the other rewards.
        boundary_reward: see above.
        forbidden_reward: see above.
        target_reward: see above.
        bounce: what a bounce off the boundary or a wall pays inside a forbidden cell, for which two conventions are in
            print: ``"boundary"``, ``boundary_reward`` alone, or ``"boundary+forbidden"``, the sum of
            ``boundary_reward`` and ``forbidden_reward``. Anywhere else it pays ``boundary_reward`` under both.
        terminal_target: whether entering a target ends the episode. Otherwise it is a cell like any other that pays
            ``target_reward`` each time the agent lands in it, and episodes never end.
        render_mode: ``"ansi"`` (text), ``"rgb_array"``, or ``"human"`` (a window; text on standard output where
            matplotlib has none).

    Raises:
        ValueError: for a bad map, a slip outside [0, 1], a reward that is not finite, an unknown bounce or render mode.
    """

    metadata = {"render_modes": ["ansi", "rgb_array", "human"], "render_fps": 4}  # noqa: RUF012 (Gymnasium's own name)

    def __init__(
        self,
        map: str | GridMap = ZHAO_MAP,
        *,
        stay: bool = False,
        slip: float = 0.0,
        step_reward: float = 0.0,
        boundary_reward: float = -1.0,
        forbidden_reward: float = -1.0,
        target_reward: float = 1.0,
        bounce: str = "boundary",
        terminal_target: bool = True,
        render_mode: str | None = None,
    ) -> None:
        if not 0 <= slip <= 1:
            raise ValueError(f"slip is a probability, and {slip} is not between 0 and 1")
        if bounce not in BOUNCES:
            raise ValueError(f"bounce is one of {', '.join(BOUNCES)}, not {bounce!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is ansi, rgb_array, human or None, not {render_mode!r}")
        self.map = map if isinstance(map, GridMap) else GridMap(map)
        self.moves = self._moves_of_actions(stay)
        self.num_actions = len(self.moves)
        self.slip, self.terminal_target = slip, terminal_target
        self.step_reward, self.boundary_reward = step_reward, boundary_reward
        self.forbidden_reward, self.target_reward = forbidden_reward, target_reward
        self.bounce, self.render_mode = bounce, render_mode
        super().__init__(self._make_model())
        self._window: grid_rendering.Window | None = None

    def _moves_of_actions(self, stay: bool) -> NDArray[np.int64]:
        """Return ``[A, 2]``, by how many rows and columns every action moves."""
        return MOVES if stay else MOVES[:4]

    def _make_model(self) -> TabularMDP:
        """Return the exact model, from which the environment samples."""
        next_states, rewards = self._moves()
        # Numbers of half the size let a grid of a million cells be made in less than a gigabyte.
        numbers = np.int32 if next_states.size < 2**31 else np.int64
        # The move that is made, for every action and each of: no slip, slip to the left, slip to the right.
        made = np.array([(a, (a - 1) % 4, (a + 1) % 4) if a < 4 else (a, a, a) for a in range(self.num_actions)])
        shape = (*next_states.shape, 3)
        outcomes = Outcomes(
            np.broadcast_to(np.arange(next_states.size, dtype=numbers).reshape(*next_states.shape, 1), shape).ravel(),
            next_states.astype(numbers)[:, made].ravel(),
            np.broadcast_to([1 - self.slip, self.slip / 2, self.slip / 2], shape).ravel(),
            rewards[:, made].ravel(),
        )
        terminal = self.map.target if self.terminal_target else np.zeros_like(self.map.target)
        return TabularMDP(outcomes, self.map.initial, terminal, self.num_actions)

    def _moves(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return where every move from every state leads and what it pays, both ``[S, A]``."""
        # A frame of walls around the map makes its boundary a wall like any other.
        framed = np.pad(self.map.numbers, 1, constant_values=-1)
        landing = self.map.cells[:, None, :] + self.moves[None] + 1
        reached = framed[landing[..., 0], landing[..., 1]]
        bounced = reached < 0
        next_states = np.where(bounced, np.arange(self.map.num_states)[:, None], reached)
        by_cell = np.where(self.map.forbidden, self.forbidden_reward, self.step_reward)
        by_cell = np.where(self.map.target, self.target_reward, by_cell)
        by_bounce = np.full(self.map.num_states, self.boundary_reward, dtype=np.float64)
        if self.bounce == "boundary+forbidden":
            by_bounce[self.map.forbidden] += self.forbidden_reward
        return next_states, np.where(bounced, by_bounce[:, None], by_cell[next_states])

    def render(self) -> Any:
        """Return the grid with the agent in it: text for ``ansi``, ``[height, width, 3]`` bytes for ``rgb_array``."""
        if self.render_mode == "ansi":
            return grid_rendering.map_text(self.map, self.state)
        if self.render_mode == "rgb_array":
            return grid_rendering.rgb_array(self.draw(agent=self.state))
        self._show()
        return None

    def _show(self) -> None:
        if self.render_mode == "human":
            self._window = self._window or grid_rendering.Window()
            self._window.show(self.map, self.state)

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            self._window.close()
            self._window = None

    def text(self, values: ArrayLike | None = None, policy: ArrayLike | None = None, decimals: int = 2) -> str:
        """Return values and best actions as aligned text, cell by cell, one table below the other.

        Args:
            values: ``[S]``.
            policy: ``[S, A]`` probabilities; the most probable actions are drawn as ↑ → ↓ ← and o for staying.
            decimals: digits after the point.
        """
        return grid_rendering.text(self.map, self.mdp.terminal, self.moves, values, policy, decimals)

    def draw(
        self,
        values: ArrayLike | None = None,
        policy: ArrayLike | None = None,
        *,
        agent: int | None = None,
        title: str = "",
        decimals: int = 2,
        axes: Axes | None = None,
    ) -> Figure:
        """Draw the grid as a heat map of values with an arrow for every action, as long as it is probable.

        Args:
            values: ``[S]``, the values of the states, or anything else there is of each, such as how often it was
                visited.
            policy: ``[S, A]`` probabilities.
            agent: the number of a cell to mark.
            title: above the picture.
            decimals: digits after the point of a value.
            axes: matplotlib axes to draw into; a new figure if not given.

        Returns:
            The matplotlib figure, to be saved with ``figure.savefig("grid.png")``.
        """
        return grid_rendering.draw(
            self.map,
            self.mdp.terminal,
            self.moves,
            values,
            policy,
            agent=agent,
            title=title,
            decimals=decimals,
            axes=axes,
        )
