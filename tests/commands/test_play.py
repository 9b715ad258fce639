"""``aligngym play``: what it shows is what the policy does."""

import re
import sys

import gymnasium
import numpy as np
import pytest
from PIL import Image

from aligngym.agents import PolicyIteration
from aligngym.commands.main import main
from aligngym.core import TabularPolicy
from aligngym.envs import GridWorld

MAP = "S..\n.#.\n..G"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run whose policy has been replaced by the optimal one."""
    folder = tmp_path_factory.mktemp("play")
    (folder / "map.txt").write_text(MAP)
    command = ["train", "reinforce", str(folder / "map.txt"), "--steps", "10", "--episodes", "1", "--max-steps", "5"]
    command += ["--config", "none", "--evaluation-episodes", "1", "--env-option", "max_episode_steps=9"]
    assert main([*command, "--output", str(folder / "run")]) == 0
    best = PolicyIteration(GridWorld(MAP), 0.9).learn(progress=False).policy
    TabularPolicy(8, 4, 0.999 * best + 0.00025).save(folder / "run/policy.safetensors")
    return folder / "run"


def test_the_frames_are_those_of_the_optimal_path(trained, capsys):
    assert main(["play", str(trained), "--delay", "0"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b[" not in printed.replace("\x1b[7m", "").replace("\x1b[0m", "")
    env = gymnasium.make("aligngym/GridWorld-v0", map=MAP, render_mode="ansi")
    env.reset(seed=0)
    policy = TabularPolicy.load(trained / "policy.safetensors").probabilities.argmax(1).tolist()
    state, frames = 0, [env.render()]
    for _ in range(4):
        state = env.step(policy[state])[0]
        frames.append(env.render())
    position = 0
    for frame in frames:
        position = printed.index(frame.rstrip(), position) + 1
    steps = re.findall(r"step (\d): action (\d), reward (\S+), return ([^\s,]+)(, the end)?", printed)
    assert [step[0] for step in steps] == ["1", "2", "3", "4"]
    assert steps[-1][2:] == ("1", "1", ", the end")


def test_a_gif_has_a_picture_of_every_step(trained, tmp_path, capsys):
    path = tmp_path / "episode.gif"
    assert main(["play", str(trained), "--gif", str(path), "--delay", "0.1"]) == 0
    assert "5 frames" in capsys.readouterr().out
    env = gymnasium.make("aligngym/GridWorld-v0", map=MAP, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    with Image.open(path) as picture:
        assert picture.n_frames == 5
        assert picture.info["duration"] == 100
        shown = np.asarray(picture.convert("RGB")).astype(int)
    assert shown.shape == first.shape
    # A GIF has 256 colours.
    assert np.abs(shown - first).mean() < 8


def test_episodes_and_drawn_actions(trained, capsys):
    assert main(["play", str(trained), "--delay", "0", "--episodes", "3", "--draw-actions"]) == 0
    assert "episode 3, step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--episodes", "0"], "--episodes is at least 1"),
        (["--delay", "-1"], "--delay"),
        (["--gif", "episode.png"], "ends in .gif"),
    ],
)
def test_bad_options_are_one_line(trained, capsys, words, message):
    assert main(["play", str(trained), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run_and_a_missing_renderer_are_one_line(tmp_path, monkeypatch, capsys):
    assert main(["play", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    run = str(tmp_path / "run")
    command = ["train", "a2c", "CartPole-v1", "--steps", "40", "--config", "none", "--evaluation-episodes", "1"]
    assert main([*command, "--output", run]) == 0
    capsys.readouterr()
    assert main(["play", run]) == 2
    error = capsys.readouterr().err
    assert "does not draw itself as ansi, but this works: --window, --gif FILE.gif" in error
    monkeypatch.setitem(sys.modules, "pygame", None)
    assert main(["play", run, "--gif", str(tmp_path / "x.gif")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "pygame is not installed" in lines[0]
    assert "gymnasium[classic-control]" in lines[0]
    assert not (tmp_path / "x.gif").exists()
