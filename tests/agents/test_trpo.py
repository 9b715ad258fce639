import numpy as np
import pytest
import torch

from aligngym.agents import EnvironmentSampler, PolicyIteration
from aligngym.agents.natural_policy_gradient import NaturalPolicyGradient
from aligngym.agents.trpo import TRPO
from aligngym.core import NetworkPolicy, TabularPolicy
from aligngym.envs import GridWorld

DISCOUNT = 0.9
GRIDS = {"deterministic": 0.0, "slippery": 0.2}


def grid(slip=0.0):
    return GridWorld("S.F\n.#.\n..G", slip=slip, boundary_reward=-0.1)


def made(env, policy, *, kind=TRPO, num_envs=8, steps=16, **options):
    return kind(policy, EnvironmentSampler(env, num_envs=num_envs, steps=steps), discount=DISCOUNT, **options)


def table(env):
    return TabularPolicy.for_env(env, critic=True)


def whole(agent):
    return agent.weighted(agent.next_batch().steps())


def promises(before, after, batch):
    """The mean KL(π_old‖π) and the change of E[π/π_old · A] on a batch, from tables of probabilities."""
    states, actions = batch.observations[:, 0].numpy(), batch.actions[:, 0].numpy()
    divergences = (before * (np.log(before) - np.log(after))).sum(axis=1)
    ratios = after[states, actions] / before[states, actions]
    return divergences[states].mean(), ((ratios - 1) * batch.advantages[:, 0].numpy()).mean()


@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("kind", [TabularPolicy, NetworkPolicy])
def test_every_step_keeps_both_promises(kind, max_kl):
    env = grid(0.2)
    policy = table(env) if kind is TabularPolicy else NetworkPolicy.for_env(env, hidden=(8,), orthogonal=False)
    agent = made(env, policy, max_kl=max_kl, damping=1e-4, critic_steps=2, trace=0.9, tries=30)
    moves = 0
    for _ in range(8):
        before, batch = policy.probability_table().numpy(), whole(agent)
        metrics = agent.step(batch)
        divergence, improvement = promises(before, policy.probability_table().numpy(), batch)
        assert metrics["kl"] == pytest.approx(divergence, abs=2e-6)
        assert metrics["improvement"] == pytest.approx(improvement, abs=2e-6)
        assert divergence <= max_kl + 1e-6
        assert improvement >= 0
        moves += improvement > 0
        agent.iteration += 1
    assert moves >= 6


def test_a_short_step_is_the_natural_one_and_a_long_one_is_shortened_as_often_as_needed():
    env = grid(0.2)
    for step_size in (0.01, 30.0):
        ours, theirs = table(env), table(env)
        metrics = (agent := made(env, ours, step_size=step_size, tries=50)).step(batch := whole(agent))
        (agent := made(env, theirs, kind=NaturalPolicyGradient, step_size=step_size)).step(whole(agent))
        natural, attempts = theirs.logits.detach() + np.log(4), metrics["tries"]
        assert (attempts == 1) == (step_size < 1)
        taken = ours.logits.detach() + np.log(4)
        torch.testing.assert_close(taken, 0.8 ** (attempts - 1) * natural, rtol=1e-4, atol=1e-6)
    # It is the longest of them that keeps its promises: the one before did not.
    longer = (natural * 0.8 ** (attempts - 2)).softmax(dim=1).double().numpy()
    divergence, improvement = promises(np.full((8, 4), 0.25), longer, batch)
    assert divergence > agent.max_kl
    assert improvement > 0


def test_a_step_that_cannot_keep_its_promises_is_not_taken():
    env = grid()
    policy = table(env)
    agent = made(env, policy, step_size=100.0, tries=3)
    before, batch = policy.logits.detach().clone(), whole(agent)
    metrics = agent.step(batch)
    assert (metrics["kl"], metrics["improvement"], metrics["tries"]) == (0, 0, 3)
    assert torch.equal(policy.logits.detach(), before)
    assert (policy.values != 0).any()  # the critic learns all the same
    # A short way down keeps the policy close, and does not make it better.
    (gradient,) = torch.autograd.grad(agent.actor_losses(batch)[0].mean(), policy.logits)
    assert agent.move(batch, 0.01 * gradient.flatten())["improvement"] == 0
    assert torch.equal(policy.logits.detach(), before)
    assert agent.move(batch, -0.01 * gradient.flatten())["improvement"] > 0
    policy.logits.data = before.clone()
    batch.advantages = torch.zeros_like(batch.advantages)
    assert made(env, policy).step(batch)["improvement"] == 0
    assert torch.equal(policy.logits.detach(), before)


def test_over_several_epochs_ratios_are_to_the_policy_that_acted():
    env = grid(0.2)
    policy = table(env)
    agent = made(env, policy, epochs=3, max_kl=0.01)
    old = policy.probability_table().numpy()
    batch = agent.next_batch()
    gains = []
    for minibatch in agent.minibatches(batch):
        before, _ = agent.actor_losses(minibatch)
        first = promises(old, policy.probability_table().numpy(), minibatch)[1]
        advantages = minibatch.advantages.mean()
        assert -before.mean().item() == pytest.approx(float(advantages) + first, abs=1e-5)
        gains.append(agent.step(minibatch)["improvement"])
    assert len(gains) == 3
    total = promises(old, policy.probability_table().numpy(), minibatch)[1]
    assert sum(gains) == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("slip", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("seed", range(5))
def test_reaches_the_optimum_within_thirty_thousand_steps(slip, seed):
    env = grid(slip)
    optimum = env.mdp.initial @ env.mdp.evaluate(PolicyIteration(env, DISCOUNT).learn(progress=False).policy, DISCOUNT)
    policy = table(env)
    options = {"max_kl": 0.02, "trace": 0.9, "damping": 0.01, "learning_rate": 0.05, "critic_steps": 5, "seed": seed}
    made(env, policy, num_envs=64, steps=16, **options).learn(28, progress=False)
    assert 28 * 64 * 16 < 30_000
    assert env.mdp.initial @ env.mdp.evaluate(policy.probability_table().numpy(), DISCOUNT) >= 0.99 * optimum


def test_reaches_the_optimum_with_a_network():
    env = grid()
    policy = NetworkPolicy.for_env(env, hidden=(16,))
    made(env, policy, num_envs=32, steps=32, max_kl=0.02, trace=0.9, damping=0.01).learn(20, progress=False)
    assert env.mdp.initial @ env.mdp.evaluate(policy.probability_table().numpy(), DISCOUNT) >= 0.99 * DISCOUNT**3


def test_saved_and_resumed_bit_for_bit(tmp_path):
    env = grid(0.1)

    def agent():
        return made(env, NetworkPolicy.for_env(env, hidden=(8,)), max_kl=0.05)

    uninterrupted = agent().learn(6, progress=False)
    agent().learn(3, progress=False).save(tmp_path / "agent.safetensors")
    resumed = agent().load(tmp_path / "agent.safetensors").learn(3, progress=False)
    for pair in zip(uninterrupted.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": 1.0}, "shrink is a factor between 0 and 1, not 1.0"),
        ({"shrink": 0.0}, "not 0.0"),
        ({"tries": 0}, "tries is how many lengths of a step to try, at least 1, not 0"),
        ({"max_kl": -1.0}, "max_kl is δ, positive and finite, not -1.0"),
        ({"damping": -1.0}, "damping is not negative"),
    ],
)
def test_numbers_that_cannot_work(options, message):
    env = grid()
    with pytest.raises(ValueError, match=message):
        made(env, table(env), **options)
    with pytest.raises(TypeError, match="TRPO needs a critic"):
        made(env, TabularPolicy.for_env(env))
