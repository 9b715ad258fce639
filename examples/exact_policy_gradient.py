"""Climb the exact policy gradient, and the natural one, which is not held up where the policy seldom goes.

    python examples/exact_policy_gradient.py [FOLDER]

Both start from the uniform policy on a slippery grid and use the same step size; the gradients come from the model, so
what is left is the difference between the two directions. The plain gradient weights a state by how often it is
visited, and an action by its probability; the natural gradient is the advantage alone.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.special import softmax

from aligngym.agents import PolicyIteration
from aligngym.agents.exact_gradients import expected_return, natural_gradient, policy_gradient
from aligngym.envs import GridWorld

DISCOUNT, STEP_SIZE, ITERATIONS, DRAWN = 0.9, 1.0, 1000, 30
DIRECTIONS = {"policy gradient": (policy_gradient, "#e07b39"), "natural gradient": (natural_gradient, "#1f6fb4")}


def main(folder: Path) -> None:
    env = GridWorld(slip=0.1)
    optimum = expected_return(env.mdp, PolicyIteration(env, DISCOUNT).learn(progress=False).policy, DISCOUNT)
    figure = Figure(figsize=(16, 5), dpi=120, layout="constrained")
    left, *grids = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))

    gaps = {name: np.zeros(ITERATIONS + 1) for name in DIRECTIONS}
    for (name, (direction, colour)), axes in zip(DIRECTIONS.items(), grids, strict=True):
        logits = np.zeros(env.mdp.rewards.shape)
        for iteration in range(ITERATIONS + 1):
            policy = softmax(logits, axis=1)
            gaps[name][iteration] = optimum - expected_return(env.mdp, policy, DISCOUNT)
            if iteration == DRAWN:
                values = env.mdp.evaluate(policy, DISCOUNT)
                env.draw(values, policy, title=f"{name}, after {DRAWN} iterations", axes=axes)
            logits += STEP_SIZE * direction(env.mdp, policy, DISCOUNT)
        left.loglog(np.arange(1, ITERATIONS + 2), gaps[name].clip(1e-12), color=colour, linewidth=2, label=name)

    print(f"expected return of the optimum: {optimum:.6f}; what is missing to it:\n")
    print("iteration " + "".join(f"{name:>20}" for name in DIRECTIONS))
    for iteration in (0, 1, 3, 10, 30, 100, 300, 1000):
        print(f"{iteration:9} " + "".join(f"{gap[iteration]:20.2e}" for gap in gaps.values()))
    left.set(title=f"gap to the optimum, α = {STEP_SIZE:g}", xlabel="iteration + 1", ylabel="J* − J")
    left.grid(alpha=0.25)
    left.legend(frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "exact_policy_gradient.png")
    print(f"\ndrawn in {folder / 'exact_policy_gradient.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/exact_policy_gradient"))
