"""Deep Q-learning on a slippery grid, with each of its extensions: how far from optimal is the greedy policy?

    python examples/deep_q_learning.py [ITERATIONS]

What the greedy policy is worth is not played out but computed from the model, and the best there is from policy
iteration.
"""

import sys

from aligngym.agents import DQN, EnvironmentSampler, PolicyIteration, PrioritizedReplay
from aligngym.core import CategoricalQNetwork, Decay, QNetwork
from aligngym.envs import GridWorld

DISCOUNT = 0.95
WORLD = GridWorld("S..#\n.#..\n.F.G", slip=0.1, step_reward=-0.04, boundary_reward=-0.04)
DISTRIBUTION = {"v_min": -2.0, "v_max": 1.0, "atoms": 31}
VARIANTS = {
    "DQN": (QNetwork, {}, {}),
    "double": (QNetwork, {}, {"double": True}),
    "dueling": (QNetwork, {"dueling": True}, {}),
    "2 steps": (QNetwork, {}, {"n": 2}),
    "prioritised": (QNetwork, {}, {"replay": PrioritizedReplay(20_000, beta_steps=15_000)}),
    "distribution": (CategoricalQNetwork, DISTRIBUTION, {}),
    "all of them": (
        CategoricalQNetwork,
        DISTRIBUTION | {"dueling": True},
        {"double": True, "n": 2, "replay": PrioritizedReplay(20_000, beta_steps=15_000)},
    ),
}


def main(iterations: int) -> None:
    mdp = WORLD.mdp
    optimum = float(mdp.initial @ PolicyIteration(mdp, DISCOUNT).learn(progress=False).values)
    print(f"the best policy is worth {optimum:.4f}\n\n{'':14}{'worth':>8}{'share':>8}{'steps':>8}")
    for name, (kind, network, options) in VARIANTS.items():
        sampler = EnvironmentSampler(WORLD, num_envs=16, steps=8)
        agent = DQN(
            kind.for_env(sampler.env, **network),
            sampler,
            discount=DISCOUNT,
            batch_size=256,
            gradient_steps=4,
            target_every=20,
            learning_rate=Decay(3e-3, iterations),
            final_epsilon=0.1,
            **options,
        )
        agent.learn(iterations, progress=False)
        agent.policy.epsilon = 0.0
        greedy = agent.policy.probability_table().numpy()
        worth = float(mdp.initial @ mdp.evaluate(greedy, DISCOUNT))
        print(f"{name:14}{worth:8.4f}{worth / optimum:8.1%}{agent.environment_steps:8}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 120)
