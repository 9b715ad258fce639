"""Find what can only be measured with noise, with step sizes that meet the conditions for it, and with others.

    python examples/stochastic_approximation.py [FOLDER]

The root of tanh(w − 1) from noisy measurements; the mean of a sample by gradient descent with batches of 1, 10 and all;
and the error over time beside its closed form.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from aligngym.agents import GaussianNoise, GradientDescent, IncrementalMean, MeanLoss, RobbinsMonro
from aligngym.core import Constant, Power, robbins_monro_conditions

SCHEDULES = {
    "1/k": (Power(), "#1f6fb4"),
    "0.3": (Constant(0.3), "#e07b39"),
    "1/k²": (Power(exponent=2.0), "#8a8f98"),
}


def main(folder: Path) -> None:
    figure = Figure(figsize=(16, 4.8), dpi=120, layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    # 200 runs at once, as entries of one estimate.
    for name, (schedule, colour) in SCHEDULES.items():
        agent = RobbinsMonro(lambda w: np.tanh(w - 1), np.full(200, 3.0), schedule, GaussianNoise(1.0), solution=1.0)
        agent.learn(1000, progress=False)
        low, high = np.quantile(agent.trajectory, [0.05, 0.95], axis=1)
        left.fill_between(agent.recorded_at + 1, low, high, color=colour, alpha=0.25, linewidth=0)
        left.plot(agent.recorded_at + 1, agent.trajectory[:, 0], color=colour, linewidth=1.2, label=f"$α_k$ = {name}")
        print(f"α_k = {name}: error {agent.evaluate()['error']:.3f} after {agent.iteration} steps")
        print(f"{robbins_monro_conditions(schedule)}\n")
    left.axhline(1, color="black", linestyle=":", label="root")
    left.set(title="root of tanh(w − 1), measured with noise", xscale="log", xlabel="step k", ylabel="w")

    problem = MeanLoss(np.random.default_rng(0).uniform(-10, 10, size=(100, 2)))
    start = np.array([50.0, 50.0])
    print("batch      learned mean         exact mean          loss   least loss")
    for batch, colour in [(1, "#e07b39"), (10, "#1f6fb4"), (None, "#2b2f36")]:
        agent = GradientDescent(problem, batch, 0.2, start).learn(60, progress=False)
        learned, exact = (np.array2string(w, precision=3) for w in (agent.estimate, agent.solution))
        losses = f"{problem.loss(agent.estimate):.3f}   {problem.loss(problem.solution):.3f}"
        print(f"{batch or 'all':>5}   {learned:>18}   {exact:>18}   {losses}")
        middle.plot(*agent.trajectory.T, marker=".", color=colour, label=f"batch of {batch or 'all 100'}")
    middle.scatter(*problem.samples.T, s=6, color="#8a8f98", alpha=0.6)
    middle.scatter(*problem.solution, marker="*", s=160, color="black", zorder=3, label="exact mean")
    middle.set(title="the mean by gradient descent, α = 0.2", xlabel="$w_1$", ylabel="$w_2$")

    steps = np.arange(1, 1001)
    theory = {"1/k": steps**-0.5, "0.3": np.sqrt(0.3 / 1.7 + 0.7 ** (2 * steps) * (1 - 0.3 / 1.7))}
    for name, exact in theory.items():
        schedule, colour = SCHEDULES[name]
        draws = {"samples": lambda generator: generator.standard_normal(2000), "initial": np.ones(2000)}
        agent = IncrementalMean(**draws, step_size=schedule, solution=0.0).learn(1000, progress=False)
        measured = np.sqrt((agent.trajectory[1:] ** 2).mean(axis=1))
        right.loglog(steps, measured, color=colour, linewidth=3, alpha=0.5, label=f"$α_k$ = {name}, 2,000 runs")
        right.loglog(steps, exact, color=colour, linestyle="--", linewidth=1.2, label="closed form")
        print(f"incremental mean, α_k = {name}: error {measured[-1]:.4f}, closed form {exact[-1]:.4f}")
    right.set(title="incremental mean of unit noise", xlabel="step k", ylabel="root mean square error")

    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "stochastic_approximation.png")
    print(f"\ndrawn in {folder / 'stochastic_approximation.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/stochastic_approximation"))
