import argparse

import pytest

from aligngym.commands import solve

ZHAO = "S....\n.FF..\n..F..\n.FGF.\n.F...\n"


def run(*words):
    parser = argparse.ArgumentParser()
    solve.add_arguments(parser)
    return solve.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def zhao(tmp_path):
    path = tmp_path / "zhao.txt"
    path.write_text(ZHAO)
    return path


@pytest.mark.parametrize("algorithm", solve.ALGORITHMS)
def test_the_published_solution_is_printed(zhao, algorithm, capsys):
    # S. Zhao, Mathematical Foundations of Reinforcement Learning, figure 3.4 (d).
    options = ["--continuing", "--stay", "--forbidden-reward", "-10", "--decimals", "1", "--algorithm", algorithm]
    assert run(zhao, *options) == 0
    printed = capsys.readouterr().out
    assert "\n 3.5   3.9   4.3   4.8   5.3\n 3.1   3.5   4.8   5.3   5.9\n 2.8   2.5  10.0   5.9   6.6\n" in printed
    assert "\n 2.5  10.0  10.0  10.0   7.3\n 2.3   9.0  10.0   9.0   8.1\n" in printed
    assert ZHAO in printed
    assert "converged after" in printed
    assert "NOT CONVERGED" not in printed
    assert "no value is wrong by more than" in printed


def test_a_run_that_stops_early_says_so(zhao, capsys):
    assert run(zhao, "--iterations", 2) == 1
    assert "NOT CONVERGED" in capsys.readouterr().out


def test_rewards_and_slip_reach_the_world(tmp_path, capsys):
    path = tmp_path / "corridor.txt"
    path.write_text("SG\n")
    # V = 0.5 · (3 + 0) + 0.5 · (−2 + 0.8 V): half of the moves slip into a wall.
    rewards = ["--target-reward", "3", "--boundary-reward", "-2"]
    assert run(path, "--slip", "0.5", *rewards, "--discount", "0.8", "--decimals", "4") == 0
    assert f"{0.5 / 0.6:.4f}" in capsys.readouterr().out


def test_the_picture_is_written(zhao, tmp_path, capsys):
    picture = tmp_path / "new" / "values.png"
    assert run(zhao, "--png", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "no such file"),
        ("", [], "the map is empty"),
        ("S.\nG\n", [], "row 2: 1 cells, and the first row has 2"),
        ("S.\n?G\n", [], r"row 2, column 1: unknown '\?'"),
        ("S.\n..\n", [], "no target"),
        ("S.G\n", ["--discount", "2"], "between 0 and 1, not 2.0"),
        ("S.G\n", ["--slip", "-1"], "slip is a probability"),
        ("S.G\n", ["--decimals", "-1"], "--decimals"),
        ("S.G\n", ["--png", "values.jpg"], "ends in .png"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, content, options, message):
    path = tmp_path / "map.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(path, *options)
    assert "\n" not in str(error.value)
