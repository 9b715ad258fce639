"""``aligngym solve``: the optimal values and policy of a grid world drawn in a text file."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from aligngym.commands.world import add_world_arguments, make_world

if TYPE_CHECKING:
    from aligngym.agents.dynamic_programming import DynamicProgramming

ALGORITHMS = ("value-iteration", "policy-iteration")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description = (
        "Solve the grid world in a text file: S start, G target, # wall, F forbidden (may be entered), . free. "
        "The rewards are paid by the cell that a move lands in."
    )
    parser.add_argument("map", metavar="MAP_FILE", type=Path, help="text file with the map")
    parser.add_argument("--discount", type=float, default=0.9, help="γ in [0, 1] (default: %(default)s)")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default=ALGORITHMS[0], help="default: %(default)s")
    parser.add_argument(
        "--tolerance", type=float, default=1e-6, help="certified error to stop at (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, default=100_000, help="stop after so many (default: %(default)s)")
    add_world_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--decimals", type=int, default=2, help="digits after the point (default: %(default)s)")
    output.add_argument("--png", type=Path, metavar="FILE", help="also draw the solution into a PNG file")


def run(arguments: argparse.Namespace) -> int:
    """Solve the map, print the solution, and return 0 if it converged, otherwise 1.

    Raises:
        FileNotFoundError: if there is no map file.
        ValueError: for a bad map or option.
    """
    from aligngym.agents.dynamic_programming import PolicyIteration, ValueIteration
    from aligngym.core.storage import replacing
    from aligngym.envs.grid_map import GridMap

    if arguments.decimals < 0:
        raise ValueError(f"--decimals is a number of digits, at least 0, not {arguments.decimals}")
    if arguments.png is not None and arguments.png.suffix.lower() != ".png":
        raise ValueError(f"--png {arguments.png}: the name of a PNG file ends in .png")
    env = make_world(arguments, GridMap.read(arguments.map))
    planner = PolicyIteration if arguments.algorithm == "policy-iteration" else ValueIteration
    agent = planner(env, arguments.discount, arguments.tolerance)
    with warnings.catch_warnings():
        # The report below says whether it converged.
        warnings.simplefilter("ignore")
        agent.learn(arguments.iterations, progress=sys.stderr.isatty())
    tables = [env.text(agent.values, decimals=arguments.decimals), env.text(policy=agent.policy)]
    for title, table in zip(("map", "values", "policy"), [str(env.map), *tables], strict=True):
        print(f"{title}\n{table}\n")
    print(_verdict(agent))
    if arguments.png is not None:
        title = f"{type(agent).__name__}, discount {arguments.discount:g}"
        figure = env.draw(agent.values, agent.policy, title=title, decimals=arguments.decimals)
        with replacing(arguments.png) as temporary:
            figure.savefig(temporary, format="png")
        print(f"drawn in {arguments.png}")
    return 0 if agent.converged else 1


def _verdict(agent: DynamicProgramming) -> str:
    verdict = "converged" if agent.converged else "NOT CONVERGED (give more --iterations or a larger --tolerance)"
    bound = agent.error_bound
    certificate = (
        f"no value is wrong by more than {bound:.2g}"
        if bound < float("inf")
        else f"residual {agent.residual:.2g}, no certified error with this discount and these rewards"
    )
    return f"{verdict} after {agent.iteration} {agent.unit}s: {certificate}"
