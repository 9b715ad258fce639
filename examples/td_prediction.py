"""Predict the value of a random walk: one step ahead, n steps ahead, and all of them at once.

    python examples/td_prediction.py [FOLDER]

The middle picture is figure 7.2 of Sutton and Barto, the right one figure 12.6: an intermediate n or λ learns fastest.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from aligngym.agents import TD0, NStepTD, TDLambda
from aligngym.core import Power
from aligngym.envs import RandomWalk

REPETITIONS, EPISODES = 30, 10
STEP_SIZES = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0])
ENV = RandomWalk(19, left_reward=-1)
POLICY = np.ones((21, 1))


def mean_error(runs, make):
    """Return the RMS error over the first episodes, averaged over runs."""
    errors = []
    for episodes in runs:
        agent = make()
        for episode in episodes:
            agent.update(episode)
            errors.append(agent.rms_error())
    return np.mean(errors)


def main(folder: Path) -> None:
    # Long traces with a large step size blow up, which is part of the picture.
    np.seterr(over="ignore", invalid="ignore")
    # The policy is fixed, so every learner can be shown the same episodes.
    player = TD0(ENV, POLICY, 1.0, Power(exponent=0.6))
    generators = [np.random.default_rng(seed) for seed in range(REPETITIONS)]
    runs = [[player.play(generator) for _ in range(EPISODES)] for generator in generators]

    figure = Figure(figsize=(16, 4.8), dpi=120, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    states = np.arange(1, 20)
    left.plot(states, player.exact_values[1:-1], color="black", label="exact")
    print("state     " + "".join(f"{state:7}" for state in states[::3]))
    print("exact     " + "".join(f"{value:7.3f}" for value in player.exact_values[1:-1:3]))
    for episodes in (1, 10, 100, 3000):
        player.learn(episodes - player.iteration, progress=False)
        print(f"{episodes:4} ep.  " + "".join(f"{value:7.3f}" for value in player.values[1:-1:3]))
        left.plot(states, player.values[1:-1], marker=".", label=f"TD(0), {episodes} episodes")
    left.set(title="values of the 19-state random walk", xlabel="state", xticks=states[::3])

    print("\nsmallest error over the first 10 episodes")
    for steps in (1, 2, 4, 8, 16, 64):
        errors = [mean_error(runs, lambda a=a, n=steps: NStepTD(ENV, POLICY, 1.0, a, steps=n)) for a in STEP_SIZES]
        print(f"n = {steps:3}   {np.nanmin(errors):.3f} at α = {STEP_SIZES[np.nanargmin(errors)]}")
        middle.plot(STEP_SIZES, errors, marker=".", label=f"n = {steps}")
    middle.set(title="n-step TD: error over the first 10 episodes", xlabel="step size α", ylim=(0.22, 0.58))
    for decay in (0.0, 0.4, 0.8, 0.9, 0.95, 1.0):
        errors = [
            mean_error(runs, lambda a=a, d=decay: TDLambda(ENV, POLICY, 1.0, a, trace_decay=d)) for a in STEP_SIZES
        ]
        print(f"λ = {decay:4}  {np.nanmin(errors):.3f} at α = {STEP_SIZES[np.nanargmin(errors)]}")
        right.plot(STEP_SIZES, errors, marker=".", label=f"λ = {decay}")
    right.set(title="TD(λ): error over the first 10 episodes", xlabel="step size α", ylim=(0.22, 0.58))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "td_prediction.png")
    print(f"\ndrawn in {folder / 'td_prediction.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/td_prediction"))
