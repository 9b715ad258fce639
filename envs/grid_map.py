"""Grid worlds drawn as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

START, TARGET, WALL, FORBIDDEN, FREE = "S", "G", "#", "F", "."
MEANINGS = {START: "start", TARGET: "target", WALL: "wall", FORBIDDEN: "forbidden", FREE: "free"}

#: The 5 × 5 grid of S. Zhao, *Mathematical Foundations of Reinforcement Learning*, figure 3.4.
ZHAO_MAP = "S....\n.FF..\n..F..\n.FGF.\n.F..."


class GridMap:
    """A text map: ``S`` start, ``G`` target, ``#`` wall, ``F`` forbidden (may be entered), ``.`` free.

    States are the cells without a wall, numbered from 0 in reading order.

    Attributes:
        rows: the lines of the text.
        cells: ``[S, 2]``, row and column of every state, from 0.
        numbers: ``[height, width]``, the state in every cell, −1 in walls.
        target: ``[S]`` booleans.
        forbidden: ``[S]`` booleans.
        initial: ``[S]``, uniform over the cells marked ``S``, or over all free cells if none is.

    Args:
        text: rows of equal length, separated by newlines; blank lines around them are ignored.
        place: what to call the map in error messages, such as its file.

    Raises:
        ValueError: for an empty map, rows of different lengths, an unknown character, no target, or nowhere to start;
            the message names row and column, counted from 1.
    """

    def __init__(self, text: str, place: str = "map") -> None:
        # Only whole blank lines go: a blank inside a row is an unknown character, and is reported as one.
        lines = [line.rstrip("\r") for line in text.split("\n")]
        skipped = next((index for index, line in enumerate(lines) if line.strip()), len(lines))
        while lines and not lines[-1].strip():
            lines.pop()
        self.rows = tuple(lines[skipped:])
        self._check(place, skipped)
        letters = np.array([list(row) for row in self.rows])
        self.height, self.width = letters.shape
        self.cells: NDArray[np.int64] = np.argwhere(letters != WALL)
        self.numbers = np.full(letters.shape, -1)
        self.numbers[tuple(self.cells.T)] = np.arange(len(self.cells))
        inside = letters[tuple(self.cells.T)]
        self.target, self.forbidden = inside == TARGET, inside == FORBIDDEN
        starts = inside == (START if (inside == START).any() else FREE)
        if not starts.any():
            raise ValueError(f"{place}: nowhere to start: mark a cell with S, or leave one free with a dot")
        self.initial = starts / starts.sum()

    @classmethod
    def read(cls, path: str | Path) -> GridMap:
        """Read a map from a text file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds no map.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; a map is a text file with rows of {_legend()}")
        try:
            return cls(Path(path).read_text(encoding="utf-8"), place=str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error

    @property
    def num_states(self) -> int:
        """S, the number of cells without a wall."""
        return len(self.cells)

    def __str__(self) -> str:
        return "\n".join(self.rows)

    def _check(self, place: str, skipped: int) -> None:
        if not self.rows:
            raise ValueError(f"{place}: the map is empty; draw rows of {_legend()}")
        width = len(self.rows[0])
        for number, row in enumerate(self.rows, start=skipped + 1):
            for column, letter in enumerate(row, start=1):
                if letter not in MEANINGS:
                    raise ValueError(f"{place}, row {number}, column {column}: unknown {letter!r}; use {_legend()}")
            if len(row) != width:
                raise ValueError(
                    f"{place}, row {number}: {len(row)} cells, and the first row has {width}; fill it up with # or ."
                )
        if not any(TARGET in row for row in self.rows):
            raise ValueError(f"{place}: no target; mark one or more cells with {TARGET}")


def _legend() -> str:
    return ", ".join(f"{letter} ({meaning})" for letter, meaning in MEANINGS.items())
