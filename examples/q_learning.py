"""Learn a grid world from experience, and see how far from the truth the table is.

    python examples/q_learning.py [FOLDER]

Q-learning never sees the model. The environment has one all the same, so the learned values can stand beside the exact
ones, with a certified bound of their error.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from aligngym.agents import PolicyIteration, QLearning
from aligngym.core.schedules import Power
from aligngym.envs import GridWorld

DISCOUNT = 0.9


def main(folder: Path) -> None:
    # Without an S, episodes start anywhere, so that every cell is seen often.
    env = GridWorld(".....\n.FF..\n..F..\n.FGF.\n.F...", slip=0.1)
    exact = PolicyIteration(env, DISCOUNT).learn(progress=False)
    agent = QLearning(env, DISCOUNT, step_size=Power(exponent=0.7), epsilon=0.3, seed=0)

    print("episodes   largest error   certified bound")
    bounds = []
    for episodes in (100, 300, 1000, 3000, 10_000):
        agent.learn(episodes - agent.iteration, progress=False)
        error = abs(agent.values - exact.values).max()
        bounds.append((episodes, error, agent.error_bound))
        print(f"{episodes:8}   {error:13.4f}   {agent.error_bound:15.4f}")
    print(f"\nlearned\n{env.text(agent.values, agent.policy)}\n\nexact\n{env.text(exact.values, exact.policy)}")

    figure = Figure(figsize=(18, 4.6), dpi=120, layout="constrained")
    left, middle, visited, right = figure.subplots(1, 4)
    env.draw(agent.values, agent.policy, title=f"learned in {agent.iteration:,} episodes", axes=left)
    env.draw(exact.values, exact.policy, title="exact", axes=middle)
    env.draw(agent.visits.sum(axis=1) / agent.visits.sum(), title="share of all steps", decimals=3, axes=visited)
    episodes, errors, certified = zip(*bounds, strict=True)
    right.loglog(episodes, certified, marker="o", label="certified bound")
    right.loglog(episodes, errors, marker="o", label="error, max |V − V*|")
    right.set(title="distance to the optimum", xlabel="episodes")
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "q_learning.png")
    print(f"\ndrawn in {folder / 'q_learning.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/q_learning"))
