"""Train a linear classifier on F1 or accuracy itself, by reward, beside smooth surrogates and the exact best line.

    python examples/non_differentiable_metric.py [FILE.png]

Fifteen outliers stand behind the positive class. The line of least cross-entropy chases them; the best gives them up.
"""

import sys
from pathlib import Path

import numpy as np
from gymnasium.spaces import Box, Discrete
from matplotlib.figure import Figure

from aligngym.agents import draw_learning_curves
from aligngym.agents.metric_training import (
    MetricTraining,
    SurrogateTraining,
    accuracy,
    cross_entropy,
    f1,
    linear_dichotomies,
    outlying_clusters,
    soft_f1,
)
from aligngym.core import NetworkPolicy

STEPS, EVERY = 200, 10


def main(file: Path | None) -> None:
    features, labels = outlying_clusters(seed=3)
    lines = linear_dichotomies(features)
    best = {metric.__name__: float(metric(lines, labels).max()) for metric in (accuracy, f1)}

    agents = {
        "cross-entropy": (SurrogateTraining, cross_entropy),
        "soft F1": (SurrogateTraining, soft_f1),
        "accuracy, by reward": (MetricTraining, accuracy),
        "F1, by reward": (MetricTraining, f1),
    }
    curves = {}
    print(f"{'trained on':22}{'accuracy':>10}{'F1':>10}")
    for name, (kind, judge) in agents.items():
        policy = NetworkPolicy(Box(-np.inf, np.inf, (2,)), Discrete(2), hidden=(), critic=None)
        agent = agents[name] = kind(policy, features, labels, judge, learning_rate=0.05)
        curves[name] = []
        for _ in range(STEPS // EVERY):
            agent.learn(EVERY, progress=False)
            curves[name].append(agent.evaluate()["f1"])
        found = agent.evaluate()
        print(f"{name:22}{found['accuracy']:10.4f}{found['f1']:10.4f}")
    print(f"{f'best of {len(lines):,} lines':22}{best['accuracy']:10.4f}{best['f1']:10.4f}")

    figure = Figure(figsize=(14, 4.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, colour, name in ((0, "#8a8f98", "class 0"), (1, "#2b2f36", "class 1")):
        left.scatter(*features[labels == number].T, s=14, color=colour, label=name)
    x, y = np.meshgrid(np.linspace(-3, 8, 600), np.linspace(-3.5, 3.5, 600))
    for row, (name, agent) in enumerate(agents.items()):
        style = ("-", "-", "--", ":")[row]  # the last three nearly coincide
        named = agent.act(np.stack([x, y], axis=-1).astype(np.float32))
        left.contour(x, y, named, levels=[0.5], colors=f"C{row}", linewidths=2, linestyles=style)
        left.plot([], style, color=f"C{row}", linewidth=2, label=name)
    left.set(title="where the classifiers divide the plane", xlabel="$x_1$", ylabel="$x_2$")
    left.legend(frameon=False, fontsize=9)
    left.spines[["top", "right"]].set_visible(False)
    points = np.arange(EVERY, STEPS + 1, EVERY)
    title = "F1 of the most probable labels"
    draw_learning_curves(curves, best["f1"], points=points, xlabel="step", ylabel="F1", title=title, axes=right)
    if file is not None:
        figure.savefig(file)
        print(f"drawn in {file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
