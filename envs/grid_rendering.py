"""Grids, values and policies as text and as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrow, Rectangle
from numpy.typing import ArrayLike, NDArray

from aligngym.envs.grid_map import WALL, GridMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What stands for a move of so many rows and columns in text.
ARROWS = {(-1, 0): "↑", (0, 1): "→", (1, 0): "↓", (0, -1): "←", (-1, 1): "↗", (1, 1): "↘", (1, -1): "↙", (-1, -1): "↖"}
STAY = "o"
WALL_COLOUR, FORBIDDEN_COLOUR, TARGET_COLOUR, AGENT_COLOUR = "#2b2f36", "#c0392b", "#1b7f4b", "#e8590c"
COLOURS = colormaps["YlGnBu_r"]


def map_text(grid: GridMap, agent: int | None = None) -> str:
    """Return the map, with ``@`` where the agent is."""
    lines = [list(row) for row in grid.rows]
    if agent is not None:
        row, column = grid.cells[agent]
        lines[row][column] = "@"
    return "\n".join("".join(line) for line in lines)


def text(
    grid: GridMap,
    terminal: NDArray[np.bool_],
    moves: NDArray[np.int64],
    values: ArrayLike | None = None,
    policy: ArrayLike | None = None,
    decimals: int = 2,
) -> str:
    """Return tables of the values and of the most probable actions, right-aligned, one below the other."""
    tables = []
    if values is not None:
        # Adding zero turns −0.00 into 0.00.
        tables.append([f"{round(float(value), decimals) + 0.0:.{decimals}f}" for value in _states(grid, values)])
    if policy is not None:
        signs = np.array([ARROWS.get((int(down), int(right)), STAY) for down, right in moves])
        arrows = ["".join(signs[best]) for best in _most_probable(_states(grid, policy))]
        tables.append(["G" if end else arrow for end, arrow in zip(terminal, arrows, strict=True)])
    return "\n\n".join(_table(grid, table) for table in tables) if tables else map_text(grid)


def _table(grid: GridMap, entries: list[str]) -> str:
    width = max(len(entry) for entry in entries)
    cells = [[WALL * width if number < 0 else entries[number].rjust(width) for number in row] for row in grid.numbers]
    return "\n".join("  ".join(row) for row in cells)


def _states(grid: GridMap, array: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(array, dtype=np.float64)
    if array.shape[:1] != (grid.num_states,):
        raise ValueError(
            f"an array of shape {array.shape} does not fit a grid of {grid.num_states} cells without walls"
        )
    return array


def _most_probable(policy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return ``[S, A]``, whether an action is as probable as any, up to rounding."""
    return policy >= policy.max(axis=1, keepdims=True) * (1 - 1e-6)


def draw(
    grid: GridMap,
    terminal: NDArray[np.bool_],
    moves: NDArray[np.int64],
    values: ArrayLike | None = None,
    policy: ArrayLike | None = None,
    *,
    agent: int | None = None,
    title: str = "",
    decimals: int = 2,
    axes: Axes | None = None,
) -> Figure:
    """Draw a grid whose actions move by ``moves``, rows and columns; see :meth:`GridWorld.draw` for the others."""
    axes = _new_axes(grid, title) if axes is None else axes
    colours = _cell_colours(grid, terminal, values)
    for state, (row, column) in enumerate(grid.cells):
        corner, colour = (column - 0.5, row - 0.5), colours[state]
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=1))
        if terminal[state]:
            # Its value is 0 by definition; a number would only look like a bad one beside its neighbours.
            axes.text(column, row, "G", color="white", ha="center", va="center", fontsize=18, fontweight="bold")
            continue
        if values is not None:
            number = f"{round(float(_states(grid, values)[state]), decimals) + 0.0:.{decimals}f}"
            height = row if policy is None else row + 0.37
            axes.text(column, height, number, color=_ink(colour), ha="center", va="center", fontsize=9)
        if policy is not None:
            height = row if values is None else row - 0.1
            _draw_arrows(axes, (column, height), moves, _states(grid, policy)[state], _ink(colour))
    _draw_marks(axes, grid, terminal, agent)
    axes.set(xlim=(-0.54, grid.width - 0.46), ylim=(grid.height - 0.46, -0.54), aspect="equal", xticks=[], yticks=[])
    axes.set_frame_on(False)
    axes.set_title(title, fontsize=12)
    return axes.get_figure(root=True)  # type: ignore[return-value]


def _new_axes(grid: GridMap, title: str) -> Axes:
    """Return axes that fill a figure of a fitting size, but for the title."""
    head = 0.35 if title else 0.0
    figure = Figure(figsize=(0.9 * grid.width + 0.2, 0.9 * grid.height + 0.2 + head), dpi=160)
    FigureCanvasAgg(figure)
    return figure.add_axes((0, 0, 1, 1 - head / figure.get_figheight()))


def _cell_colours(grid: GridMap, terminal: NDArray[np.bool_], values: ArrayLike | None) -> NDArray[np.float64]:
    """Return ``[S, 4]`` colours, the lighter the higher the value; green in terminal cells, grey without values."""
    colours = np.tile([0.93, 0.94, 0.95, 1.0], (grid.num_states, 1))
    if values is not None and not terminal.all():
        shown = _states(grid, values)
        low, high = shown[~terminal].min(), shown[~terminal].max()
        # A grid of one value is drawn in the middle of the scale, and the darkest fifth is left to the walls.
        position = (shown - low) / (high - low) if high > low else np.full(len(shown), 0.5)
        colours = COLOURS(0.2 + 0.8 * position)
    colours[terminal] = to_rgba(TARGET_COLOUR)
    return colours


def _ink(colour: NDArray[np.float64]) -> str:
    """Return black or white, whichever is easier to read on a colour (relative luminance, ITU-R BT.709)."""
    return "#14181f" if colour[:3] @ (0.2126, 0.7152, 0.0722) > 0.55 else "white"


def _draw_arrows(
    axes: Axes, place: tuple[float, float], moves: NDArray[np.int64], probabilities: NDArray[np.float64], ink: str
) -> None:
    """Draw an arrow for every action, its length in proportion to its probability; a ring stands for staying."""
    x, y = place
    lengths = 0.26 * probabilities / probabilities.max()
    alone = (lengths >= 0.05).sum() == 1
    for length, move in zip(lengths, moves, strict=True):
        down, right = move / max(1.0, float(np.hypot(*move)))
        if length < 0.05:
            continue
        if (right, down) == (0, 0):
            axes.plot(x, y, marker="o", markersize=27 * length, markeredgecolor=ink, markerfacecolor="none")
            continue
        head = min(0.12, length)
        shape = {"width": 0.028, "head_width": 1.15 * head, "head_length": head, "length_includes_head": True}
        # One arrow is drawn around the middle; a gap there keeps several, and the ring, apart.
        gap = -length / 2 if alone else 0.04
        start = x + gap * right, y + gap * down
        axes.add_patch(FancyArrow(*start, right * length, down * length, color=ink, linewidth=0, **shape))


def _draw_marks(axes: Axes, grid: GridMap, terminal: NDArray[np.bool_], agent: int | None) -> None:
    """Draw walls, frames around targets and forbidden cells, and the agent."""
    for row, column in np.argwhere(grid.numbers < 0):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=WALL_COLOUR, edgecolor=WALL_COLOUR))
    for states, colour, letter in (
        (grid.forbidden, FORBIDDEN_COLOUR, "F"),
        (grid.target & ~terminal, TARGET_COLOUR, "G"),
    ):
        for row, column in grid.cells[states]:
            corner = (column - 0.46, row - 0.46)
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=colour, linewidth=2.5))
            label: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "ha": "center", "va": "center"}
            axes.add_patch(Rectangle(corner, 0.22, 0.22, facecolor=colour, linewidth=0))
            axes.text(column - 0.35, row - 0.35, letter, color="white", **label)
    if agent is not None:
        row, column = grid.cells[agent]
        axes.plot(column + 0.34, row - 0.34, marker="o", markersize=10, color=AGENT_COLOUR, markeredgecolor="white")


def rgb_array(figure: Figure) -> NDArray[np.uint8]:
    """Return a figure as ``[height, width, 3]`` bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


class Window:
    """A matplotlib window, or text on standard output where matplotlib has none to offer."""

    def __init__(self) -> None:
        from matplotlib import get_backend, pyplot
        from matplotlib.backends import BackendFilter, backend_registry

        interactive = {name.lower() for name in backend_registry.list_builtin(BackendFilter.INTERACTIVE)}
        self.pyplot = pyplot if get_backend().lower() in interactive else None
        self.figure = None if self.pyplot is None else pyplot.figure(num="aligngym")

    def show(self, grid: GridMap, agent: int) -> None:
        """Show the grid with the agent in it."""
        if self.pyplot is None or self.figure is None:
            print(map_text(grid, agent), end="\n\n", flush=True)
            return
        self.figure.clear()
        no_moves = np.empty((0, 2), dtype=np.int64)
        draw(grid, grid.target, no_moves, agent=agent, axes=self.figure.add_subplot())
        self.pyplot.pause(1 / 4)

    def close(self) -> None:
        """Close the window."""
        if self.pyplot is not None:
            self.pyplot.close(self.figure)
