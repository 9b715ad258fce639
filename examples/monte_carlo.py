"""Learn from whole episodes, without a model and without bootstrapping, and see what each method converges to.

    python examples/monte_carlo.py [FOLDER]

Exploring starts find the optimum. An ε-greedy policy finds the best policy that keeps exploring, which is another one.
Importance sampling learns about one policy from the episodes of another, and may have an infinite variance.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from aligngym.agents import MCBasic, MCEpsilonGreedy, MCExploringStarts, OffPolicyMCPrediction, PolicyIteration
from aligngym.agents.monte_carlo_control import epsilon_soft
from aligngym.core import Power
from aligngym.envs import GridWorld, TabularEnv, TabularMDP, ZhaoGrid

DISCOUNT, EPSILON = 0.9, 0.3
#: Episodes between two improvements of the policy, and after which numbers of episodes to look.
BATCH = 10
CHECKPOINTS = [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10_240, 20_480]
BLUE, ORANGE, GREY = "#1f6fb4", "#e07b39", "#8a8f98"


def best_soft_values(env, epsilon):
    """Return the exact values of the best policy that gives every action at least ε / A, by policy iteration."""
    policy = np.full(env.mdp.rewards.shape, 1 / env.mdp.num_actions)
    for _ in range(50):
        values = env.mdp.evaluate(policy, DISCOUNT)
        policy = epsilon_soft(env.mdp.action_values(values, DISCOUNT).round(9), epsilon)
    return values


def distances(agent, targets):
    """Learn, and return the distance of the values to each target at every checkpoint."""
    rows = []
    for episodes in CHECKPOINTS:
        agent.learn(episodes // BATCH - agent.iteration, progress=False)
        rows.append([np.abs(agent.values - target).max() for target in targets])
    return np.array(rows).T


def importance_sampling(weighted, seed):
    """Return the estimates after 50, 100, … episodes in Sutton and Barto's example 5.5, where the truth is 1."""
    mdp = TabularMDP.from_arrays(
        [[[0.9, 0.1], [0, 1]], [[0, 1], [0, 1]]], [[[0, 1], [0, 0]], [[0, 0], [0, 0]]], terminal=[False, True]
    )
    agent = OffPolicyMCPrediction(
        TabularEnv(mdp), [[1, 0], [1, 0]], [[0.5, 0.5]] * 2, 1.0, weighted, seed=seed, episodes_per_iteration=50
    )
    return [agent.learn(1, progress=False).values[0] for _ in range(400)]


def main(folder: Path) -> None:
    # S. Zhao, Mathematical Foundations of Reinforcement Learning, figure 5.4: an episode must be long enough to see
    # the target.
    zhao = ZhaoGrid(forbidden_reward=-10.0)
    for length in (1, 14, 15, 100):
        agent = MCBasic(zhao, DISCOUNT, length).learn(progress=False)
        print(f"MC Basic, episodes of {length} steps\n{zhao.text(agent.values, decimals=1)}\n")
    print(f"exact\n{zhao.text(PolicyIteration(zhao, DISCOUNT).learn(progress=False).values, decimals=1)}\n")

    env = GridWorld(".....\n.FF..\n..F..\n.FGF.\n.F...", slip=0.1, step_reward=-0.04)
    exact = PolicyIteration(env, DISCOUNT).learn(progress=False)
    soft = best_soft_values(env, EPSILON)
    starts = MCExploringStarts(env, DISCOUNT, Power(exponent=0.8), max_episode_steps=100, episodes_per_iteration=BATCH)
    greedy = MCEpsilonGreedy(env, DISCOUNT, Power(exponent=0.8), EPSILON, episodes_per_iteration=BATCH)
    (starts_error,) = distances(starts, [exact.values])
    greedy_error, soft_error = distances(greedy, [exact.values, soft])
    print("episodes   starts to V*   ε-greedy to V*   ε-greedy to the best ε-soft policy")
    for row in zip(CHECKPOINTS, starts_error, greedy_error, soft_error, strict=True):
        print("{:8}   {:12.3f}   {:14.3f}   {:34.3f}".format(*row))
    print(
        f"\nexploring starts\n{env.text(starts.values, starts.policy)}\n\nexact\n{env.text(exact.values, exact.policy)}"
    )

    figure = Figure(figsize=(16, 4.8), dpi=120, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.15, 1, 1])
    env.draw(starts.values, starts.policy, title=f"exploring starts, {CHECKPOINTS[-1]:,} episodes", axes=left)
    middle.loglog(CHECKPOINTS, starts_error, marker="o", color=BLUE, label="exploring starts to V*")
    middle.loglog(CHECKPOINTS, soft_error, marker="o", color=ORANGE, label="ε-greedy to the best ε-soft policy")
    middle.loglog(CHECKPOINTS, greedy_error, marker="o", color=GREY, label="ε-greedy to V*")
    middle.axhline(np.abs(soft - exact.values).max(), color=GREY, linestyle=":", label="what exploring costs, exactly")
    middle.set(title="an ε-greedy policy learns another optimum", xlabel="episodes", ylabel="largest error")
    for seed in range(8):
        for weighted, colour in [(False, ORANGE), (True, BLUE)]:
            label = ("weighted" if weighted else "ordinary") if seed == 0 else None
            right.semilogx(np.arange(50, 20_001, 50), importance_sampling(weighted, seed), color=colour, label=label)
    right.axhline(1, color="black", linestyle=":", label="exact")
    right.set(title="importance sampling of infinite variance", xlabel="episodes", ylabel="estimate", ylim=(0, 3))
    for axes in (middle, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "monte_carlo.png")
    print(f"\ndrawn in {folder / 'monte_carlo.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/monte_carlo"))
