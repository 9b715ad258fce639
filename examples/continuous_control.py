"""Push a mass to the origin: PPO and the deterministic policy gradient, next to the best policy there is.

    python examples/continuous_control.py

With linear dynamics and quadratic costs the best policy is u = −K x, by the Riccati equation, and the expected return
of every linear policy is known, so nothing below is measured by playing. PPO's policy is a Gaussian whose noise it has
to pay for, so its optimum is lower; DPG explores with noise, too, but learns about the policy without it.
"""

import math
import time

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from aligngym.agents import PPO, EnvironmentSampler
from aligngym.agents.deterministic_policy_gradient import DPG
from aligngym.core import Decay, NetworkPolicy
from aligngym.core.deterministic_policy import DeterministicPolicy
from aligngym.envs.linear_quadratic import LinearQuadratic

DISCOUNT, NOISE = 0.9, 0.3


class Quadratic(nn.Module):
    """A linear function of all products of two inputs, the form of V(x) and Q(x, u) here."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = torch.triu_indices(size, size)
        self.head = nn.Linear(len(self.first), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, *inputs: Tensor) -> Tensor:
        joined = torch.cat(inputs, dim=1)
        return self.head(joined[:, self.first] * joined[:, self.second])[:, 0]


class LinearGaussian(NetworkPolicy):
    """u ~ N(W x, σ²) with a quadratic critic."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env.observation_space, env.action_space, hidden=(), log_std=math.log(NOISE))
        self.critic_body, self.value_head = nn.Identity(), Quadratic(2)
        self.log_std.requires_grad_(False)

    def state_values(self, observations: Tensor) -> Tensor:
        return self.value_head(observations)


def main() -> None:
    problem = LinearQuadratic(start=1.0, action_bound=3.0)
    # Short episodes, because near the origin there is little to be seen.
    env = gymnasium.wrappers.TimeLimit(problem, 10)
    best = problem.optimal_gain(DISCOUNT)
    print(f"{'':22}{'K':>16}{'return':>10}{'optimum':>10}{'more cost':>11}{'steps':>8}{'seconds':>9}")

    def report(name: str, gain: np.ndarray, noise: float, steps: int, seconds: float) -> None:
        covariance = [[noise**2]]
        reached, optimum = (problem.expected_return(k, DISCOUNT, covariance) for k in (gain, best))
        more = reached / optimum - 1
        print(
            f"{name:22}{np.array2string(gain[0], precision=3):>16}{reached:10.4f}{optimum:10.4f}{more:11.2%}"
            f"{steps:8}{seconds:9.1f}"
        )

    gaussian = LinearGaussian(problem)
    deterministic = DeterministicPolicy.for_env(env, hidden=(), critics=[Quadratic(3)], squash=False, noise=0.2)
    for policy in (gaussian, deterministic):
        # The problem is symmetric about the origin, and what is evaluated exactly is a gain.
        policy.action_head.bias.requires_grad_(False)
    report("Riccati", best, 0.0, 0, 0.0)
    report("half of that", best / 2, 0.0, 0, 0.0)
    report("Riccati, with noise", best, NOISE, 0, 0.0)

    ppo = PPO(
        gaussian,
        EnvironmentSampler(env, num_envs=16, steps=32),
        discount=DISCOUNT,
        learning_rate=Decay(0.05, 30),
    )
    dpg = DPG(
        deterministic,
        EnvironmentSampler(env, num_envs=16, steps=8),
        discount=DISCOUNT,
        warm_up=256,
        gradient_steps=16,
        # The actor takes one step for four of the critic: who follows a slope must wait until it is known.
        policy_delay=4,
        tau=0.05,
        learning_rate=Decay(0.1, 50),
    )
    for agent, noise, iterations, steps in ((ppo, NOISE, 30, 512), (dpg, 0.0, 50, 128)):
        start = time.perf_counter()
        agent.learn(iterations, progress=False)
        gain = -agent.policy.action_head.weight.detach().double().numpy()
        report(type(agent).__name__, gain, noise, iterations * steps, time.perf_counter() - start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
