"""Solve a grid world three ways, compare, and draw it.

    python examples/solve_gridworld.py [FOLDER]

Value iteration and policy iteration find the same optimum, and each proves how far off it can be. Soft value iteration
finds the optimum of the same rewards with a penalty for leaving the uniform policy.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from aligngym.agents import PolicyIteration, SoftValueIteration, ValueIteration
from aligngym.envs import GridWorld

MAP = """
S...#....
.##.#.##.
.#..F..#.
.#.###.#.
...#G....
"""


def main(folder: Path) -> None:
    env = GridWorld(MAP, slip=0.1, step_reward=-0.04, boundary_reward=-0.04, forbidden_reward=-0.4)
    by_value = ValueIteration(env, discount=0.95).learn(progress=False)
    by_policy = PolicyIteration(env, discount=0.95).learn(progress=False)
    soft = SoftValueIteration(env, discount=0.95, beta=0.05).learn(progress=False)

    print(env.text(by_value.values, by_value.policy), end="\n\n")
    for agent in (by_value, by_policy, soft):
        print(
            f"{type(agent).__name__:20} {agent.iteration:4} iterations, value of the start {agent.values[0]:+.6f}, "
            f"wrong by at most {agent.error_bound:.1e}"
        )
    played = by_value.evaluate(env, episodes=2000, seed=0)
    print(f"played 2000 times: {played['return']:+.4f} ± {played['return_standard_error']:.4f}")

    figure = Figure(figsize=(15.5, 4.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    env.draw(by_value.values, by_value.policy, title="the optimum", axes=left)
    env.draw(soft.values, soft.policy, title="the optimum that stays close to the uniform policy", axes=right)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "gridworld.png")
    print(f"drawn in {folder / 'gridworld.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/solve_gridworld"))
