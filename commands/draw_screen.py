"""What ``aligngym draw`` shows and does, without a terminal: keys in, lines out."""

from __future__ import annotations

import itertools
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

from aligngym.agents.dynamic_programming import PolicyIteration
from aligngym.envs.grid_map import MEANINGS
from aligngym.envs.grid_rendering import map_text
from aligngym.envs.grid_world import GridWorld
from aligngym.envs.map_editor import MapEditor

ARROW_KEYS = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}
#: Keys of the actions, which are numbered like the arrow keys.
ACTION_KEYS = {key: action for action, key in enumerate(ARROW_KEYS)} | {"w": 0, "d": 1, "s": 2, "a": 3, " ": 4}
EDIT_HELP = (
    "arrows move · S G # F . set the cell · r/R add/remove a row · c/C add/remove a column · u undo · w write the file "
    "· Tab play · q quit"
)
PLAY_HELP = "arrows or WASD walk{stay} · Enter a new episode · v optimal values, then actions · Tab draw · q quit"


class Episode:
    """One walk through a world, with what it has earned.

    Attributes:
        state: the agent's cell.
        steps: taken so far.
        reward: of the last step.
        total: Σ r, the return without discount.
        discounted: Σ γ^t r.
        over: whether the target has ended it.
    """

    def __init__(self, world: GridWorld, discount: float, seed: int | None = None) -> None:
        self.world, self.discount = world, discount
        self.state, _ = world.reset(seed=seed)
        self.steps, self.reward, self.total, self.discounted = 0, 0.0, 0.0, 0.0
        self.over = False

    def step(self, action: int) -> None:
        """Take an action and count what it earns."""
        self.state, self.reward, self.over, _, _ = self.world.step(action)
        self.total += self.reward
        self.discounted += self.discount**self.steps * self.reward
        self.steps += 1

    def __str__(self) -> str:
        return (
            f"step {self.steps}   reward {self.reward:g}   return {self.total:g}   "
            f"discounted by {self.discount:g}: {self.discounted:.4g}"
        )


class DrawScreen:
    """The screen of ``aligngym draw``: a map that is drawn, or a world that is walked through.

    Attributes:
        editor: the map.
        episode: the walk; ``None`` while drawing.
        message: what the last key led to, if that is worth a word.
        finished: whether the user has left.

    Args:
        editor: the map.
        path: the file that it is written to; if there is none, the first free one of map.txt, map-1.txt, ….
        make_world: makes a world of a text map.
        discount: γ of the values that are shown.
        seed: of the first episode; the others go on from there.
    """

    def __init__(
        self,
        editor: MapEditor,
        path: Path | None,
        make_world: Callable[[str], GridWorld],
        discount: float = 0.9,
        seed: int | None = None,
    ) -> None:
        self.editor, self.path = editor, path
        self.episode: Episode | None = None
        self.message, self.finished = "", False
        self._make_world, self._discount, self._seed = make_world, discount, seed
        #: What ``v`` shows beside the map: pairs of a title and a table, of which the first is the next to be seen.
        self._tables: list[tuple[str, str]] = []
        self._table = ("", "")
        self._leaving = False

    def press(self, key: str) -> None:
        """Do what a key asks: a character, ``up``, ``right``, ``down``, ``left``, ``tab``, ``enter`` or ``save``."""
        self.message = ""
        leaving, self._leaving = self._leaving, False
        try:
            if key == "save":
                self._save()
            elif key in ("q", "Q"):
                self._leave(leaving)
            elif key == "tab":
                self._switch()
            elif self.episode is None:
                self._draw(key)
            else:
                self._walk(self.episode, key.lower())
        except (ValueError, OSError) as error:
            self.message = str(error)

    def _draw(self, key: str) -> None:
        editor = self.editor
        commands = {
            "r": editor.insert_row,
            "R": editor.remove_row,
            "c": editor.insert_column,
            "C": editor.remove_column,
            "u": editor.undo,
            "w": self._save,
        }
        if key in ARROW_KEYS:
            editor.move(*ARROW_KEYS[key])
        elif key in commands:
            commands[key]()
        elif key.upper() in MEANINGS:
            editor.put(key.upper())
        elif key.isprintable() and len(key) == 1:
            self.message = f"{key!r} is no key here"

    def _walk(self, episode: Episode, key: str) -> None:
        if key == "enter":
            self.episode = Episode(episode.world, self._discount)
        elif key == "v":
            self._tables = self._tables or self._solve(episode.world)
            self._table = self._tables.pop(0)
        elif ACTION_KEYS.get(key, 5) < episode.world.num_actions:
            if episode.over:
                self.message = "this episode is over: Enter begins a new one"
            else:
                episode.step(ACTION_KEYS[key])
        elif key == " ":
            self.message = "this world has no action to stay: start with --stay"

    def _switch(self) -> None:
        """Go from drawing to playing, which a map with a mistake refuses, or back."""
        self._tables, self._table = [], ("", "")
        self.episode = (
            Episode(self._make_world(self.editor.text), self._discount, self._seed) if self.episode is None else None
        )

    def _solve(self, world: GridWorld) -> list[tuple[str, str]]:
        """Return what there is to see of the optimum, one after the other, and nothing in the end."""
        planner = PolicyIteration(world, self._discount)
        with warnings.catch_warnings():
            # Whether it converged is said below.
            warnings.simplefilter("ignore")
            planner.learn(1000, progress=False)
        verdict = f"{'optimal' if planner.converged else 'NOT CONVERGED'}, discount {self._discount:g}"
        values, actions = world.text(planner.values), world.text(policy=planner.policy)
        return [(f"values: {verdict}", values), (f"actions: {verdict}", actions), ("", "")]

    def _save(self) -> None:
        if self.path is None:
            names = (Path(f"map-{number}.txt" if number else "map.txt") for number in itertools.count())
            self.path = next(name for name in names if not name.exists())
        self.editor.save(self.path)
        self.message = f"written to {self.path}"

    def _leave(self, insisting: bool) -> None:
        self._leaving = self.editor.changed and not insisting
        self.finished = not self._leaving
        self.message = "the map has changes that are not written: q again leaves without them" if self._leaving else ""

    @property
    def title(self) -> str:
        """The first line: what is done to which file."""
        # The path comes last, since a long one is cut off.
        changed = " (changed)" if self.editor.changed else ""
        return f"{'drawing' if self.episode is None else 'playing'}{changed} {self.path or 'a new map'}"

    @property
    def status(self) -> str:
        """What there is to know: the message of the last key, what is wrong with the map, how the episode goes."""
        parts = [self.message]
        if self.episode is None:
            letter = self.editor.rows[self.editor.row][self.editor.column]
            place = f"row {self.editor.row + 1}, column {self.editor.column + 1}"
            parts += [self.editor.problem, f"{place}: {MEANINGS.get(letter, 'unknown')}"]
        else:
            parts += [
                self._table[0],
                str(self.episode),
                "the episode is over: Enter begins a new one" if self.episode.over else "",
            ]
        return "\n".join(dict.fromkeys(part for part in parts if part))

    @property
    def help(self) -> str:
        """The keys."""
        if self.episode is None:
            return EDIT_HELP
        return PLAY_HELP.format(stay=", space stays" if self.episode.world.num_actions == 5 else "")

    def body(self, width: int = 80) -> list[str]:
        """Return the map, a letter in every second column, and the table beside it, or below if there is no room."""
        text = self.editor.text
        if self.episode is not None:
            text = map_text(self.episode.world.map, self.episode.state)
        # What a terminal might not print in one column is not printed.
        rows = [" ".join(letter if letter in (*MEANINGS, "@") else "?" for letter in row) for row in text.split("\n")]
        if not self._table[1]:
            return rows
        table = self._table[1].split("\n")
        beside = [f"{row}    {line}" for row, line in zip(rows, table, strict=True)]
        return beside if max(map(len, beside)) < width else [*rows, "", *table]

    @property
    def cursor(self) -> tuple[int, int]:
        """Line and column in the body of the cursor, or of the agent."""
        row, column = self.editor.row, self.editor.column
        if self.episode is not None:
            row, column = self.episode.world.map.cells[self.episode.state].tolist()
        return row, 2 * column

    def frame(self, height: int, width: int) -> tuple[list[str], tuple[int, int]]:
        """Return what fits a window, and where the cursor is in it; the body scrolls to keep the cursor in sight."""
        below = [""]
        for text in (*self.status.split("\n"), self.help):
            below += textwrap.wrap(text, max(width - 1, 10)) or [""]
        room = max(height - 2 - len(below), 1)
        row, column = self.cursor
        top, left = max(0, row - room + 1), max(0, column - width + 2)
        shown = [line[left:] for line in self.body(width)[top : top + room]]
        lines = [self.title, "", *shown, *below][:height]
        return [line[: width - 1] for line in lines], (min(2 + row - top, height - 1), column - left)
