"""``aligngym play``: watch what a run has learned, in the terminal, in a window or as a GIF."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from aligngym.commands.judgement import player


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description = "Watch the policy of a finished run: as text in the terminal, in a window, or as a GIF."
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder that aligngym train has written")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--gif", metavar="FILE.gif", type=Path, help="write a moving picture instead")
    output.add_argument("--window", action="store_true", help="open the environment's window instead")
    parser.add_argument("--episodes", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the environment (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0.3, metavar="S", help="seconds a frame (default: %(default)s)")
    parser.add_argument("--draw-actions", action="store_true", help="act as in training, not greedily")


def run(arguments: argparse.Namespace) -> int:
    """Play and show, and return 0.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
        ValueError: for a bad option, or if the environment cannot be shown in this way.
    """
    if arguments.episodes < 1 or arguments.seed < 0 or not 0 <= arguments.delay < 60:
        raise ValueError("--episodes is at least 1, --seed at least 0, and --delay between 0 and 60 seconds")
    if arguments.gif is not None and arguments.gif.suffix.lower() != ".gif":
        raise ValueError(f"--gif {arguments.gif}: the name of a GIF file ends in .gif")
    from aligngym.commands.run_folder import load_run

    settings, agent = load_run(arguments.run_folder)
    experiment = settings.experiment()
    mode = "rgb_array" if arguments.gif else "human" if arguments.window else "ansi"
    modes = experiment.make_env().metadata.get("render_modes", [])
    if mode not in modes:
        others = {"ansi": "without --gif and --window", "rgb_array": "--gif FILE.gif", "human": "--window"}
        remedy = ", ".join(others[other] for other in modes if other in others) or "nothing else"
        raise ValueError(f"{settings.env} does not draw itself as {mode}, but this works: {remedy}")
    env = experiment.make_env(render_mode=mode)
    frames = play(agent, env, arguments.episodes, arguments.seed, not arguments.draw_actions)
    try:
        if mode == "rgb_array":
            write_gif(arguments.gif, [frame for frame, _ in frames], arguments.delay)
        else:
            show(frames, arguments.delay if mode == "ansi" else 0.0)
    except RendererMissing as error:
        raise ValueError(f"{settings.env} cannot be drawn here: {error}") from error
    finally:
        env.close()
    return 0


class RendererMissing(Exception):
    """The environment needs a package to draw itself that is not there, or a screen."""


def play(agent: Any, env: gymnasium.Env, episodes: int, seed: int, greedy: bool) -> Iterator[tuple[Any, str]]:
    """Yield a picture of every step, and a line that says what happened.

    Raises:
        RendererMissing: if the environment cannot draw itself.
    """
    from aligngym.agents.evaluation import allowed_actions

    act = player(agent, env.action_space, greedy=greedy, seed=seed)
    for episode in range(episodes):
        observation, info = rendered(lambda: env.reset(seed=seed + episode))  # noqa: B023 (called at once)
        total, length, over = 0.0, 0, False
        yield rendered(env.render), f"episode {episode + 1}: begins"
        while not over:
            action = act(observation, allowed_actions(observation, info))
            observation, reward, terminated, truncated, info = env.step(action)
            total, length, over = total + float(reward), length + 1, terminated or truncated
            end = ", the end" if terminated else ", cut off" if truncated else ""
            earned = f"reward {float(reward):g}, return {total:g}{end}"
            yield rendered(env.render), f"episode {episode + 1}, step {length}: action {action}, {earned}"


def rendered(draw: Callable[[], Any]) -> Any:
    """Call what draws a picture, and say in one kind of error that it cannot."""
    try:
        return draw()
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise RendererMissing(str(error)) from error
    except Exception as error:
        # pygame's errors are its own, and pygame need not be here.
        if type(error).__module__.startswith("pygame"):
            raise RendererMissing(str(error)) from error
        raise


def show(frames: Iterator[tuple[Any, str]], delay: float) -> None:
    """Print every frame; in a terminal each over the last, unless a window shows it."""
    above = 0
    for frame, line in frames:
        text = f"{frame.rstrip()}\n{line}" if isinstance(frame, str) else line
        # Up to where the last frame began, and clear what is below.
        print((f"\x1b[{above}A\x1b[J" if above and sys.stdout.isatty() else "") + text, flush=True)
        above = text.count("\n") + 1 if not line.endswith(("the end", "cut off")) else 0
        time.sleep(delay)


def write_gif(path: Path, frames: list[Any], delay: float) -> None:
    """Write RGB arrays ``[H, W, 3]`` as a GIF that repeats."""
    from PIL import Image

    from aligngym.core.storage import replacing

    first, *others = (Image.fromarray(np.asarray(frame, dtype=np.uint8)) for frame in frames)
    with replacing(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=round(1000 * delay), loop=0)
    print(f"{len(frames)} frames in {path}")
