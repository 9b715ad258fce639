"""Drawing a grid world's map, cell by cell."""

from __future__ import annotations

from pathlib import Path

from aligngym.core.storage import replacing
from aligngym.envs.grid_map import FREE, MEANINGS, GridMap

#: What a new map begins as.
NEW_MAP = "S....\n.....\n.....\n.....\n....G"


class MapEditor:
    """A map that is being drawn, with a cursor; it may be invalid for the moment.

    Attributes:
        rows: the letters, row by row, all rows of one length.
        row: of the cursor, from 0.
        column: of the cursor, from 0.
        saved: the text that the file holds, as far as is known.

    Args:
        text: rows of letters; short ones are filled up with free cells, and blank lines around them are left out.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(self, text: str = NEW_MAP) -> None:
        lines = [line.rstrip() for line in text.expandtabs().split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        lines = lines[next((index for index, line in enumerate(lines) if line), 0) :]
        if not lines:
            raise ValueError("the map is empty: there is nothing to edit")
        width = max(map(len, lines))
        self.rows = [list(line.ljust(width, FREE)) for line in lines]
        self.row = self.column = 0
        self.saved = text.strip("\n")
        self._history: list[list[list[str]]] = []

    @classmethod
    def open(cls, path: str | Path) -> MapEditor:
        """Read a file, valid or not; begin a new map if there is no such file or nothing in it.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not text.
        """
        path = Path(path)
        if not path.exists():
            editor = cls()
            editor.saved = ""
            return editor
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error
        editor = cls(text if text.strip() else NEW_MAP)
        editor.saved = text.strip("\n")
        return editor

    @property
    def text(self) -> str:
        """The map as text."""
        return "\n".join("".join(row) for row in self.rows)

    @property
    def changed(self) -> bool:
        """Whether the map is not what the file holds."""
        return self.text != self.saved

    @property
    def problem(self) -> str:
        """What :class:`GridMap` has to say against the map; nothing if it is valid."""
        try:
            GridMap(self.text)
        except ValueError as error:
            return str(error)
        return ""

    def move(self, down: int, right: int) -> None:
        """Move the cursor, as far as the map goes."""
        self.row = min(max(self.row + down, 0), len(self.rows) - 1)
        self.column = min(max(self.column + right, 0), len(self.rows[0]) - 1)

    def put(self, letter: str) -> None:
        """Set the cell under the cursor.

        Raises:
            ValueError: for a letter that maps do not have.
        """
        if letter not in MEANINGS:
            raise ValueError(f"{letter!r} is none of {' '.join(MEANINGS)}")
        self._remember()
        self.rows[self.row][self.column] = letter

    def insert_row(self) -> None:
        """Insert a free row below the cursor, and go there."""
        self._remember()
        self.rows.insert(self.row + 1, [FREE] * len(self.rows[0]))
        self.move(1, 0)

    def insert_column(self) -> None:
        """Insert a free column to the right of the cursor, and go there."""
        self._remember()
        for row in self.rows:
            row.insert(self.column + 1, FREE)
        self.move(0, 1)

    def remove_row(self) -> None:
        """Remove the cursor's row.

        Raises:
            ValueError: if it is the only one.
        """
        if len(self.rows) == 1:
            raise ValueError("the last row cannot be removed")
        self._remember()
        del self.rows[self.row]
        self.move(0, 0)

    def remove_column(self) -> None:
        """Remove the cursor's column.

        Raises:
            ValueError: if it is the only one.
        """
        if len(self.rows[0]) == 1:
            raise ValueError("the last column cannot be removed")
        self._remember()
        for row in self.rows:
            del row[self.column]
        self.move(0, 0)

    def undo(self) -> None:
        """Take back the last change.

        Raises:
            ValueError: if there is none.
        """
        if not self._history:
            raise ValueError("there is nothing to undo")
        self.rows = self._history.pop()
        self.move(0, 0)

    def save(self, path: str | Path) -> None:
        """Write the map, valid or not, to a file, which is replaced only when its successor is complete.

        Raises:
            OSError: if the file cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(self.text + "\n", encoding="utf-8")
        self.saved = self.text

    def _remember(self) -> None:
        self._history.append([row.copy() for row in self.rows])
