"""The options that describe a grid world, for the commands that need one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aligngym.envs.grid_map import GridMap
    from aligngym.envs.grid_world import GridWorld


def add_world_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a world, apart from its map."""
    world = parser.add_argument_group("the world")
    world.add_argument("--stay", action="store_true", help="add a fifth action: stay")
    world.add_argument(
        "--slip", type=float, default=0.0, help="probability of a step to the side (default: %(default)s)"
    )
    world.add_argument("--continuing", action="store_true", help="the target does not end the episode but keeps paying")
    for name, value, when in (
        ("step", 0.0, "landing in a free cell"),
        ("boundary", -1.0, "bouncing off the boundary or a wall"),
        ("forbidden", -1.0, "landing in a forbidden cell"),
        ("target", 1.0, "landing in a target"),
    ):
        world.add_argument(
            f"--{name}-reward", type=float, default=value, metavar="R", help=f"for {when} (default: %(default)s)"
        )
    world.add_argument(
        "--bounce",
        default="boundary",
        metavar="CONVENTION",
        help="what a bounce inside a forbidden cell pays: boundary, or boundary+forbidden (default: %(default)s)",
    )


def make_world(arguments: argparse.Namespace, map: str | GridMap) -> GridWorld:
    """Return the world of these options on a map.

    Raises:
        ValueError: for a bad map or option.
    """
    from aligngym.envs.grid_world import GridWorld

    return GridWorld(
        map,
        stay=arguments.stay,
        slip=arguments.slip,
        step_reward=arguments.step_reward,
        boundary_reward=arguments.boundary_reward,
        forbidden_reward=arguments.forbidden_reward,
        target_reward=arguments.target_reward,
        bounce=arguments.bounce,
        terminal_target=not arguments.continuing,
    )
