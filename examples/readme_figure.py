"""Draw the README's picture: a solved grid beside DPO in both worlds.

    python examples/readme_figure.py RUN_FOLDER [FILE.png]

RUN_FOLDER is one that ``aligngym dpo`` wrote; its ``metrics.jsonl`` gives the margins.
"""

import json
import sys
from pathlib import Path

import numpy as np
import solve_gridworld
from matplotlib.figure import Figure

from aligngym.agents import SoftValueIteration, ValueIteration
from aligngym.alignment import DPO
from aligngym.core import Decay, TabularPolicy
from aligngym.envs import GridWorld, TokenMDP, bradley_terry_preferences

INK, BLUE, ORANGE = "#2b2f36", "#1f6fb4", "#e07b39"


def distances(steps: int) -> list[float]:
    """Return the total variation between DPO's policy over 27 sequences and the exact optimum, after each step."""
    words = TokenMDP(lambda tokens: float(sum(tokens)), vocabulary_size=3, length=3)
    sequences = words.all_trajectories()
    exact = SoftValueIteration(words.mdp, discount=1.0, beta=1.0).learn(progress=False)
    optimum = TabularPolicy(*exact.policy.shape, reference=exact.policy)(sequences).log_probs.sum(dim=1).exp()
    policy = TabularPolicy(*exact.policy.shape)
    preferences = bradley_terry_preferences(sequences)
    agent = DPO(
        policy, preferences, beta=1.0, batch_size=len(preferences), learning_rate=Decay(0.1, steps), max_grad_norm=None
    )
    result = []
    for _ in range(steps):
        learned = policy(sequences).log_probs.sum(dim=1).exp()
        result.append(float((learned - optimum).detach().abs().sum()) / 2)
        agent.learn(1, progress=False)
    return result


def main(run: Path, file: Path) -> None:
    figure = Figure(figsize=(15.5, 4.3), dpi=110, layout="constrained")
    grid, table, language = figure.subplots(1, 3, width_ratios=[2.1, 1, 1])
    env = GridWorld(solve_gridworld.MAP, slip=0.1, step_reward=-0.04, boundary_reward=-0.04, forbidden_reward=-0.4)
    agent = ValueIteration(env, discount=0.95).learn(progress=False)
    env.draw(agent.values, agent.policy, title="a grid world, solved", axes=grid)

    table.semilogy(distances(200), color=BLUE, linewidth=2)
    table.set(title="DPO on a table", xlabel="step", ylabel="distance to the exact optimum")

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    margins = np.array([line["rewards/margin"] for line in lines])
    language.plot(range(1, len(margins) + 1), margins, color=ORANGE, linewidth=2)
    language.set(title="DPO on SmolLM2-135M", xlabel="step", ylabel="margin of implicit rewards")
    for axes in (table, language):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.title.set_color(INK)
    figure.savefig(file)
    print(f"drawn in {file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent / "figure.png"))
