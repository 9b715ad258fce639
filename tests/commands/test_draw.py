import argparse
import os
import pty
import select
import subprocess
import sys
import time

import numpy as np
import pytest

from aligngym.agents import PolicyIteration
from aligngym.commands import draw
from aligngym.commands.draw_screen import DrawScreen
from aligngym.commands.world import add_world_arguments, make_world
from aligngym.envs import GridMap, GridWorld
from aligngym.envs.map_editor import NEW_MAP, MapEditor


def screen_of(text, path=None, discount=0.9, **world):
    return DrawScreen(MapEditor(text), path, lambda text: GridWorld(text, **world), discount, seed=0)


def press(screen, *keys):
    for key in keys:
        screen.press(key)
    return screen


# Drawing.


def test_cells_are_set_under_the_cursor():
    screen = press(screen_of("...\n..."), "s", "right", "#", "down", "F", "right", "g", "right", "down", "up", ".")
    assert screen.editor.text == "S#.\n.FG"
    assert (screen.editor.row, screen.editor.column) == (0, 2)
    assert press(screen, "left", "left", "left", "up", "G").editor.text == "G#.\n.FG"


def test_rows_and_columns_come_and_go():
    screen = screen_of("SG")
    assert press(screen, "r", "#").editor.text == "SG\n#."
    assert press(screen, "c", "F").editor.text == "S.G\n#F."
    assert press(screen, "R").editor.text == "S.G"
    assert screen.cursor == (0, 2)
    assert press(screen, "C").editor.text == "SG"
    assert screen.cursor == (0, 2)
    press(screen, "R")
    assert "last row cannot be removed" in screen.status
    assert press(screen, "C").editor.text == "S"
    press(screen, "C")
    assert "last column cannot be removed" in screen.status
    assert screen.editor.text == "S"


def test_every_change_can_be_undone():
    screen, texts = screen_of("SG\n..", None), []
    keys = ["#", "r", "F", "c", "R", "C", "right", "G"]
    for key in keys:
        if key != "right":
            texts.append(screen.editor.text)
        screen.press(key)
    while texts:
        assert press(screen, "u").editor.text == texts.pop()
    assert "nothing to undo" in press(screen, "u").status
    assert not screen.editor.changed


def test_what_is_wrong_with_the_map_is_in_the_status_line_and_keeps_from_playing():
    screen = screen_of("S..")
    assert "no target" in screen.status
    press(screen, "tab")
    assert screen.episode is None
    assert "no target" in screen.status
    press(screen, "right", "G")
    assert screen.status == "row 1, column 2: target"
    press(screen, "tab")
    assert screen.episode is not None


def test_a_file_with_mistakes_can_be_mended(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text("\n\nS?.\n.G\n\n")
    editor = MapEditor.open(path)
    assert editor.text == "S?.\n.G."
    assert editor.changed
    assert "row 1, column 2: unknown '?'" in editor.problem
    screen = press(DrawScreen(editor, path, GridWorld), "right", ".", "save")
    assert screen.status.startswith(f"written to {path}")
    assert str(GridMap.read(path)) == "S..\n.G."
    assert not editor.changed


def test_files_that_are_not_there_begin_as_new_maps(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for path in (empty, tmp_path / "new.txt"):
        editor = MapEditor.open(path)
        assert editor.text == NEW_MAP
        assert editor.changed
        assert not editor.problem
    (tmp_path / "picture").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="not a text file"):
        MapEditor.open(tmp_path / "picture")
    with pytest.raises(OSError, match=str(tmp_path)):
        MapEditor.open(tmp_path)
    with pytest.raises(ValueError, match="'x' is none of S G # F"):
        editor.put("x")


def test_a_map_without_a_file_gets_a_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.txt").write_text("mine")
    screen = press(screen_of("SG"), "w")
    assert "written to map-1.txt" in screen.status
    assert (tmp_path / "map-1.txt").read_text() == "SG\n"
    press(screen, "right", "right", ".", "w")
    assert (tmp_path / "map-1.txt").read_text() == "S.\n"
    assert (tmp_path / "map.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["map-1.txt", "map.txt"]


def test_a_file_that_cannot_be_written_is_said_and_loses_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    screen = press(screen_of("SG", tmp_path / "file" / "map.txt"), "#", "w")
    assert "file" in screen.status
    assert screen.editor.changed
    assert screen.title.startswith("drawing (changed) ")


def test_leaving_with_changes_asks_once():
    assert press(screen_of("SG"), "q").finished
    screen = press(screen_of("SG"), "#", "q")
    assert not screen.finished
    assert "not written" in screen.status
    assert not press(screen, "right", "q").finished
    assert press(screen, "q").finished


# Playing.


def test_a_walk_earns_what_the_world_pays():
    # A corridor S . F G: right, bounce up, right, right; rewards −0.5, −2, −3 and 7.
    rewards = {"step_reward": -0.5, "boundary_reward": -2.0, "forbidden_reward": -3.0, "target_reward": 7.0}
    screen = press(screen_of("S.FG", discount=0.5, **rewards), "tab", "right", "w", "d")
    assert screen.body()[0] == "S . @ G"
    assert screen.cursor == (0, 4)
    assert str(screen.episode) == "step 3   reward -3   return -5.5   discounted by 0.5: -2.25"
    press(screen, "D")
    assert "return 1.5   discounted by 0.5: -1.375" in screen.status
    assert "the episode is over" in screen.status
    press(screen, "left")
    assert screen.episode.steps == 4
    assert "Enter begins a new one" in screen.status
    press(screen, "enter")
    assert screen.episode.steps == 0
    assert screen.body()[0] == "@ . F G"
    assert press(screen, "tab").body() == ["S . F G"]
    assert screen.editor.text == "S.FG"


@pytest.mark.parametrize("keys", [("up", "right", "down", "left"), "wdsa", "WDSA"])
def test_both_sets_of_keys_walk(keys):
    screen = press(screen_of("...\n.S.\n..G"), "tab")
    for key, cursor in zip(keys, [(0, 2), (0, 4), (1, 4), (1, 2)], strict=True):
        assert press(screen, key).cursor == cursor


def test_staying_needs_a_world_in_which_one_can():
    screen = press(screen_of("SG"), "tab", " ")
    assert screen.episode.steps == 0
    assert "--stay" in screen.status
    screen = press(screen_of("FG\nS.", stay=True), "tab", "up", " ")
    assert screen.episode.total == -2
    assert "space stays" in screen.help


def test_a_seed_repeats_the_first_episode_and_not_the_second():
    def walk():
        screen = press(screen_of("...\n...\n..G", slip=0.8), "tab")
        cursors = []
        for _ in range(2):
            cursors.append([press(screen, "up").cursor for _ in range(12)])
            press(screen, "enter")
        return cursors

    assert walk() == walk()
    first, second = walk()
    assert first != second


def test_the_optimal_values_and_actions_are_those_of_policy_iteration():
    screen = press(screen_of("S#\nFG", discount=0.8), "tab", "v")
    world = GridWorld("S#\nFG")
    planner = PolicyIteration(world, 0.8).learn(progress=False)
    # By hand: through F, V(S) = −1 + 0.8 · 1.
    assert screen.body() == ["@ #    -0.20  #####", "F G     1.00   0.00"]
    assert "values: optimal, discount 0.8" in screen.status
    # Without room beside the map, a table is below it.
    assert screen.body(width=19) == ["@ #", "F G", "", *world.text(planner.values).split("\n")]
    assert press(screen, "v").body() == ["@ #    ↓  #", "F G    →  G"]
    assert "actions: optimal, discount 0.8" in screen.status
    assert press(screen, "down").body() == ["S #    ↓  #", "@ G    →  G"]
    assert press(screen, "v").body() == ["S #", "@ G"]
    assert "optimal" not in screen.status
    assert press(screen, "v").body()[0] == "S #    -0.20  #####"
    # Another map has other values.
    screen = press(screen, "tab", "down", ".", "tab", "v")
    assert screen.body() == ["@ #    0.80  ####", ". G    1.00  0.00"]


def test_values_that_do_not_exist_are_said_so():
    screen = press(screen_of("SG", discount=1.0, terminal_target=False, stay=True), "tab", "v")
    assert "discount of 1" in screen.status
    assert screen.body() == ["@ G"]


# The window.


def test_the_window_scrolls_to_the_cursor_and_is_never_overrun():
    screen = screen_of("\n".join("S" + "." * 60 for _ in range(40)) + "\nG" + "." * 60)
    for _ in range(39):
        press(screen, "down", "right")
    press(screen, "G")
    for height, width in [(24, 80), (10, 30), (4, 12), (1, 5)]:
        lines, (row, column) = screen.frame(height, width)
        assert len(lines) <= height
        assert max(map(len, lines)) < width
        assert 0 <= row < height
        assert 0 <= column < width
    lines, (row, column) = screen.frame(24, 80)
    assert lines[row][column] == "G"
    assert lines[0].startswith("drawing")
    assert "q quit" in lines[-1]


def test_letters_that_a_terminal_may_not_print_are_question_marks():
    assert screen_of("S\x1bG\n.字.").body() == ["S ? G", ". ? ."]


# The command.


def run(*words):
    parser = argparse.ArgumentParser()
    draw.add_arguments(parser)
    return draw.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--discount", "1.5"], "--discount is between 0 and 1, not 1.5"),
        (["--seed", "-1"], "--seed is an integer from 0, not -1"),
        (["--slip", "2"], "2.0 is not between 0 and 1"),
        (["--bounce", "high"], "not 'high'"),
        ([], "draw needs a terminal"),
    ],
)
def test_bad_use_is_one_clear_error(options, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(*options)
    assert "\n" not in str(error.value)


def test_terminals_without_a_movable_cursor_are_refused(monkeypatch):
    curses = pytest.importorskip("curses")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)

    def setupterm():
        raise curses.error("could not find terminal")

    with monkeypatch.context() as patch:
        patch.setattr(curses, "setupterm", setupterm)
        with pytest.raises(OSError, match=r"TERM=.*could not find terminal"):
            draw._find_curses()
    monkeypatch.setattr(curses, "setupterm", lambda: None)
    monkeypatch.setattr(curses, "tigetstr", lambda name: None)
    with pytest.raises(OSError, match="cannot move the cursor"):
        draw._find_curses()
    monkeypatch.setitem(sys.modules, "curses", None)
    with pytest.raises(OSError, match="module curses, which is not here"):
        draw._find_curses()


def test_the_options_of_a_world_reach_it():
    parser = argparse.ArgumentParser()
    add_world_arguments(parser)
    words = "--stay --slip 0.3 --continuing --step-reward 1 --boundary-reward 2 --forbidden-reward 3 --target-reward 4"
    arguments = parser.parse_args([*words.split(), "--bounce", "boundary+forbidden"])
    ours = make_world(arguments, "S.\nFG")
    rewards = {"step_reward": 1, "boundary_reward": 2, "forbidden_reward": 3, "target_reward": 4}
    theirs = GridWorld("S.\nFG", stay=True, slip=0.3, terminal_target=False, bounce="boundary+forbidden", **rewards)
    for our, their in zip(ours.mdp.outcomes, theirs.mdp.outcomes, strict=True):
        np.testing.assert_array_equal(our, their)
    assert not ours.mdp.terminal.any()
    defaults = make_world(parser.parse_args([]), "S.\nFG").mdp
    for our, their in zip(defaults.outcomes, GridWorld("S.\nFG").mdp.outcomes, strict=True):
        np.testing.assert_array_equal(our, their)


class Terminal:
    """A VT52 at the other end of a pseudo-terminal, running the command."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        code = (
            "import argparse, sys; from aligngym.commands import draw; parser = argparse.ArgumentParser(); "
            "draw.add_arguments(parser); sys.exit(draw.run(parser.parse_args(sys.argv[1:])))"
        )
        environment = {**os.environ, "TERM": "vt52", "LINES": "24", "COLUMNS": "80", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        self.received, self.cursor = b"", (0, 0)

    def type(self, keys):
        os.write(self.master, keys)

    def wait_for(self, *texts, cursor=None, seconds=60):
        """Read until the screen shows all texts, and the cursor is where it is expected."""
        deadline = time.monotonic() + seconds
        while not all(text in self.screen() for text in texts) or cursor not in (None, self.cursor):
            assert time.monotonic() < deadline, f"{texts} are not on the screen:\n{self.screen()}"
            if select.select([self.master], [], [], 0.05)[0]:
                self.received += os.read(self.master, 65536)

    def screen(self):
        """Return what a VT52 shows: ESC Y moves, ESC K and J clear, ESC A to D step, ESC H goes home."""
        cells = [[" "] * 80 for _ in range(24)]
        row = column = 0
        characters = iter(self.received.decode("utf-8", "ignore"))
        for character in characters:
            if character == "\x1b":
                character = next(characters, "")
                if character == "Y":
                    row, column = (ord(next(characters, " ")) - 32 for _ in range(2))
                elif character == "K":
                    cells[row][column:] = [" "] * (80 - column)
                elif character == "J":
                    cells[row][column:] = [" "] * (80 - column)
                    cells[row + 1 :] = [[" "] * 80 for _ in cells[row + 1 :]]
                else:
                    down, right = {"A": (-1, 0), "B": (1, 0), "C": (0, 1), "D": (0, -1)}.get(character, (0, 0))
                    row, column = (0, 0) if character == "H" else (row + down, column + right)
            elif character in "\r\n\b":
                row, column = row + (character == "\n"), {"\r": 0, "\b": column - 1}.get(character, column)
            elif character.isprintable():
                cells[row][column] = character
                column = min(column + 1, 79)
        self.cursor = row, column
        return "\n".join("".join(line).rstrip() for line in cells)


UP, RIGHT = b"\x1bA", b"\x1bC"


def test_a_session_in_a_terminal(tmp_path):
    path = tmp_path / "corridor.txt"
    path.write_text("S.G\n")
    terminal = Terminal(path, "--discount", "0.5")
    try:
        terminal.wait_for("drawing /", "\nS . G\n", "row 1, column 1: start", "q quit")
        terminal.type(RIGHT + b"#w")
        terminal.wait_for("written to", "\nS # G\n", cursor=(2, 2))
        assert path.read_text() == "S#G\n"
        terminal.type(b"u")
        terminal.wait_for("drawing (changed) /", "\nS . G\n")
        # Ctrl-S reaches the program.
        terminal.type(b"\x13")
        terminal.wait_for("written to")
        assert path.read_text() == "S.G\n"
        terminal.type(b"\t")
        terminal.wait_for("playing /", "\n@ . G\n", "step 0")
        terminal.type(UP + RIGHT)
        terminal.wait_for("\nS @ G\n", "step 2   reward 0   return -1   discounted by 0.5: -1")
        terminal.type(b"v")
        terminal.wait_for("values: optimal, discount 0.5", "\nS @ G    0.50  1.00  0.00\n")
        terminal.type(b"v")
        terminal.wait_for("actions: optimal, discount 0.5", "\nS @ G    →  →  G\n")
        terminal.type(b"d")
        terminal.wait_for("the episode is over")
        terminal.type(b"q")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
