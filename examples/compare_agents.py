"""Is one algorithm better than another? Over seeds and tasks, with intervals, as it should be asked.

    python examples/compare_agents.py [FOLDER] [--seeds N]

Three agents learn three small worlds. A score is the exact value of what was learnt, between the uniform policy's (0)
and the best there is (1). Over all runs the interquartile mean is less moved by a lucky or unlucky seed than the mean,
and tells more than the median: R. Agarwal et al., *Deep reinforcement learning at the edge of the statistical
precipice*, 2021. With a FOLDER, learning curves and the comparison are drawn there.
"""

import argparse
from pathlib import Path

import numpy as np

from aligngym.agents import (
    A2C,
    PPO,
    REINFORCE,
    EpisodeSampler,
    ModelSampler,
    PolicyIteration,
    draw_comparison,
    draw_learning_curves,
)
from aligngym.core import TabularPolicy
from aligngym.core.statistics import bootstrap_interval, interquartile_mean, probability_of_improvement
from aligngym.envs import GridWorld

DISCOUNT, STEPS, POINTS = 0.95, 8_192, 16
MAPS = ("S..#\n.#..\n...G", "S.F.\n..F.\n.F..\n...G", "S....\n.###.\n...#.\n.#.#.\n.#..G")
WORLDS = [GridWorld(drawing, slip=0.1, step_reward=-0.04, boundary_reward=-0.04) for drawing in MAPS]
AGENTS = {
    "REINFORCE": lambda env, seed: REINFORCE(
        TabularPolicy.for_env(env, critic=True),
        EpisodeSampler(env, episodes=16, max_steps=64),
        discount=DISCOUNT,
        learning_rate=0.1,
        seed=seed,
    ),
    "A2C": lambda env, seed: A2C(
        TabularPolicy.for_env(env, critic=True),
        ModelSampler(env, num_envs=16, steps=8, max_episode_steps=200),
        discount=DISCOUNT,
        trace=0.95,
        learning_rate=0.05,
        normalise_advantages="batch",
        seed=seed,
    ),
    "PPO": lambda env, seed: PPO(
        TabularPolicy.for_env(env, critic=True),
        ModelSampler(env, num_envs=16, steps=64, max_episode_steps=200),
        discount=DISCOUNT,
        minibatch_size=None,
        learning_rate=0.1,
        seed=seed,
    ),
}


def scores_of(make, env, seed):
    """Return [points] scores of one run, at equal numbers of environment steps."""
    exact = PolicyIteration(env, DISCOUNT).learn(progress=False)
    mdp, best = exact.mdp, float(exact.mdp.initial @ exact.values)

    def value(table):
        return float(mdp.initial @ mdp.evaluate(table, DISCOUNT))

    worst, agent, steps, scores = value(np.full(exact.policy.shape, 1 / mdp.num_actions)), make(env, seed), 0, []
    while len(scores) < POINTS:
        agent.learn(1, progress=False)
        sampler = agent.sampler
        steps += sampler.env.num_envs * (sampler.steps if hasattr(sampler, "steps") else sampler.metrics["length"])
        while steps >= (len(scores) + 1) * STEPS / POINTS and len(scores) < POINTS:
            scores.append((value(agent.policy.probability_table().numpy()) - worst) / (best - worst))
    return scores


def main(folder, seeds):
    curves = {
        name: np.array([[scores_of(make, env, seed) for env in WORLDS] for seed in range(seeds)])
        for name, make in AGENTS.items()
    }
    final = {name: curve[:, :, -1] for name, curve in curves.items()}
    print(f"{'':12}{'interquartile mean':>20}{'95 % interval':>18}   after {STEPS:,} steps, {seeds} seeds")
    for name, scores in final.items():
        low, high = bootstrap_interval(scores)
        print(f"{name:12}{interquartile_mean(scores):20.3f}{f'{low:.3f} … {high:.3f}':>18}")
    print("\nprobability of improvement")
    for better, worse in (("PPO", "A2C"), ("PPO", "REINFORCE"), ("A2C", "REINFORCE")):
        estimate = probability_of_improvement(final[better], final[worse])
        print(f"  {better} over {worse:10}{estimate.value:6.2f}  [{estimate.low:.2f}, {estimate.high:.2f}]")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        points = np.arange(1, POINTS + 1) * STEPS / POINTS
        pooled = {name: curve.reshape(-1, POINTS) for name, curve in curves.items()}
        draw_learning_curves(
            pooled, 1.0, points=points, statistic="iqm", xlabel="environment steps", ylabel="score"
        ).savefig(folder / "sample_efficiency.png")
        draw_comparison(final).savefig(folder / "comparison.png")
        print(f"drawn in {folder}/sample_efficiency.png and comparison.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    main(options.folder, options.seeds)
