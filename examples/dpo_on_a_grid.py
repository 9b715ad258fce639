"""DPO on paths through a grid, next to the optimum it should reach.

    python examples/dpo_on_a_grid.py

All paths of at most three steps are compared in pairs by a judge who follows the Bradley–Terry model of their rewards.
DPO sees the preferences and never a reward; soft value iteration sees the rewards and solves the problem exactly.
"""

import torch

from aligngym.agents import SoftValueIteration
from aligngym.alignment import DPO
from aligngym.core import Decay, TabularPolicy
from aligngym.envs import GridWorld, TabularMDP, bradley_terry_preferences, enumerate_trajectories

BETA, HORIZON = 0.5, 3
MAP = """
S.
.F
.G
"""


def main() -> None:
    env = GridWorld(MAP, step_reward=-0.1, boundary_reward=-0.2, forbidden_reward=-1.0)
    mdp = TabularMDP.from_env(env)
    paths = enumerate_trajectories(mdp, HORIZON)
    preferences = bradley_terry_preferences(paths)
    print(f"{len(paths)} paths, {len(preferences)} ordered pairs weighted by their probabilities")

    exact = SoftValueIteration(mdp, discount=1.0, beta=BETA, horizon=HORIZON).learn(progress=False)
    optimum = TabularPolicy(*exact.policy.shape, reference=exact.policy)(paths).log_probs.sum(dim=1).exp().detach()

    # States of the problem with a horizon are pairs of time and cell.
    policy = TabularPolicy(*exact.policy.shape)
    agent = DPO(
        policy,
        preferences,
        beta=BETA,
        batch_size=len(preferences),
        learning_rate=Decay(0.2, steps=200),
        max_grad_norm=None,
    )
    for _ in range(5):
        learned = policy(paths).log_probs.sum(dim=1).exp().detach()
        distance = float((learned - optimum).abs().sum()) / 2
        print(f"after {agent.iteration:3} steps the distribution over paths is {distance:.1e} from the optimum")
        agent.learn(50, progress=False)
    learned = policy(paths).log_probs.sum(dim=1).exp().detach()
    print(f"after {agent.iteration:3} steps {float((learned - optimum).abs().sum()) / 2:.1e}\n")

    best = learned.topk(3).indices
    for row in best.tolist():
        steps = "".join("↑→↓←"[action] for action in paths.actions[row][paths.mask[row]].tolist())
        print(f"{steps:6} return {float(paths.returns[row]):+.1f}  DPO {learned[row]:.4f}  exact {optimum[row]:.4f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
