"""Where learners of the KL-regularised objective end, beside the exact optimum of a small text problem."""

import itertools

import numpy as np
import pytest
import torch

from aligngym.agents import GRPO, PPO, RLOO, EpisodeSampler, ModelSampler, SoftValueIteration
from aligngym.agents.exact_gradients import expected_return, penalised
from aligngym.agents.group_fixed_point import GroupAdvantages, group_fixed_point
from aligngym.agents.group_relative import CISPO, DAPO, GSPO
from aligngym.agents.reinforce_plus_plus import ReinforcePlusPlus
from aligngym.core import Power, Sampler, TabularPolicy
from aligngym.core.advantages import group_normalised
from aligngym.envs import TabularEnv, TokenMDP

VOCABULARY, LENGTH, BETA = 3, 3, 0.4


class Drawn(Sampler):
    """Complete texts, drawn from all of them by their probability, in groups."""

    def __init__(self, problem, groups, group_size):
        self.rows, self.metrics = problem.all_trajectories(), {}
        self.group = torch.arange(groups).repeat_interleave(group_size)

    def sample(self, policy, seed):
        weights = policy(self.rows).log_probs.sum(dim=1).exp().detach()
        generator = torch.Generator().manual_seed(seed)
        drawn = self.rows[torch.multinomial(weights, len(self.group), replacement=True, generator=generator)]
        drawn.group = self.group
        return drawn


@pytest.fixture(scope="module")
def problem():
    """Random rewards, and a reference that is far from uniform."""
    generator = np.random.default_rng(3)
    tokens = TokenMDP(generator.normal(size=VOCABULARY**LENGTH), VOCABULARY, LENGTH)
    return tokens, generator.dirichlet(np.ones(VOCABULARY), tokens.mdp.num_states)


LEARNERS = {
    "ppo": lambda policy, tokens, **options: PPO(
        policy(True), ModelSampler(tokens.mdp, num_envs=64, steps=LENGTH), discount=1.0, minibatch_size=None, **options
    ),
    "ppo with lambda 1": lambda policy, tokens, **options: PPO(
        policy(True),
        ModelSampler(tokens.mdp, num_envs=64, steps=LENGTH),
        discount=1.0,
        trace=1.0,
        minibatch_size=96,
        **options,
    ),
    "rloo": lambda policy, tokens, **options: RLOO(policy(False), Drawn(tokens, 8, 8), **options),
    "rloo on an environment": lambda policy, tokens, **options: RLOO(
        policy(False), EpisodeSampler(TabularEnv(tokens.mdp), episodes=64, group_size=16), **options
    ),
    "dr grpo": lambda policy, tokens, **options: GRPO(
        policy(False), Drawn(tokens, 8, 8), scale=False, normalise="trajectories", epochs=2, **options
    ),
    "grpo": lambda policy, tokens, **options: GRPO(policy(False), Drawn(tokens, 8, 8), **options),
    "dapo": lambda policy, tokens, **options: DAPO(policy(False), Drawn(tokens, 8, 8), **options),
    "gspo": lambda policy, tokens, **options: GSPO(policy(False), Drawn(tokens, 8, 8), **options),
    "cispo": lambda policy, tokens, **options: CISPO(policy(False), Drawn(tokens, 8, 8), epochs=2, **options),
    "reinforce++": lambda policy, tokens, **options: ReinforcePlusPlus(policy(False), Drawn(tokens, 8, 8), **options),
    "reinforce++ baseline": lambda policy, tokens, **options: ReinforcePlusPlus(
        policy(False), Drawn(tokens, 8, 8), group_baseline=True, **options
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_with_the_penalty_in_the_reward_all_reach_the_regularised_optimum(problem, name):
    """Within 1 % of what there is to gain in J = E[R] − β KL(π‖π_ref), both of which are computed exactly."""
    tokens, reference = problem
    exact = SoftValueIteration(tokens.mdp, discount=1.0, beta=BETA, reference=reference).learn(progress=False)
    best, start = exact.values[0], expected_return(tokens.mdp, reference, 1.0)
    agent = LEARNERS[name](
        lambda critic: TabularPolicy(*reference.shape, reference, critic=critic),
        tokens,
        beta=BETA,
        learning_rate=Power(0.1, exponent=0.8, offset=30),
    )
    agent.learn(100 if name.startswith("ppo") else 150, progress=False)
    learned = penalised(tokens.mdp, agent.policy, BETA, reference)
    gap = (best - expected_return(learned, agent.policy, 1.0)) / (best - start)
    print(f"{name}: {100 * gap:.3f} %")
    assert 0 <= gap < 0.01


REWARDS, REFERENCE = np.array([1.0, 0.2, -0.5]), np.array([0.15, 0.35, 0.5])


def logits_policy(probabilities):
    policy = TabularPolicy(1 + len(REWARDS), len(REWARDS), np.tile(REFERENCE, (1 + len(REWARDS), 1))).double()
    policy.logits.data[0] = torch.as_tensor(np.log(probabilities))
    return policy


def all_groups(size):
    return np.array(list(itertools.product(range(len(REWARDS)), repeat=size)))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_mean_advantages_are_those_over_all_ordered_groups(size, scale):
    policy = np.array([0.2, 0.5, 0.3])
    groups = all_groups(size)
    number = torch.arange(len(groups)).repeat_interleave(size)
    advantages = group_normalised(torch.as_tensor(REWARDS[groups]).flatten(), number, scale).view(groups.shape).numpy()
    others = policy[groups[:, 1:]].prod(axis=1)
    expected = [(others * advantages[:, 0])[groups[:, 0] == y].sum() for y in range(len(REWARDS))]
    found = GroupAdvantages(REWARDS, size, scale)(policy)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert policy @ found == pytest.approx(0, abs=1e-12)
    if not scale:
        np.testing.assert_allclose(found, (1 - 1 / size) * (REWARDS - policy @ REWARDS), atol=1e-12)


def expected_step(policy, size, **options):
    """Return GRPO's expected gradient with respect to the logits of the first token, over all groups."""
    tokens = TokenMDP(REWARDS, len(REWARDS), 1)
    rows = tokens.all_trajectories()
    rows.rewards = torch.as_tensor(REWARDS)[:, None]
    probabilities = policy.logits.detach()[0].softmax(0).numpy()
    total = 0
    for group in all_groups(size):
        agent = GRPO(policy, Drawn(tokens, 1, size), **options)
        policy.zero_grad()
        (batch,) = agent.minibatches(agent.judge(rows[torch.as_tensor(group)]))
        losses, _ = agent.losses(batch)
        (losses.sum() / agent.weight(batch)).backward()
        total = total + probabilities[group].prod() * policy.logits.grad[0]
    return total


@pytest.mark.parametrize("kl", ["reward", "k2", "k3"])
@pytest.mark.parametrize("size", [2, 4])
def test_grpo_rests_exactly_at_its_fixed_point(kl, size):
    beta = 0.6
    rest = group_fixed_point(REWARDS, REFERENCE, beta, size, kl)
    advantages = GroupAdvantages(REWARDS, size)(rest)
    expected = {
        "reward": REFERENCE * np.exp(REWARDS / beta),
        "k2": REFERENCE * np.exp(advantages / beta),
        "k3": REFERENCE / (1 - advantages / beta),
    }[kl]
    np.testing.assert_allclose(rest, expected / (1 if kl == "k3" else expected.sum()), atol=1e-8)
    # float32 holds the reference and its rewards; a group of equal returns is equal up to that.
    tolerance = 5e-3 if kl == "reward" else 1e-6
    assert float(expected_step(logits_policy(rest), size, beta=beta, kl=kl).abs().max()) < tolerance
    # Elsewhere, such as at another estimator's fixed point, it does not rest.
    other = group_fixed_point(REWARDS, REFERENCE, beta, size, "k2" if kl == "k3" else "k3")
    assert float(expected_step(logits_policy(other), size, beta=beta, kl=kl).abs().max()) > 0.01


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_without_the_deviation_a_kl_loss_weighs_more(kl):
    """β G / (G − 1), because the return itself is part of its group's mean."""
    beta, size = 0.6, 3
    rest = group_fixed_point(REWARDS, REFERENCE, beta, size, kl, scale=False)
    heavier, advantages = beta * size / (size - 1), REWARDS - rest @ REWARDS
    expected = REFERENCE * np.exp(advantages / heavier) if kl == "k2" else REFERENCE / (1 - advantages / heavier)
    np.testing.assert_allclose(rest, expected / expected.sum(), atol=1e-8)
    assert float(expected_step(logits_policy(rest), size, beta=beta, kl=kl, scale=False).abs().max()) < 1e-6


@pytest.mark.parametrize("kl", ["reward", "k2", "k3"])
def test_grpo_as_published_learns_its_fixed_point(kl):
    beta, size = 0.6, 4
    policy = TabularPolicy(1 + len(REWARDS), len(REWARDS), np.tile(REFERENCE, (1 + len(REWARDS), 1)))
    sampler = Drawn(TokenMDP(REWARDS, len(REWARDS), 1), 512, size)
    agent = GRPO(policy, sampler, beta=beta, kl=kl, learning_rate=Power(0.1, exponent=0.8, offset=20))
    agent.learn(200, progress=False)
    learned = policy.probabilities[0].numpy()
    rest = {name: group_fixed_point(REWARDS, REFERENCE, beta, size, name) for name in ("reward", "k2", "k3")}
    distance = {name: np.abs(learned - other).sum() / 2 for name, other in rest.items()}
    print(kl, distance)
    assert distance[kl] < 0.01
    assert min(d for name, d in distance.items() if name != kl) > 0.03


def test_a_fixed_point_that_cannot_be_found_is_refused():
    for arguments, message in (
        ((REWARDS, REFERENCE, 0.5, 1), "groups of 1"),
        ((REWARDS, REFERENCE, 0.0, 2), "beta is positive"),
        ((REWARDS, REFERENCE, 0.5, 2, "k1"), "kl is 'reward', 'k2' or 'k3'"),
        ((REWARDS, REFERENCE[:2], 0.5, 2), "the reference is a positive distribution over 3"),
        ((REWARDS, [0.5, 0.5, 0.0], 0.5, 2), "the reference is a positive distribution"),
        ((np.arange(30.0), np.full(30, 1 / 30), 0.5, 16), "make group_size smaller"),
    ):
        with pytest.raises(ValueError, match=message):
            group_fixed_point(*arguments)
    with pytest.raises(ArithmeticError, match="no fixed point within"):
        group_fixed_point(REWARDS, REFERENCE, 0.5, 2, max_iterations=3)
