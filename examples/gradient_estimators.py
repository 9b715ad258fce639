"""Estimate a gradient that is known exactly in four ways, and see what each costs in bias and variance.

    python examples/gradient_estimators.py [FILE.png]

A choice among three, where relaxations are biased, and a Gaussian, where the path through the sample beats its score.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from aligngym.agents.gradient_estimators import (
    CategoricalProblem,
    GaussianProblem,
    GumbelSoftmax,
    LeaveOneOut,
    Pathwise,
    ScoreFunction,
    measure,
)

TARGET = torch.tensor([0.45, 0.1, 0.7], dtype=torch.float64)
CHOICE = CategoricalProblem([0.5, 0.0, -0.5], lambda x: ((x - TARGET) ** 2).sum(dim=-1))
GAUSSIAN = GaussianProblem(1.0, 0.5, lambda x: (x - 2) ** 2)
ESTIMATORS = {
    "score function": (ScoreFunction(), "#8a8f98"),
    "leave one out": (LeaveOneOut(), "#1f6fb4"),
    "pathwise": (Pathwise(), "#2c8c5a"),
    "Gumbel–softmax, τ = 1": (GumbelSoftmax(1.0), "#e07b39"),
    "Gumbel–softmax, τ = 0.1": (GumbelSoftmax(0.1), "#b8433f"),
    "straight-through, τ = 1": (GumbelSoftmax(1.0, straight_through=True), "#7a52a1"),
}


def print_table(problem, samples: int = 8) -> None:
    gradient = ", ".join(f"{component:.4f}" for component in problem.exact_gradient)
    print(f"{type(problem).__name__}: exact gradient ({gradient}), {samples} samples an estimate")
    print(f"{'estimator':26}{'bias':>9}{'± noise':>9}{'variance':>11}{'squared error':>15}")
    for name, (estimator, _) in ESTIMATORS.items():
        try:
            found = measure(estimator, problem, samples, repetitions=20_000)
        except TypeError as error:
            print(f"{name:26}{str(error).split(':')[0]}")
            continue
        bias, noise = found.bias.norm(), found.standard_error.norm()
        print(f"{name:26}{bias:9.4f}{noise:9.4f}{found.variance:11.5f}{found.mean_squared_error:15.5f}")
    print()


def main(file: Path | None) -> None:
    print_table(CHOICE)
    print_table(GAUSSIAN)
    figure = Figure(figsize=(16, 4.8), dpi=120, layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    temperatures = np.geomspace(0.05, 5, 15)
    for straight_through, name, colour in ((False, "Gumbel–softmax", "#e07b39"), (True, "straight-through", "#7a52a1")):
        found = [measure(GumbelSoftmax(t, straight_through), CHOICE, 8, 10_000) for t in temperatures]
        left.loglog(temperatures, [float(m.bias @ m.bias) for m in found], "--", color=colour, label=f"{name}, bias²")
        left.loglog(temperatures, [m.variance for m in found], color=colour, label=f"{name}, variance")
    variance = measure(LeaveOneOut(), CHOICE, 8).variance
    left.axhline(variance, color="#1f6fb4", linestyle=":", label="leave one out, variance")
    left.set(title="a choice among three: bias or variance", xlabel="temperature τ", ylabel="8 samples an estimate")

    counts = 2 ** np.arange(1, 10)
    for axes, problem in ((middle, CHOICE), (right, GAUSSIAN)):
        for name, (estimator, colour) in ESTIMATORS.items():
            if isinstance(estimator, Pathwise if problem is CHOICE else GumbelSoftmax):
                continue
            errors = [measure(estimator, problem, int(k), 1000).mean_squared_error for k in counts]
            axes.loglog(counts, errors, color=colour, linewidth=1.8, label=name)
        axes.set(xlabel="samples of an estimate", ylabel="mean squared error")
    middle.set(title="a choice among three: what is biased stops improving")
    right.set(title="a Gaussian: the path knows the slope")

    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    if file is not None:
        figure.savefig(file)
        print(f"drawn in {file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
