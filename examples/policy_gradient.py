"""Nine policy-gradient methods on one slippery grid, judged by the exact return of what they have learnt.

    python examples/policy_gradient.py [FOLDER]

All start from the same uniform table. What is printed is no estimate: the return of the policy as it is, which still
draws its actions, and of its most probable actions alone come from the grid's model, as does the optimum. OffPolicy-
ActorCritic never acts: it learns from somebody who walks at random. With a FOLDER, learning curves are drawn there.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from aligngym.agents import (
    A2C,
    GRPO,
    PPO,
    REINFORCE,
    RLOO,
    TRPO,
    BehaviourSampler,
    EnvironmentSampler,
    EpisodeSampler,
    NaturalPolicyGradient,
    OffPolicyActorCritic,
    PolicyIteration,
    QActorCritic,
    draw_learning_curves,
)
from aligngym.core import TabularPolicy
from aligngym.envs import GridWorld

DISCOUNT, ITERATIONS = 0.95, 50
ENV = GridWorld("S.#.\n.F..\n...G", slip=0.1, boundary_reward=-0.1)


def table(critic=True):
    return TabularPolicy.for_env(ENV, critic=critic)


def episodes(group_size=1):
    return EpisodeSampler(ENV, episodes=32, group_size=group_size, max_steps=50)


def segments():
    return EnvironmentSampler(ENV, num_envs=32, steps=16)


def agents():
    fast, common = {"discount": DISCOUNT, "learning_rate": 0.2}, {"discount": DISCOUNT, "learning_rate": 0.05}
    behaviour = BehaviourSampler(segments(), TabularPolicy.for_env(ENV))
    return [
        REINFORCE(table(), episodes(), **fast),
        RLOO(table(critic=False), episodes(8), **fast),
        GRPO(table(critic=False), episodes(8), **fast),
        A2C(table(), segments(), trace=0.9, **fast),
        QActorCritic(table(critic=False), segments(), **fast),
        OffPolicyActorCritic(table(), behaviour, **fast),
        PPO(table(), segments(), trace=0.9, **common),
        NaturalPolicyGradient(table(), segments(), trace=0.9, step_size=4.0, **common),
        TRPO(table(), segments(), trace=0.9, max_kl=0.03, damping=0.01, **common),
    ]


def exact_return(policy):
    return float(ENV.mdp.initial @ ENV.mdp.evaluate(policy, DISCOUNT))


def main(folder: Path | None) -> None:
    optimum = exact_return(PolicyIteration(ENV, DISCOUNT).learn(progress=False).policy)
    axes = Figure(figsize=(9, 5), dpi=120, layout="constrained").subplots()
    print("                        steps   exact return   most probable actions")
    for agent in agents():
        steps, returns = [], []
        for _ in range(ITERATIONS):
            agent.learn(1, progress=False)
            # Segments are of 32 · 16 steps; episodes are as long as they are.
            whole = isinstance(agent.sampler, EpisodeSampler)
            steps.append(round(32 * agent.sampler.metrics["length"]) if whole else 32 * 16)
            policy = agent.policy.probability_table().numpy()
            returns.append(exact_return(policy))
        name, greedy = type(agent).__name__, exact_return(np.eye(4)[policy.argmax(axis=1)])
        print(f"{name:22} {sum(steps):6,} {returns[-1]:14.4f} {greedy:23.4f}")
        draw_learning_curves({name: returns}, points=np.cumsum(steps), axes=axes)
    print(f"{'optimum':22} {'':6} {optimum:14.4f} {optimum:23.4f}")

    if folder is not None:
        axes.axhline(optimum, color="black", linestyle=":", linewidth=1.4)
        axes.set(xlabel="steps in the grid", ylabel="exact return", title="dotted: the optimum", ylim=(-0.5, 0.8))
        folder.mkdir(parents=True, exist_ok=True)
        axes.get_figure().savefig(folder / "policy_gradient.png")
        print(f"\ndrawn in {folder / 'policy_gradient.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
