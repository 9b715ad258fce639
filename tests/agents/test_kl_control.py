"""The penalty for leaving the reference, in all its forms, and actions that another policy drew."""

import dataclasses

import numpy as np
import pytest
import torch

from aligngym.agents import GRPO, PPO, REINFORCE, RLOO, EnvironmentSampler
from aligngym.agents.kl_control import AdaptiveKL
from aligngym.core import Decay, Sampler, TabularPolicy
from aligngym.core.objectives import truncated_ratio
from aligngym.envs import GridWorld, TokenMDP

VOCABULARY = 3


class Given(Sampler):
    """Gives the trajectories it was made with, or some drawn from them by the policy."""

    def __init__(self, rows, draws=0):
        self.rows, self.draws = rows, draws
        self.metrics = {"return": float(rows.returns.mean())}

    def sample(self, policy, seed):
        if not self.draws:
            return dataclasses.replace(self.rows)
        weights = policy(self.rows).log_probs.sum(1).exp().detach()
        generator = torch.Generator().manual_seed(seed)
        return self.rows[torch.multinomial(weights, self.draws, replacement=True, generator=generator)]


def sequences(length=2):
    """All texts of some tokens, and a function that makes a policy far from a reference that is not uniform."""
    problem = TokenMDP(np.random.default_rng(0).normal(size=VOCABULARY**length), VOCABULARY, length)
    rows = problem.all_trajectories()
    rows.rewards = rows.rewards.double()
    generator = np.random.default_rng(1)
    tables = generator.dirichlet(np.ones(VOCABULARY) * 3, (3, problem.mdp.num_states))

    def policy(number=0, critic=False):
        table = TabularPolicy(problem.mdp.num_states, VOCABULARY, tables[2], critic=critic).double()
        table.logits.data = torch.as_tensor(np.log(tables[number]))
        return table

    return rows, policy


def gradient(agent, batch):
    agent.policy.zero_grad()
    (minibatch,) = agent.minibatches(batch)
    losses, _ = agent.losses(minibatch)
    (losses.sum() / agent.weight(minibatch)).backward()
    return -agent.policy.logits.grad


def expected_gradient(agent, rows, probabilities):
    parts = [p * gradient(agent, agent.judge(rows[n : n + 1])) for n, p in enumerate(probabilities)]
    return torch.stack(parts).sum(dim=0)


def probabilities(policy, rows):
    return policy(rows).log_probs.sum(dim=1).exp()


@pytest.mark.parametrize("kl", ["k2", "k3"])
@pytest.mark.parametrize("old", [0, 1], ids=["first step", "later step"])
def test_a_kl_loss_has_the_gradient_of_its_own_divergence_on_any_actions(kl, old):
    """∇KL(π‖π_ref) for k2 and ∇KL(π_ref‖π) for k3, in the states that π_old visits, summed over all texts."""
    rows, make = sequences()
    rows.rewards = torch.zeros_like(rows.rewards)
    drawn_by, policy = make(old), make(0)
    rows.log_probs = drawn_by(rows).log_probs.detach()
    agent = REINFORCE(policy, Given(rows), beta=0.7, kl=kl, discount=1.0, learning_rate=1.0)
    estimate = expected_gradient(agent, rows, probabilities(drawn_by, rows).detach())

    truth = make(0)
    own, reference = truth.logits.log_softmax(1), truth.reference_logits.log_softmax(1)
    one, other = (own, reference) if kl == "k2" else (reference, own)
    divergences = (one.exp() * (one - other)).sum(dim=1)
    visits = torch.zeros(len(own)).double()
    visits[0] = 1.0
    visits[1 : 1 + VOCABULARY] = drawn_by.logits.detach().softmax(1)[0]
    (-0.7 * visits @ divergences).backward()
    torch.testing.assert_close(estimate, truth.logits.grad, rtol=1e-9, atol=1e-12)


def test_a_penalty_in_the_reward_has_the_gradient_of_the_objective_off_policy_too():
    """With an unbounded weight on actions that another policy drew, one token long so that nothing else differs."""
    rows, make = sequences(1)
    behaviour, truth = make(1), make(0)
    log_ratio = truth(rows).log_probs.sum(1) - truth.reference_log_probs(rows).sum(1)
    (probabilities(truth, rows) * (rows.returns - 0.4 * log_ratio)).sum().backward()
    rows.log_probs = behaviour(rows).log_probs.detach()
    agent = REINFORCE(make(0), Given(rows), beta=0.4, discount=1.0, importance_cap=1e9, learning_rate=1.0)
    estimate = expected_gradient(agent, rows, probabilities(behaviour, rows).detach())
    torch.testing.assert_close(estimate, truth.logits.grad, rtol=1e-9, atol=1e-12)


def test_weights_of_actions_are_cut_and_reported():
    rows, make = sequences()
    policy, behaviour = make(0), make(1)
    rows.log_probs = behaviour(rows).log_probs.detach()
    agent = RLOO(policy, Given(rows), importance_cap=1.1, learning_rate=1.0)
    batch = agent.judge(rows)
    log_ratio = policy(rows).log_probs.detach() - rows.log_probs
    ratio = log_ratio.exp()
    assert (ratio > 1.1).any()
    assert (ratio < 1).any()
    torch.testing.assert_close(agent.importance(batch), ratio.clamp(max=1.1))
    assert not truncated_ratio(policy(rows).log_probs, rows.log_probs, 1.1).requires_grad
    torch.testing.assert_close(batch.log_probs, policy(rows).log_probs.detach())
    returns = rows.returns
    advantages = (returns - returns.mean()) * len(rows) / (len(rows) - 1)
    (ratio.clamp(max=1.1) * policy(rows).log_probs * advantages[:, None]).sum().div(len(rows)).backward()
    expected = policy.logits.grad.clone()
    torch.testing.assert_close(gradient(agent, batch), expected)
    said = agent.describe(batch)
    assert said["sampler_max_ratio"] == pytest.approx(float(ratio.max()))
    assert said["sampler_kl"] == pytest.approx(float((ratio - 1 - log_ratio).mean()))


def test_without_a_cap_the_samplers_log_probs_are_taken_as_they_are():
    rows, make = sequences()
    rows.log_probs = make(1)(rows).log_probs.detach()
    agent = GRPO(make(0), Given(rows), learning_rate=1.0)
    batch = agent.judge(rows)
    assert torch.equal(batch.log_probs, rows.log_probs)
    assert "sampler_kl" not in agent.describe(batch)


def evaluations(monkeypatch, agent):
    """Return how many rows the policy evaluates in one iteration."""
    seen = []
    forward = type(agent.policy).forward
    monkeypatch.setattr(type(agent.policy), "forward", lambda *a, **k: seen.append(len(a[1])) or forward(*a, **k))
    agent.iterate()
    return sum(seen)


@pytest.mark.parametrize(
    ("options", "known", "times"),
    [
        ({}, True, 1),
        ({}, False, 1),
        ({"beta": 0.1}, True, 1),
        ({"beta": 0.1}, False, 2),
        ({"epochs": 2}, False, 3),
        ({"epochs": 2}, True, 2),
        ({"importance_cap": 2.0}, True, 2),
        ({"importance_cap": 2.0}, False, 1),
    ],
)
def test_the_policy_is_asked_no_more_than_needed(monkeypatch, options, known, times):
    rows, make = sequences()
    policy = make(0)
    policy.markov = False
    if known:
        rows.log_probs = policy(rows).log_probs.detach()
    agent = GRPO(policy, Given(rows), learning_rate=0.0, **options)
    assert evaluations(monkeypatch, agent) == times * len(rows)


def test_a_batch_for_one_step_needs_no_old_log_probs():
    rows, make = sequences()
    steps = {}
    for known in (True, False):
        policy = make(0)
        given = dataclasses.replace(rows, log_probs=policy(rows).log_probs.detach() if known else None)
        steps[known] = gradient(agent := GRPO(policy, Given(given)), agent.judge(given))
    torch.testing.assert_close(steps[True], steps[False])


@pytest.mark.parametrize("options", [{"beta": 0.3}, {"beta": 0.3, "kl": "k3"}, {"measure_kl": True}])
def test_divergence_and_returns_of_whole_trajectories_are_reported(options):
    rows, make = sequences()
    policy = make(0)
    said = GRPO(policy, Given(rows), learning_rate=0.0, **options).iterate()
    log_ratio = policy(rows).log_probs.detach() - policy.reference_log_probs(rows)
    beta = options.get("beta", 0.0)
    assert said["kl_to_reference"] == pytest.approx(float(log_ratio.sum(1).mean()))
    assert said["kl_to_reference_k3"] == pytest.approx(float(((-log_ratio).exp() - 1 + log_ratio).sum(1).mean()))
    assert said["return"] == pytest.approx(float(rows.returns.mean()))
    assert said["regularised_return"] == pytest.approx(float((rows.returns - beta * log_ratio.sum(1)).mean()))
    assert said["beta"] == beta


def test_both_estimates_have_the_divergence_for_expectation():
    rows, make = sequences()
    policy = make(0)
    batch = GRPO(policy, Given(rows), measure_kl=True).judge(rows)
    weights = probabilities(policy, rows).detach()
    exact = float((weights * (weights / policy.reference_log_probs(rows).sum(1).exp()).log()).sum())
    from aligngym.agents.batch_metrics import kl_to_reference

    for estimate in kl_to_reference(batch).values():
        assert float(weights @ estimate) == pytest.approx(exact)


def test_the_strength_follows_a_schedule():
    rows, make = sequences()
    agent = GRPO(make(0), Given(rows), beta=Decay(0.8, 4), learning_rate=0.0)
    seen = []
    for _ in range(5):
        seen.append(agent.iterate())
        agent.iteration += 1
    assert [said["beta"] for said in seen] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert seen[-1]["regularised_return"] == pytest.approx(seen[-1]["return"])
    per_nat = [(said["return"] - said["regularised_return"]) / said["kl_to_reference"] for said in seen]
    assert per_nat == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_the_controller_by_hand():
    control = AdaptiveKL(0.5, target=2.0, horizon=100)
    assert control.adapted(0.5, 2.1, 10) == pytest.approx(0.5 * (1 + 0.05 * 0.1))
    assert control.adapted(0.5, 20.0, 10) == pytest.approx(0.5 * 1.02)
    assert control.adapted(0.5, -3.0, 10) == pytest.approx(0.5 * 0.98)
    assert control.adapted(0.5, 2.0, 10) == 0.5


def test_an_adaptive_penalty_holds_the_divergence_and_is_what_rewards_lose():
    rows, make = sequences()
    rows.rewards = 3 * rows.rewards

    def agent():
        return RLOO(make(2), Given(rows, draws=64), beta=AdaptiveKL(0.5, target=0.3, horizon=1000), learning_rate=0.1)

    first = agent()
    said = first.iterate()
    error = np.clip(said["kl_to_reference"] / 0.3 - 1, -0.2, 0.2)
    assert said["beta"] == 0.5
    assert first.beta == pytest.approx(0.5 * (1 + error * 64 / 1000))
    # The next batch is judged with the new strength.
    batch = first.judge(rows)
    lost = rows.rewards - batch.rewards
    torch.testing.assert_close(lost, first.beta * (batch.log_probs - batch.reference_log_probs))

    trained = agent().learn(600, progress=False)
    log_probs = trained.policy(rows).log_probs.sum(1).detach()
    divergence = float((log_probs.exp() * (log_probs - trained.policy.reference_log_probs(rows).sum(1))).sum())
    assert divergence == pytest.approx(0.3, rel=0.15)


def test_an_adaptive_penalty_resumes_to_the_same_bits(tmp_path):
    rows, make = sequences()

    def agent():
        control = AdaptiveKL(0.05, target=0.1, horizon=77)
        return PPO(make(0, critic=True), Given(rows, draws=16), beta=control, minibatch_size=8, learning_rate=0.1)

    whole = agent().learn(6, progress=False)
    first = agent().learn(3, progress=False)
    first.save(tmp_path / "agent")
    resumed = agent().load(tmp_path / "agent")
    assert resumed.beta == first.beta != 0.05
    resumed.learn(3, progress=False)
    assert resumed.beta == whole.beta
    assert torch.equal(resumed.policy.logits, whole.policy.logits)


def test_impossible_numbers_are_refused():
    for name in ("initial", "target", "horizon"):
        with pytest.raises(ValueError, match=f"{name} of AdaptiveKL is positive"):
            AdaptiveKL(**{name: 0.0})
    with pytest.raises(ValueError, match="horizon=10 is too short for batches of 64"):
        AdaptiveKL(horizon=10).adapted(0.1, 1.0, 64)
    env = GridWorld("S.\n.G")
    for options, message in (
        ({"beta": -0.1}, "beta is not negative"),
        ({"beta": float("nan")}, "beta is not negative"),
        ({"importance_cap": 0.0}, "importance_cap is the largest weight"),
    ):
        with pytest.raises(ValueError, match=message):
            GRPO(TabularPolicy.for_env(env), EnvironmentSampler(env, steps=8), **options)
