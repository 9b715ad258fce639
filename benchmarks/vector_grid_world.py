"""Many grid worlds at once on one core: ours, Gymnasium's ``SyncVectorEnv`` of the same, and navix.

All sides take random actions that were drawn beforehand, and every step returns new observations, rewards and flags.
What is measured is steps per second of processor time: a step has one thread, and a busy machine takes its time away.
Sides take turns; the median and the best turn are shown. navix is another, richer world (an empty 5×5 room whose agent
turns), run without observations, which is its fastest way; it needs an interpreter that has it.

    python benchmarks/vector_grid_world.py [--copies 4096] [--turns 7] [--navix /path/to/its/python]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit

from aligngym.envs import GridWorld
from aligngym.envs.vector_grid_world import VectorGridWorld

LIMIT = 1000
WORLDS = {"deterministic": {}, "slip 0.2": {"slip": 0.2}}
#: Run by another interpreter: prints steps per second of one turn a line.
NAVIX = """
import sys, time, jax, navix
copies, steps, turns = map(int, sys.argv[1:])
env = navix.make("Navix-Empty-5x5-v0", observation_fn=navix.observations.none)
def step(timestep, action):
    timestep = jax.vmap(env.step)(timestep, action)
    return timestep, (timestep.observation, timestep.reward, timestep.step_type)
run = jax.jit(lambda timestep, actions: jax.lax.scan(step, timestep, actions))
start = jax.vmap(env.reset)(jax.random.split(jax.random.PRNGKey(0), copies))
actions = jax.random.randint(jax.random.PRNGKey(1), (steps, copies), 0, env.action_space.n)
jax.block_until_ready(run(start, actions))
for _ in range(turns):
    began = time.process_time()
    jax.block_until_ready(run(start, actions))
    print(copies * steps / (time.process_time() - began))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2000, help="of ours in a turn (Gymnasium: a 200th)")
    parser.add_argument("--navix", metavar="PYTHON", help="an interpreter that has navix")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(
        f"{platform.processor() or platform.machine()}, one core, numpy {np.__version__}, {arguments.copies} copies\n"
    )
    rates = measure(sides(arguments.copies), arguments)
    if arguments.navix:
        rates["navix, another world", ""] = navix(arguments)
    print(f"{'million steps a second':32}{'autoreset':>10}{'median':>9}{'best':>9}{'ours ÷ this':>13}")
    for (name, mode), turns in rates.items():
        world = name.split(", ")[-1]
        ours = rates.get((f"aligngym, {world}", mode), rates["aligngym, deterministic", "NextStep"])
        ratio = statistics.median(ours) / statistics.median(turns)
        print(f"{name:32}{mode:>10}{statistics.median(turns) / 1e6:9.3f}{max(turns) / 1e6:9.3f}{ratio:12.1f}×")


def sides(copies: int) -> dict[tuple[str, str], tuple[VectorEnv, float]]:
    """Return environments by name and autoreset mode, with the share of the steps that each is given."""
    result: dict[tuple[str, str], tuple[VectorEnv, float]] = {}
    for name, world in WORLDS.items():
        for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            ours = VectorGridWorld(copies, max_episode_steps=LIMIT, autoreset_mode=mode, **world)
            result[f"aligngym, {name}", mode.value] = ours, 1.0
        result[f"SyncVectorEnv, {name}", "NextStep"] = SyncVectorEnv([single(world)] * copies), 0.005
    return result


def single(world: dict) -> Callable[[], TimeLimit]:
    return lambda: TimeLimit(GridWorld(**world), LIMIT)


def measure(
    sides: dict[tuple[str, str], tuple[VectorEnv, float]], arguments: argparse.Namespace
) -> dict[tuple[str, str], list[float]]:
    """Return the steps per second of every turn of every side."""
    actions = np.random.default_rng(0).integers(4, size=(64, arguments.copies))
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in sides}
    for env, share in sides.values():
        env.reset(seed=0)
        # Long enough for episodes to be out of step with one another.
        turn(env, actions, int(300 * share) + 1)
    for _ in range(arguments.turns):
        for key, (env, share) in sides.items():
            rates[key].append(turn(env, actions, max(1, int(arguments.steps * share))))
    return rates


def turn(env: VectorEnv, actions: np.ndarray, steps: int) -> float:
    began = time.process_time()
    for step in range(steps):
        env.step(actions[step % len(actions)])
    return env.num_envs * steps / (time.process_time() - began)


def navix(arguments: argparse.Namespace) -> list[float]:
    command = [arguments.navix, "-c", NAVIX, str(arguments.copies), "100", str(arguments.turns)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(line) for line in result.stdout.splitlines()]


if __name__ == "__main__":
    main()
