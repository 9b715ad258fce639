"""Walk beside a cliff: what tells Sarsa, Expected Sarsa and Q-learning apart, beside what each of them converges to.

    python examples/td_control.py [FOLDER]

R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., example 6.6. All three explore with ε = 0.1. Sarsa and
Expected Sarsa learn what that is worth, and keep away from the edge; Q-learning learns the shortest path, along the
edge, and falls off it now and then.
"""

import sys
from pathlib import Path

import gymnasium
import numpy as np
from matplotlib.figure import Figure

from aligngym.agents import QLearning
from aligngym.agents.temporal_difference import ExpectedSarsa, Sarsa
from aligngym.core.callbacks import Callback
from aligngym.envs import TabularEnv, TabularMDP

EPSILON, EPISODES, SEEDS = 0.1, 500, 20
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])


class Returns(Callback):
    """Keeps the return of every iteration."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_iteration(self, agent, metrics):
        self.values.append(metrics["return"])


def fixed_point(mdp: TabularMDP, epsilon: float) -> np.ndarray:
    """Return Q of the best ε-soft policy; with ε = 0, Q*."""
    values = np.zeros(mdp.rewards.shape)
    for _ in range(2000):
        values = mdp.action_values((1 - epsilon) * values.max(axis=1) + epsilon * values.mean(axis=1), 1.0)
    return values


def exploring_return(mdp: TabularMDP, action_values: np.ndarray) -> float:
    """Return what the ε-greedy policy of a table earns in the mean, exactly."""
    greedy = np.eye(4)[action_values.argmax(axis=1)]
    return float(mdp.initial @ mdp.evaluate((1 - EPSILON) * greedy + EPSILON / 4, 1.0))


def path(mdp: TabularMDP, action_values: np.ndarray) -> np.ndarray:
    """Return ``[T, 2]``, rows and columns of the greedy path."""
    state, visited = int(mdp.initial.argmax()), []
    while not mdp.terminal[state] and len(visited) < 50:
        visited.append(divmod(state, 12))
        state = int(mdp.transitions[[state * 4 + action_values[state].argmax()]].indices[0])
    return np.array([*visited, divmod(state, 12)])


def main(folder: Path) -> None:
    env = TabularEnv(TabularMDP.from_env(gymnasium.make("CliffWalking-v1")))
    figure = Figure(figsize=(12, 4.2), dpi=120, layout="constrained")
    grid, curves = figure.subplots(1, 2)
    grid.imshow(np.arange(48).reshape(4, 12) // 37 % 2 * (np.arange(48).reshape(4, 12) < 47), cmap="Greys", alpha=0.6)
    print("                     earned while learning   at its limit, exactly   steps of the greedy path")
    for number, (kind, epsilon) in enumerate(((Sarsa, EPSILON), (ExpectedSarsa, EPSILON), (QLearning, 0.0))):
        curve, agents = [], []
        for seed in range(SEEDS):
            returns = Returns()
            agent = kind(env, discount=1.0, step_size=0.5, epsilon=EPSILON, seed=seed)
            agents.append(agent.learn(EPISODES, progress=False, callbacks=[returns]))
            curve.append(returns.values)
        earned, limit = np.mean(curve, axis=0), fixed_point(env.mdp, epsilon)
        exact, steps = exploring_return(env.mdp, limit), len(path(env.mdp, limit)) - 1
        print(f"  {kind.__name__:18} {earned[100:].mean():21.1f} {exact:23.1f} {steps:26}")
        smooth = np.convolve(earned, np.ones(10) / 10, "valid")
        (line,) = curves.plot(smooth, label=kind.__name__, linewidth=1.5)
        curves.axhline(exact, color=line.get_color(), linestyle=":", linewidth=1)
        taken = path(env.mdp, agents[0].action_values) + 0.09 * (number - 1)
        grid.plot(taken[:, 1], taken[:, 0], marker=".", color=line.get_color(), linewidth=2)
    for column, letter in ((0, "S"), (11, "G")):
        grid.text(column, 3.3, letter, ha="center", va="center", fontweight="bold")
    grid.text(5.5, 3, "the cliff: −100, and back to S", ha="center", va="center", color="white")
    grid.set(xticks=np.arange(12) + 0.5, yticks=np.arange(4) + 0.5, xticklabels=[], yticklabels=[])
    grid.grid(alpha=0.4)
    grid.tick_params(length=0)
    grid.set_title("the greedy path that one run of each has learned")
    curves.set(ylim=(-100, 0), xlabel="episode", title=f"sum of rewards an episode, mean of {SEEDS} runs")
    curves.grid(alpha=0.3)
    curves.legend(frameon=False, loc="lower right", title="dotted: exact, at the limit")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "td_control.png")
    print(f"\ndrawn in {folder / 'td_control.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/td_control"))
