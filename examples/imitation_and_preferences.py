"""From demonstrations, from preferences, or from rewards: what each way of learning needs, and where each ends.

    python examples/imitation_and_preferences.py

A demonstrator walks a small grid, mostly well. Behaviour cloning sees where it went. DPO then sees which of two of its
walks is better, and REINFORCE is paid for its own walks; both start from the clone and are held close to it by the same
KL penalty, so that both have the optimum π_clone · exp(Q/β), which soft value iteration finds from the model. Without
the penalty, rewards lead to the best walk of all. Every return here is exact.
"""

import numpy as np
import torch

from aligngym.agents import REINFORCE, EpisodeSampler, PolicyIteration, SoftValueIteration
from aligngym.agents.behaviour_cloning import BehaviourCloning
from aligngym.alignment import DPO
from aligngym.core import Decay, TabularPolicy
from aligngym.envs import FiniteHorizon, GridWorld, bradley_terry_preferences

BETA, HORIZON, WALKS, ITERATIONS = 0.3, 6, 200, 150
MAP = """
S..
.F.
..G
"""


def main() -> None:
    env = FiniteHorizon(GridWorld(MAP, step_reward=-0.1, forbidden_reward=-1.0), HORIZON)
    mdp = env.mdp

    def exact_return(policy: TabularPolicy) -> float:
        return float(mdp.initial @ mdp.evaluate(policy.probability_table().numpy(), discount=1.0))

    def report(name: str, needs: str, policy: TabularPolicy, optimum: str) -> None:
        print(f"{name:27}{needs:37}{exact_return(policy):+8.3f}   {optimum}")

    best = PolicyIteration(mdp, discount=1.0).learn(progress=False).policy
    shape = best.shape
    demonstrator = TabularPolicy(*shape, reference=0.7 * np.asarray(best) + 0.3 / shape[1])
    # Trajectories of different samplers have the same form, and so does what an expert wrote down.
    walks = EpisodeSampler(env, episodes=WALKS).sample(demonstrator, seed=0)
    print(f"{'':27}{'learns from':37}{'return':>8}   its optimum, exactly")
    report("demonstrator", "", demonstrator, "")
    report("uniform policy", "", TabularPolicy(*shape), "")

    for count in (10, 50, WALKS):
        clone = TabularPolicy(*shape)
        BehaviourCloning(clone, walks[:count], learning_rate=Decay(0.3, 200)).learn(200, progress=False)
        optimum = f"{exact_return(demonstrator):+.3f}, the demonstrator's, with walks without end"
        report("behaviour cloning", f"{count} walks", clone, optimum)

    reference = clone.probability_table()
    soft = SoftValueIteration(GridWorld(MAP, step_reward=-0.1), 1.0, BETA, reference.numpy(), HORIZON)
    soft.learn(progress=False)
    regularised = f"{exact_return(TabularPolicy(*shape, soft.policy.clip(1e-30))):+.3f}, the clone tilted by exp(Q/β)"

    preferences = bradley_terry_preferences(walks)
    policy = TabularPolicy(*shape, reference)
    dpo = DPO(policy, preferences, beta=BETA, batch_size=4000, learning_rate=Decay(0.1, ITERATIONS))
    dpo.learn(ITERATIONS, progress=False)
    report("DPO from the clone", f"{len(preferences)} comparisons of them", policy, regularised)

    for name, beta, optimum in (
        ("REINFORCE from the clone", BETA, regularised),
        ("REINFORCE, no penalty", 0.0, f"{float(mdp.initial @ mdp.evaluate(best, 1.0)):+.3f}, the best of all"),
    ):
        policy = TabularPolicy(*shape, reference)
        agent = REINFORCE(
            policy,
            EpisodeSampler(env, episodes=128),
            discount=1.0,
            baseline="leave_one_out",
            beta=beta,
            learning_rate=Decay(0.1, ITERATIONS),
            max_grad_norm=None,
        )
        agent.learn(ITERATIONS, progress=False)
        report(name, f"the rewards of {128 * ITERATIONS} walks of its own", policy, optimum)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
