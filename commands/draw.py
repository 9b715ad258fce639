"""``aligngym draw``: draw a grid world in the terminal, and walk through it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligngym.commands.world import add_world_arguments, make_world

if TYPE_CHECKING:
    from aligngym.commands.draw_screen import DrawScreen

#: Names of keys for :meth:`DrawScreen.press`, by what curses calls them. Ctrl-C leaves as q does, after asking.
KEYS = {
    "KEY_UP": "up",
    "KEY_RIGHT": "right",
    "KEY_DOWN": "down",
    "KEY_LEFT": "left",
    "KEY_ENTER": "enter",
    "\n": "enter",
    "\r": "enter",
    "\t": "tab",
    "\x13": "save",
    "\x03": "q",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description = (
        "Draw the grid world in a text file and walk through it, in the terminal: S start, G target, # wall, "
        "F forbidden (may be entered), . free. Tab switches between drawing and playing; the keys are on the screen."
    )
    parser.add_argument(
        "map", metavar="MAP_FILE", type=Path, nargs="?", help="text file with the map, which need not exist yet"
    )
    parser.add_argument("--discount", type=float, default=0.9, help="γ of the optimal values (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the first episode, for worlds with slip or several starts")
    add_world_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Open the screen, and return 0 when the user leaves it.

    Raises:
        OSError: without a terminal to draw on, or for a file that cannot be read.
        ValueError: for a bad option or a file that is not text.
    """
    if not 0 <= arguments.discount <= 1:
        raise ValueError(f"--discount is between 0 and 1, not {arguments.discount}")
    if arguments.seed is not None and arguments.seed < 0:
        raise ValueError(f"--seed is an integer from 0, not {arguments.seed}")
    # Bad rewards and slips are found before the screen opens.
    make_world(arguments, "SG")
    curses = _find_curses()
    from aligngym.commands.draw_screen import DrawScreen
    from aligngym.envs.map_editor import MapEditor

    editor = MapEditor() if arguments.map is None else MapEditor.open(arguments.map)
    screen = DrawScreen(
        editor, arguments.map, lambda text: make_world(arguments, text), arguments.discount, arguments.seed
    )
    curses.wrapper(_show, screen, curses)
    return 0


def _find_curses() -> Any:
    """Return the module, if it and the terminal can be used."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise OSError("draw needs a terminal, and its input or output is a file or a pipe")
    try:
        import curses
    except ImportError as error:
        raise OSError(f"draw needs Python's module curses, which is not here ({error})") from error
    try:
        curses.setupterm()
    except curses.error as error:
        raise OSError(f"draw cannot draw on a terminal of type TERM={os.environ.get('TERM')} ({error})") from error
    if curses.tigetstr("cup") is None:
        raise OSError(f"draw cannot move the cursor of a terminal of type TERM={os.environ.get('TERM')}")
    return curses


def _show(window: Any, screen: DrawScreen, curses: Any) -> None:
    """Paint the screen and pass on keys until the user leaves."""
    # Otherwise the terminal keeps Ctrl-S and Ctrl-C for itself.
    curses.raw()
    while not screen.finished:
        window.erase()
        lines, cursor = screen.frame(*window.getmaxyx())
        for number, line in enumerate(lines):
            # A terminal without Unicode gets question marks.
            window.addstr(number, 0, line.encode(window.encoding, "replace").decode(window.encoding))
        window.move(*cursor)
        window.refresh()
        key = window.get_wch()
        name = key if isinstance(key, str) else curses.keyname(key).decode()
        screen.press(KEYS.get(name, name))
