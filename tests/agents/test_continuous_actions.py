"""Gaussian policies on linear dynamics with quadratic costs: the best linear one is known, with and without noise."""

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from aligngym.agents import PPO, REINFORCE, EnvironmentSampler, EpisodeSampler
from aligngym.core import Decay, NetworkPolicy
from aligngym.envs.linear_quadratic import LinearQuadratic

DISCOUNT, STEPS, NOISE = 0.9, 20, 0.3


def problem(limit=STEPS, **options):
    """A time limit only, so that the environment's own bounds do not disturb."""
    env = LinearQuadratic(**{"start": 1.0, "action_bound": 3.0} | options)
    return gymnasium.wrappers.TimeLimit(env, limit)


class Products(nn.Module):
    """All products of two numbers of an observation: what the value of a linear policy is linear in."""

    def forward(self, observations):
        first, second = torch.triu_indices(observations.shape[1], observations.shape[1])
        return observations[:, first] * observations[:, second]


def linear_gaussian(env, *, critic=True, gain=None, seed=0):
    """u ~ N(−K x, σ²) with σ fixed, and V linear in products: the form of the truth."""
    policy = NetworkPolicy.for_env(
        env, hidden=(), critic="separate" if critic else None, log_std=np.log(NOISE), seed=seed
    )
    policy.log_std.requires_grad_(False)
    policy.action_head.bias.requires_grad_(False)
    if critic:
        policy.critic_body, policy.value_head = Products(), nn.Linear(3, 1)
        nn.init.zeros_(policy.value_head.weight)
    if gain is not None:
        policy.action_head.weight.data = -torch.as_tensor(gain, dtype=torch.float32)
    return policy


def exact_return(policy, env, **options):
    gain = -policy.action_head.weight.detach().double().numpy()
    return env.unwrapped.expected_return(gain, DISCOUNT, [[NOISE**2]], **options)


def best_return(env):
    return env.unwrapped.expected_return(env.unwrapped.optimal_gain(DISCOUNT), DISCOUNT, [[NOISE**2]])


def test_trajectories_hold_what_the_policy_drew_and_the_environment_clips():
    """Log-probabilities are those of the Gaussian, not of a clipped one, whose density has lumps at the sides."""
    env = problem(action_bound=0.2, noise=0.0)
    rows = EnvironmentSampler(env, num_envs=4, steps=50).sample(policy := linear_gaussian(env), 0)
    inside = rows.actions.clamp(-0.2, 0.2)
    assert (rows.actions != inside).float().mean() > 0.3
    lqr = env.unwrapped
    following = rows.observations @ torch.from_numpy(lqr.dynamics.T).float()
    following = following + inside @ torch.from_numpy(lqr.control.T).float()
    torch.testing.assert_close(rows.next_observations, following, rtol=1e-4, atol=1e-5)
    # Costs, too, are those of the clipped action.
    costs = torch.einsum(
        "btn,nm,btm->bt", rows.observations, torch.from_numpy(lqr.state_cost).float(), rows.observations
    )
    costs = costs + lqr.action_cost[0, 0] * inside[..., 0] ** 2
    torch.testing.assert_close(rows.rewards, -costs, rtol=1e-4, atol=1e-5)
    means = policy.outputs(rows.observations.flatten(0, 1)).view_as(rows.actions)
    gaussian = torch.distributions.Normal(means, NOISE)
    torch.testing.assert_close(policy(rows).log_probs, gaussian.log_prob(rows.actions)[..., 0])


@pytest.mark.parametrize("critic", [False, True])
def test_the_estimated_gradient_is_that_of_the_return(critic):
    """REINFORCE over whole episodes, discounted states included, is unbiased: four standard errors over 30 batches."""
    env = problem()
    gain = np.array([[0.6, 0.5]])
    lqr, step = env.unwrapped, 1e-5
    covariance, count = [[NOISE**2]], 30
    expected = [
        (
            lqr.expected_return(gain + change, DISCOUNT, covariance, STEPS)
            - lqr.expected_return(gain - change, DISCOUNT, covariance, STEPS)
        )
        / (2 * step)
        for change in step * np.eye(2)[:, None]
    ]
    # The time limit is part of the problem here: it terminates, so nothing is bootstrapped.
    policy = linear_gaussian(env, critic=critic, gain=gain)
    if critic:
        cost = lqr.cost_matrix(gain, DISCOUNT)
        policy.value_head.weight.data = -torch.tensor([[cost[0, 0], 2 * cost[0, 1], cost[1, 1]]]).float()
    baseline = {} if critic else {"baseline": "leave_one_out"}
    agent = REINFORCE(policy, Terminating(env, episodes=32), discount=DISCOUNT, discount_states=True, **baseline)
    found = []
    for agent.iteration in range(count):
        policy.zero_grad()
        (batch,) = agent.minibatches(agent.next_batch())
        agent.backward(batch)
        found.append(policy.action_head.weight.grad[0].clone())
    found = torch.stack(found).double().numpy()
    # The weights are −K and the loss is −J.
    errors = found.std(axis=0, ddof=1) / count**0.5
    assert (np.abs(found.mean(axis=0) - expected) < 4 * errors).all()
    assert (4 * errors < np.abs(expected)).all(), "too few batches to tell"


class Terminating(EpisodeSampler):
    """Takes a time limit for the end of the task."""

    def sample(self, policy, seed):
        rows = super().sample(policy, seed)
        rows.terminated, rows.truncated = rows.truncated, rows.terminated
        return rows


@pytest.mark.parametrize("seed", range(3))
def test_ppo_reaches_the_best_linear_gaussian_policy(seed):
    env = problem()
    policy = linear_gaussian(env, seed=seed)
    sampler = EnvironmentSampler(env, num_envs=16, steps=32)
    agent = PPO(
        policy,
        sampler,
        discount=DISCOUNT,
        learning_rate=Decay(0.05, 30),
        epochs=4,
        minibatch_size=256,
        seed=seed,
    )
    assert exact_return(policy, env) < 1.5 * best_return(env)
    agent.learn(30, progress=False)
    assert best_return(env) >= exact_return(policy, env) > 1.02 * best_return(env)


@pytest.mark.parametrize("seed", range(3))
def test_reinforce_reaches_it_too(seed):
    """From whole episodes without a critic: 20 steps are not for ever, but 0.9²⁰ is 0.12."""
    env = problem()
    policy = linear_gaussian(env, critic=False, seed=seed)
    sampler = EpisodeSampler(env, episodes=32)
    options = {"baseline": "leave_one_out", "learning_rate": Decay(0.05, 60)}
    REINFORCE(policy, sampler, discount=DISCOUNT, seed=seed, **options).learn(60, progress=False)
    assert best_return(env) >= exact_return(policy, env) > 1.02 * best_return(env)


def test_a_trained_deviation_shrinks_towards_the_deterministic_optimum():
    """Noise costs and buys nothing here, so a policy that may do without learns to."""
    env = problem()
    policy = linear_gaussian(env, gain=env.unwrapped.optimal_gain(DISCOUNT))
    policy.log_std.requires_grad_(True)
    sampler = EnvironmentSampler(env, num_envs=16, steps=32)
    PPO(policy, sampler, discount=DISCOUNT, learning_rate=Decay(0.05, 20)).learn(20, progress=False)
    assert float(policy.log_std.detach().exp()) < 0.5 * NOISE


def test_resuming_a_gaussian_policy_is_exact(tmp_path):
    def agent():
        env = problem()
        policy = NetworkPolicy.for_env(env, hidden=(8,), seed=1)
        return PPO(policy, EnvironmentSampler(env, num_envs=4, steps=8), minibatch_size=16, seed=5)

    whole = agent().learn(5, progress=False)
    agent().learn(2, progress=False).save(tmp_path / "agent")
    resumed = agent().load(tmp_path / "agent").learn(3, progress=False)
    for name, value in whole.policy.trainable_state().items():
        assert torch.equal(resumed.policy.trainable_state()[name], value), name
