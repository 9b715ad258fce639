"""Linear function approximation: where it converges to, how well it fits, when it diverges, and a car on a mountain.

    python examples/function_approximation.py [FOLDER]

Every learner stands beside what theory says about it, computed from the model: its fixed point A⁻¹ b.
"""

import sys
from pathlib import Path

import gymnasium
import numpy as np
from matplotlib.figure import Figure

from aligngym.agents import (
    LSTD,
    TDC,
    Aggregation,
    Coordinates,
    FeatureTable,
    Fourier,
    Polynomial,
    ProjectedBellman,
    SemiGradientSarsa,
    SemiGradientTD,
    TileCoding,
)
from aligngym.core import Power
from aligngym.envs import BairdsCounterexample, RandomWalk, ZhaoGrid


def a_thousand_states_in_ten_groups(axes):
    """Sutton and Barto, figure 9.2 (left)."""
    env, policy, states = RandomWalk(1000, reach=100, left_reward=-1), np.ones((1002, 1)), np.arange(1002)
    features = Aggregation(np.where(env.mdp.terminal, -1, (states - 1) // 100))
    theory = ProjectedBellman.of_model(env.mdp, features(states), policy, 1.0)
    learner = SemiGradientTD(env, policy, features, 1.0, Power(0.5, 0.6, 500)).learn(2000, progress=False)
    print("1000 states in 10 groups, weights\n  A⁻¹ b   ", theory.fixed_point.round(3))
    print("  learned ", learner.weights.round(3))
    inner = slice(1, -1)
    axes.plot(states[inner], theory.exact_values[inner], color="black", label="exact")
    axes.plot(
        states[inner], (theory.features @ theory.best_weights)[inner], label="best approximation", color="tab:gray"
    )
    axes.plot(states[inner], (theory.features @ theory.fixed_point)[inner], label="TD fixed point", lw=3, alpha=0.5)
    axes.plot(states[inner], learner.values[inner], "--", label="TD(0), 2000 episodes", color="tab:red")
    axes.set(title="a random walk of 1000 states, 10 weights", xlabel="state")


def more_features_fit_better(axes):
    """Zhao, figures 8.7 and 8.8: what least-squares TD has learned, and the error that is left at its fixed point."""
    env = ZhaoGrid()
    policy, coordinates, states = np.full((25, 5), 0.2), Coordinates.of_grid(env.map), np.arange(25)
    print("\n5 × 5 grid, root mean square error of the values: learned, and at the fixed point")
    for family, colour in ((Polynomial, "tab:blue"), (Fourier, "tab:orange")):
        sizes, learned, limits = [], [], []
        for features in (family(coordinates, order) for order in range(5)):
            learner = LSTD(env, policy, features, 0.9, max_episode_steps=100_000).learn(1, progress=False)
            theory = ProjectedBellman.of_model(env.mdp, features(states), policy, 0.9)
            limit = np.sqrt(np.mean((theory.features @ theory.fixed_point - theory.exact_values) ** 2))
            sizes, learned, limits = [*sizes, features.size], [*learned, learner.rms_error()], [*limits, limit]
            print(f"  {family.__name__:10} {features.size:3} features   {learned[-1]:.3f}   {limit:.3f}")
        axes.plot(sizes, limits, color=colour, label=f"{family.__name__}, fixed point")
        axes.plot(sizes, learned, "o", color=colour, label="LSTD, 100,000 steps")
    axes.set(title="the 5 × 5 grid: error of the values", xlabel="number of features")


def off_policy_divergence(axes):
    """Sutton and Barto, figures 11.2 and 11.5: Baird's counterexample."""
    env = BairdsCounterexample()
    makers = {
        "semi-gradient TD": lambda **options: SemiGradientTD(*options.pop("task"), 0.005, **options),
        "TDC": lambda **options: TDC(*options.pop("task"), 0.005, 0.05, **options),
    }
    print("\nBaird's counterexample, largest weight")
    for name, make in makers.items():
        task = env, env.target, FeatureTable(env.features), env.discount
        agent = make(task=task, behaviour=env.behaviour, max_episode_steps=20)
        agent.weights[:] = env.initial_weights
        sizes = [np.abs(agent.weights).max()]
        for _ in range(150):
            sizes.append(np.abs(agent.learn(1, progress=False).weights).max())
        print(f"  {name:18} {sizes[0]:.0f} at first, {sizes[-1]:.3g} after 3000 steps")
        axes.semilogy(20 * np.arange(len(sizes)), sizes, label=name)
    axes.set(title="Baird's counterexample: largest weight", xlabel="steps")


def a_car_on_a_mountain(axes):
    """Sutton and Barto, figure 10.1: the cost to go, −max_a Q(s, a)."""
    env = gymnasium.make("MountainCar-v0", max_episode_steps=5000)
    features = TileCoding(Coordinates.of_space(env.observation_space), tiles=8, tilings=8)
    agent = SemiGradientSarsa(env, features, 1.0, 0.5 / 8, epsilon=0.0).learn(150, progress=False)
    judged = agent.evaluate(env, episodes=50)
    print(f"\nmountain car: {-judged['return']:.0f} ± {judged['return_standard_error']:.0f} steps to the top")
    low, high = env.observation_space.low, env.observation_space.high
    places = np.stack(np.meshgrid(*np.linspace(low, high, 80).T), axis=-1)
    cost = -agent.action_values(places).max(axis=-1)
    extent = (low[0], high[0], low[1], high[1])
    image = axes.imshow(cost, origin="lower", extent=extent, aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, ax=axes)
    axes.set(title="mountain car: learned steps to the top", xlabel="position", ylabel="velocity")


def main(folder: Path) -> None:
    figure = Figure(figsize=(12, 8.5), dpi=120, layout="constrained")
    parts = (a_thousand_states_in_ten_groups, more_features_fit_better, off_policy_divergence, a_car_on_a_mountain)
    for axes, part in zip(figure.subplots(2, 2).flat, parts, strict=True):
        part(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "function_approximation.png")
    print(f"\ndrawn in {folder / 'function_approximation.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/function_approximation"))
