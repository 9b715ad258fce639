"""Learn from imagination: Dyna in a maze, with more and more planning between two real steps.

    python examples/dyna.py [FOLDER]

R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., figures 8.2 and 8.3. Without planning, the first episode
teaches one cell, the one before the target. With 50 imagined steps after each real one, the second episode already
finds its way through half of the maze.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from aligngym.agents import DynaQ, PolicyIteration, PrioritizedDyna, draw_learning_curves
from aligngym.core import History
from aligngym.envs import DynaMaze

DISCOUNT, EPISODES, SEEDS = 0.95, 40, 8


def main(folder: Path) -> None:
    env = DynaMaze()
    exact = PolicyIteration(env, DISCOUNT).learn(progress=False)
    start = float(exact.mdp.initial @ exact.values)
    shortest = 1 + round(np.log(start) / np.log(DISCOUNT))
    print(f"the shortest way has {shortest} steps, and the start is worth {start:.4f}\n")
    algorithms = [(f"Dyna-Q, {n} planning steps", DynaQ, n) for n in (0, 5, 50)]
    algorithms.append(("prioritised sweeping, 5", PrioritizedDyna, 5))

    lengths = {}
    print("                             steps in episode 2, 5, 20, 40   value of the start learned")
    for name, kind, planning_steps in algorithms:
        runs, values = [History() for _ in range(SEEDS)], []
        for seed, history in enumerate(runs):
            agent = kind(env, DISCOUNT, planning_steps, step_size=0.1 if kind is DynaQ else 1.0, seed=seed)
            agent.learn(EPISODES, progress=False, callbacks=[history])
            values.append(env.mdp.initial @ agent.values)
        lengths[name] = [history["length"] for history in runs]
        mean = np.mean(lengths[name], axis=0)
        shown = "".join(f"{mean[k - 1]:7.1f}" for k in (2, 5, 20, 40) if k <= EPISODES)
        print(f"  {name:26} {shown}{np.mean(values):22.4f}")

    figure = Figure(figsize=(14, 4.4), dpi=120, layout="constrained")
    curves, first, second = figure.subplots(1, 3, width_ratios=(1, 1.1, 1.1))
    draw_learning_curves(lengths, shortest, title=f"steps in an episode, {SEEDS} runs", axes=curves)
    curves.set_yscale("log")
    for axes, planning_steps in ((first, 0), (second, 50)):
        agent = DynaQ(env, DISCOUNT, planning_steps, step_size=0.1, seed=1).learn(2, progress=False)
        title = f"after 2 episodes, {planning_steps} planning steps"
        env.draw(agent.values, agent.policy, title=title, axes=axes)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "dyna.png")
    print(f"\ndrawn in {folder / 'dyna.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dyna"))
