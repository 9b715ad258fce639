"""Walk beside a cliff: what tells Sarsa, Expected Sarsa and Q-learning apart, beside what each of them converges to.

    python examples/td_control.py [FOLDER]

R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., example 6.6. All three explore with ε = 0.1. Sarsa and
Expected Sarsa learn what that is worth, and keep away from the edge; Q-learning learns the shortest path, along the
edge, and falls off it now and then.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from aligngym.agents import ExpectedSarsa, QLearning, Sarsa, draw_learning_curves
from aligngym.core import History
from aligngym.envs import CliffWalking

EPSILON, EPISODES, SEEDS = 0.1, 500, 20


def optimum(mdp, epsilon):
    """Return Q of the best ε-soft policy, by value iteration; with ε = 0, Q*."""
    values = np.zeros(mdp.rewards.shape)
    for _ in range(2000):
        values = mdp.action_values((1 - epsilon) * values.max(axis=1) + epsilon * values.mean(axis=1), 1.0)
    return values


def greedy(action_values):
    return np.eye(4)[action_values.argmax(axis=1)]


def visits(mdp, action_values):
    """Return how often the greedy policy visits each state on its way from the start."""
    state, counts = int(mdp.initial.argmax()), np.zeros(mdp.num_states)
    while not mdp.terminal[state] and counts.max() < 2:
        counts[state] += 1
        state = int(mdp.transitions[[state * 4 + action_values[state].argmax()]].indices[0])
    return counts


def main(folder: Path) -> None:
    env = CliffWalking()
    curves, limits, tables = {}, {}, {}
    for kind, epsilon in ((Sarsa, EPSILON), (ExpectedSarsa, EPSILON), (QLearning, 0.0)):
        runs = [History() for _ in range(SEEDS)]
        for seed, history in enumerate(runs):
            agent = kind(env, discount=1.0, step_size=0.5, epsilon=EPSILON, seed=seed)
            agent.learn(EPISODES, progress=False, callbacks=[history])
        limit = optimum(env.mdp, epsilon)
        exploring = (1 - EPSILON) * greedy(limit) + EPSILON / 4
        curves[kind.__name__] = [history["return"] for history in runs]
        limits[kind.__name__] = float(env.mdp.initial @ env.mdp.evaluate(exploring, 1.0))
        tables[kind.__name__] = limit

    print("                  earned while learning   at its limit, exactly   steps of its greedy path")
    for name, curve in curves.items():
        late = np.array(curve)[:, EPISODES // 5 :].mean()
        print(f"{name:15} {late:23.1f} {limits[name]:23.1f} {int(visits(env.mdp, tables[name]).sum()):26}")

    figure = Figure(figsize=(15, 6.4), dpi=120, layout="constrained")
    paths, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    for axes, name in zip(paths.subplots(2, 1), ("Sarsa", "QLearning"), strict=True):
        table, title = tables[name], f"{name} at its limit: values, and the greedy policy"
        env.draw(table.max(axis=1), greedy(table), title=title, decimals=0, axes=axes)
    title = f"sum of rewards an episode, {SEEDS} runs with ε = {EPSILON}"
    draw_learning_curves(curves, limits, smooth=10, title=title, axes=right.subplots())
    right.axes[0].set_ylim(-100, 0)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "td_control.png")
    print(f"\ndrawn in {folder / 'td_control.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/td_control"))
