"""Every estimator against the exact gradient, by adding up all trajectories instead of sampling some."""

import dataclasses
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch

from aligngym.agents import (
    A2C,
    GRPO,
    PPO,
    REINFORCE,
    RLOO,
    EnvironmentSampler,
    EpisodeSampler,
    PolicyGradient,
    PolicyIteration,
    SoftValueIteration,
)
from aligngym.agents.exact_gradients import policy_gradient
from aligngym.core import Decay, Experience, NetworkPolicy, Power, Sampler, TabularPolicy, Trajectories
from aligngym.envs import GridWorld, TabularEnv, TabularMDP, enumerate_trajectories

HORIZON, DISCOUNT = 3, 0.9


class Given(Sampler):
    """Gives the trajectories it was made with."""

    def __init__(self, trajectories):
        self.trajectories, self.metrics = trajectories, {}

    def sample(self, policy, seed):
        return dataclasses.replace(self.trajectories)


def all_trajectories(horizon):
    """All trajectories of a small grid, its model, and a policy that is neither uniform nor deterministic."""
    mdp = TabularMDP.from_env(GridWorld("S.\n.G", step_reward=-0.3))
    rows = enumerate_trajectories(mdp, horizon)
    unrolled = mdp.unrolled(horizon)
    table = np.random.default_rng(0).dirichlet(np.ones(4) * 2, unrolled.num_states)
    return unrolled, rows, table


@pytest.fixture(scope="module")
def problem():
    return all_trajectories(HORIZON)


def policy_of(problem, critic=False):
    model, _, table = problem
    policy = TabularPolicy(model.num_states, model.num_actions, table, critic=critic).double()
    policy.logits.data = torch.as_tensor(np.log(table))
    return policy


def gradient(agent, batch):
    """Return the gradient of J that an agent sees in a batch."""
    agent.policy.zero_grad()
    (minibatch,) = agent.minibatches(batch)
    losses, _ = agent.losses(minibatch)
    (losses.sum() / agent.weight(minibatch)).backward()
    return -agent.policy.logits.grad


def expected_gradient(agent, rows, probabilities):
    """Return E[gradient] over all trajectories, each a batch of its own."""
    total = 0
    for row, probability in enumerate(probabilities):
        total = total + probability * gradient(agent, agent.judge(rows[row : row + 1]))
    return total


def doubled(rows):
    return dataclasses.replace(rows, rewards=rows.rewards.double())


@pytest.mark.parametrize("critic", [False, True], ids=["none", "critic"])
def test_reinforce_is_unbiased_with_any_baseline(problem, critic):
    model, rows, table = problem
    policy = policy_of(problem, critic)
    if critic:
        policy.values.data = torch.randn(model.num_states, 1, dtype=torch.float64)
    agent = REINFORCE(
        policy, Given(rows), discount=DISCOUNT, discount_states=True, value_coefficient=0.0, learning_rate=1.0
    )
    estimate = expected_gradient(agent, doubled(rows), policy(rows).log_probs.sum(1).exp().detach())
    np.testing.assert_allclose(estimate, policy_gradient(model, table, DISCOUNT), atol=1e-7)


def test_a_critic_is_subtracted_from_the_return(problem):
    model, rows, _ = problem
    policy = policy_of(problem, critic=True)
    policy.values.data = torch.randn(model.num_states, 1, dtype=torch.float64)
    batch = REINFORCE(policy, Given(rows), discount=1.0, learning_rate=1.0).judge(doubled(rows))
    to_go = doubled(rows).rewards.flip(1).cumsum(1).flip(1)
    values = policy.values.detach()[rows.observations.clamp(min=0), 0]
    torch.testing.assert_close(batch.advantages, torch.where(rows.mask, to_go - values, 0.0))
    torch.testing.assert_close(batch.targets[rows.mask], to_go[rows.mask])


def test_without_the_discount_of_states_the_direction_is_another(problem):
    model, rows, table = problem
    policy = policy_of(problem)
    agent = REINFORCE(policy, Given(rows), discount=DISCOUNT, learning_rate=1.0)
    estimate = expected_gradient(agent, doubled(rows), policy(rows).log_probs.sum(1).exp().detach())
    exact = policy_gradient(model, table, DISCOUNT)
    assert np.abs(estimate.numpy() - exact).max() > 1e-3
    # What remains is the gradient with every state's visits counted in full: γ^t is what the state at time t lacks.
    time = np.arange(model.num_states) // 4
    counted = exact / DISCOUNT ** time[:, None]
    np.testing.assert_allclose(estimate, counted, atol=1e-7)


@pytest.mark.parametrize("kind", [REINFORCE, RLOO, GRPO])
def test_groups_of_two_are_unbiased(kind):
    """The expectation over all pairs; GRPO without its standard deviation, whose leave-one-out factor is 1/2."""
    problem = all_trajectories(horizon=2)
    model, rows, table = problem
    policy = policy_of(problem)
    options = {"baseline": "leave_one_out", "discount_states": True} if kind is REINFORCE else {}
    options |= {"scale": False, "normalise": "trajectories"} if kind is GRPO else {}
    agent = kind(policy, Given(rows), discount=1.0, learning_rate=1.0, **options)
    probabilities = policy(rows).log_probs.sum(1).exp().detach()
    total = 0
    for one, p in enumerate(probabilities):
        for other, q in enumerate(probabilities):
            batch = agent.judge(doubled(rows)[torch.tensor([one, other])])
            total = total + p * q * gradient(agent, batch)
    scale = 0.5 if kind is GRPO else 1.0
    np.testing.assert_allclose(total, scale * policy_gradient(model, table, 1.0), atol=1e-7)


def test_actor_critic_with_the_true_values_is_unbiased(problem):
    """With V = v_π every λ gives E[A] = the advantage, so the weighted sum over steps is exact."""
    model, rows, table = problem
    policy = policy_of(problem, critic=True)
    policy.values.data = torch.as_tensor(model.evaluate(table, 1.0))[:, None]
    probabilities = policy(rows).log_probs.sum(1).exp().detach()
    for trace in (0.0, 0.6, 1.0):
        agent = A2C(policy, Given(rows), trace=trace, discount=1.0, normalise="trajectories", learning_rate=1.0)
        estimate = expected_gradient(agent, doubled(rows), probabilities)
        np.testing.assert_allclose(estimate, policy_gradient(model, table, 1.0), atol=1e-7)


@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_the_first_step_of_a_clipped_surrogate_is_the_policy_gradient(problem, kind):
    """At π = π_old all ratios are 1 and nothing is clipped."""
    _, rows, _ = problem
    given = doubled(rows)[torch.arange(0, len(rows), 7)]
    options = {"epochs": 1, "minibatch_size": None, "normalise_advantages": None} if kind is PPO else {}
    clipped = kind(policy_of(problem, kind is PPO), Given(given), value_coefficient=0.0, **options)
    plain = type("Plain", (kind,), {"objective": PolicyGradient.objective})(
        policy_of(problem, kind is PPO), Given(given), value_coefficient=0.0, **options
    )
    torch.testing.assert_close(
        gradient(clipped, clipped.judge(given)), gradient(plain, plain.judge(given)), rtol=1e-12, atol=1e-14
    )


def test_what_is_clipped_has_no_gradient(problem):
    """An action whose odds have moved too far in the direction of its advantage is left alone, and comes back."""
    _, rows, _ = problem
    given = doubled(rows)[:1]
    agent = PPO(
        policy_of(problem, True),
        Given(given),
        epochs=1,
        minibatch_size=None,
        normalise_advantages=None,
        value_coefficient=0.0,
        clip=0.2,
    )
    for advantage, shift, moves in ((1.0, 0.3, False), (1.0, -0.3, True), (-1.0, 0.3, True), (-1.0, -0.3, False)):
        batch = agent.judge(given)
        batch.advantages = torch.where(batch.mask, advantage, 0.0).double()
        batch.log_probs = batch.log_probs - shift
        assert bool((gradient(agent, batch) != 0).any()) is moves


def test_normalisations(problem):
    """Two trajectories of one and three actions, worked out by hand."""
    _, rows, _ = problem
    lengths = rows.lengths
    pair = doubled(rows)[torch.tensor([int((lengths == 3).nonzero()[0]), int((lengths == 2).nonzero()[0])])]
    policy = policy_of(problem)
    agents = {
        name: REINFORCE(policy, Given(pair), normalise=name, learning_rate=1.0)
        for name in ("actions", "trajectories", "lengths")
    }
    per_row = [gradient(agents["trajectories"], agents["trajectories"].judge(pair[i : i + 1])) for i in (0, 1)]
    for name, expected in (
        ("actions", (per_row[0] + per_row[1]) / 5),
        ("trajectories", (per_row[0] + per_row[1]) / 2),
        ("lengths", (per_row[0] / 3 + per_row[1] / 2) / 2),
    ):
        torch.testing.assert_close(gradient(agents[name], agents[name].judge(pair)), expected)


@pytest.mark.parametrize("normalise", ["actions", "trajectories", "lengths"])
def test_pieces_and_lost_shape_do_not_change_the_step(problem, normalise):
    """Micro-batches, and taking steps out of their trajectories, give the gradient of the whole batch."""
    _, rows, _ = problem

    def step(micro_batch_size, markov):
        policy = policy_of(problem, True)
        policy.markov = markov
        agent = A2C(
            policy,
            Given(doubled(rows)),
            normalise=normalise,
            entropy_coefficient=0.1,
            micro_batch_size=micro_batch_size,
            optimizer=torch.optim.SGD(policy.parameters(), lr=0.1),
            learning_rate=0.1,
            max_grad_norm=None,
        )
        metrics = agent.iterate()
        return policy.logits.detach(), metrics

    whole, metrics = step(None, False)
    for others in ((7, False), (None, True), (11, True)):
        logits, other = step(*others)
        torch.testing.assert_close(logits, whole)
        assert other == pytest.approx(metrics, rel=1e-5)


def test_the_entropy_bonus_is_climbed_and_follows_its_schedule(problem):
    """What it adds to the gradient is c times that of the mean entropy, and c falls if it is told to."""
    _, rows, _ = problem
    found = {}
    for c in (0.0, 0.3, Decay(0.6, 10)):
        agent = A2C(policy_of(problem, True), Given(doubled(rows)), entropy_coefficient=c, learning_rate=0.1)
        agent.iteration = 5
        found[c] = gradient(agent, agent.judge(doubled(rows)))
    policy = policy_of(problem, True)
    (policy(rows, entropy=True).entropy.sum() / rows.mask.sum()).backward()
    torch.testing.assert_close(found[0.3] - found[0.0], 0.3 * policy.logits.grad)
    torch.testing.assert_close(found[Decay(0.6, 10)], found[0.3])


def test_kl_in_the_reward_and_as_k2_have_the_gradient_of_the_regularised_objective(problem):
    """∇(J − β KL) exactly, summed over all trajectories, for both; k3's is another one."""
    _, rows, _ = problem
    beta = 0.3
    target = policy_of(problem)
    log_probs = target(rows).log_probs.sum(1)
    reference = torch.full_like(log_probs, -np.log(4)) * rows.lengths
    returns = (doubled(rows).rewards * rows.mask).sum(1)
    ((log_probs.exp() * (returns - beta * (log_probs - reference))).sum()).backward()
    exact, estimates = target.logits.grad, {}
    for kl in ("reward", "k2", "k3"):
        policy = policy_of(problem)
        policy.reference_logits = torch.zeros_like(policy.logits)
        agent = REINFORCE(policy, Given(rows), beta=beta, kl=kl, discount=1.0, learning_rate=1.0)
        probabilities = policy(rows).log_probs.sum(1).exp().detach()
        estimates[kl] = expected_gradient(agent, doubled(rows), probabilities)
    torch.testing.assert_close(estimates["reward"], exact, atol=1e-7, rtol=1e-6)
    # k2 of one action counts that action alone, and not how it changes which states come after.
    assert (estimates["k2"] - exact).abs().max() < (estimates["k3"] - exact).abs().max()


def test_a_time_limit_is_no_end():
    """One state, reward 1 for ever, recorded for five steps: V = 1/(1 − γ), and not Σ_{t<5} γ^t."""
    env = gymnasium.wrappers.TimeLimit(TabularEnv(TabularMDP.from_arrays([[[1.0]]], [[1.0]])), 5)
    for mode in ("NextStep", "SameStep", "Disabled"):
        copies = gymnasium.vector.SyncVectorEnv([lambda: env] * 1, autoreset_mode=gymnasium.vector.AutoresetMode(mode))
        policy = TabularPolicy.for_env(env, critic=True)
        agent = A2C(policy, EnvironmentSampler(copies, steps=7), discount=0.9, learning_rate=0.3, max_grad_norm=None)
        agent.learn(150, progress=False)
        assert float(policy.values.detach()[0]) == pytest.approx(10, rel=0.01)


MAPS = {"walls": ("S..#\n.#..\n...G", 0.0), "slippery": ("S..\n.#.\n..G", 0.2)}

#: Environment steps in which each agent reaches the optimum: iterations × steps of one sample.
BUDGETS = {
    "reinforce": (100, lambda env, p: REINFORCE(p(True), EpisodeSampler(env, episodes=32), learning_rate=0.1)),
    "leave one out": (
        100,
        lambda env, p: REINFORCE(
            p(False), EpisodeSampler(env, episodes=32), baseline="leave_one_out", learning_rate=0.1
        ),
    ),
    "a2c": (130, lambda env, p: A2C(p(True), EnvironmentSampler(env, steps=16), trace=0.95, learning_rate=0.1)),
    "ppo": (25, lambda env, p: PPO(p(True), EnvironmentSampler(env, steps=64), learning_rate=0.1)),
    "rloo": (
        100,
        lambda env, p: RLOO(
            p(False), EpisodeSampler(env, episodes=32, group_size=16), discount=0.99, learning_rate=0.1
        ),
    ),
    "grpo": (
        100,
        lambda env, p: GRPO(
            p(False), EpisodeSampler(env, episodes=32, group_size=16), discount=0.99, learning_rate=0.1
        ),
    ),
}


@pytest.mark.parametrize("world", MAPS)
@pytest.mark.parametrize("name", BUDGETS)
def test_every_agent_reaches_the_optimum(name, world):
    """Over five seeds: its favourite actions are exactly optimal, and it drew them often enough."""
    drawing, slip = MAPS[world]
    env = gymnasium.wrappers.TimeLimit(GridWorld(drawing, slip=slip, step_reward=-0.05), 50)
    exact = PolicyIteration(env, discount=0.99).learn(progress=False)
    mdp, best = exact.mdp, float(exact.mdp.initial @ exact.values)
    uniform = float(mdp.initial @ mdp.evaluate(np.full((mdp.num_states, mdp.num_actions), 0.25), 0.99))
    iterations, make = BUDGETS[name]
    for seed in range(5):
        agent = make(env, lambda critic: TabularPolicy.for_env(env, critic=critic))
        agent.seed = seed
        agent.learn(iterations, progress=False)
        table = agent.policy.probability_table().numpy()
        greedy = np.eye(mdp.num_actions)[table.argmax(axis=1)]
        assert float(mdp.initial @ mdp.evaluate(greedy, 0.99)) == pytest.approx(best, abs=1e-9), seed
        assert float(mdp.initial @ mdp.evaluate(table, 0.99)) > best - 0.05 * (best - uniform), seed


def test_a_network_reaches_it_too():
    env = gymnasium.wrappers.TimeLimit(GridWorld(MAPS["walls"][0], step_reward=-0.05), 50)
    exact = PolicyIteration(env, discount=0.99).learn(progress=False)
    policy = NetworkPolicy.for_env(env, hidden=(32,))
    PPO(policy, EnvironmentSampler(env, steps=64), learning_rate=0.01).learn(30, progress=False)
    value = exact.mdp.initial @ exact.mdp.evaluate(policy.probability_table().numpy(), 0.99)
    assert value > 0.95 * float(exact.mdp.initial @ exact.values)


@pytest.mark.parametrize("kind", [RLOO, GRPO, PPO])
def test_with_a_reference_the_optimum_is_that_of_the_regularised_problem(kind):
    """Within 1 % of the objective that soft value iteration proves optimal."""
    mdp = TabularMDP.from_env(GridWorld("S.\n.G", step_reward=-0.2))
    beta, horizon = 0.5, 4
    exact = SoftValueIteration(mdp, discount=1.0, beta=beta, horizon=horizon).learn(progress=False)
    rows = enumerate_trajectories(mdp, horizon)
    policy = TabularPolicy(*exact.policy.shape, critic=kind is PPO)

    class Playing(Sampler):
        """Draws among all trajectories by their probability: 64 in one group."""

        metrics: ClassVar = {}

        def sample(self, policy, seed):
            weights = policy(rows).log_probs.sum(1).exp().detach()
            drawn = torch.multinomial(weights, 64, replacement=True, generator=torch.Generator().manual_seed(seed))
            return rows[drawn]

    options = {GRPO: {"scale": False, "normalise": "trajectories"}, RLOO: {}, PPO: {"trace": 1.0, "discount": 1.0}}[
        kind
    ]
    agent = kind(policy, Playing(), beta=beta, learning_rate=Power(0.1, exponent=0.7, offset=50), **options).learn(
        600, progress=False
    )
    log_probs = agent.policy(rows).log_probs.sum(1).detach()
    reference = agent.policy.reference_log_probs(rows).sum(1)
    objective = float((log_probs.exp() * (rows.returns - beta * (log_probs - reference))).sum())
    best = float(beta * (reference + rows.returns / beta).logsumexp(0))
    start = float((reference.exp() * rows.returns).sum())
    assert best - objective < 0.01 * (best - start)


def agents():
    env = gymnasium.wrappers.TimeLimit(GridWorld("S..\n.#.\n..G", slip=0.2, step_reward=-0.05), 20)

    def table(critic):
        return TabularPolicy.for_env(env, critic=critic)

    yield "ppo", lambda: PPO(table(True), EnvironmentSampler(env, num_envs=4, steps=16), minibatch_size=16, seed=3)
    yield (
        "network",
        lambda: PPO(NetworkPolicy.for_env(env), EnvironmentSampler(env, num_envs=4, steps=16), minibatch_size=16),
    )
    yield (
        "cartpole",
        lambda: A2C(
            NetworkPolicy.for_env(gymnasium.make("CartPole-v1")),
            EnvironmentSampler("CartPole-v1", num_envs=4, steps=16),
        ),
    )
    yield "grpo", lambda: GRPO(table(False), EpisodeSampler(env, episodes=8, group_size=4), learning_rate=0.1)
    yield (
        "sync",
        lambda: A2C(
            NetworkPolicy.for_env(gymnasium.make("FrozenLake-v1")),
            EnvironmentSampler("FrozenLake-v1", num_envs=4, steps=16),
        ),
    )


@pytest.mark.parametrize(("name", "make"), list(agents()), ids=lambda value: value if isinstance(value, str) else "")
def test_the_same_seed_and_a_resumed_run_come_to_the_same_bits(name, make, tmp_path):
    def state(agent):
        return {key: value.clone() for key, value in agent.policy.trainable_state().items()}

    whole = make().learn(6, progress=False)
    again = make().learn(6, progress=False)
    first = make().learn(3, progress=False)
    first.save(tmp_path / "agent.safetensors")
    resumed = make().load(tmp_path / "agent.safetensors").learn(3, progress=False)
    for other in (again, resumed):
        assert all(torch.equal(value, state(whole)[key]) for key, value in state(other).items())
    assert resumed.iteration == 6


def test_early_stopping_leaves_the_rest_of_the_batch_out():
    env = GridWorld("S..\n.#.\n..G")
    agent = PPO(
        TabularPolicy.for_env(env, critic=True),
        EnvironmentSampler(gymnasium.wrappers.TimeLimit(env, 20), steps=32),
        learning_rate=1.0,
        epochs=10,
        minibatch_size=64,
        target_kl=0.01,
    )
    assert agent.iterate()["gradient_steps"] < 40


def test_action_masks_are_obeyed_and_trained_with():
    sampler = EpisodeSampler("Taxi-v4", episodes=4, max_steps=30)
    policy = TabularPolicy.for_env(gymnasium.make("Taxi-v4"))
    rows = sampler.sample(policy, seed=0)
    allowed = rows.action_mask.gather(2, rows.actions.clamp(min=0)[..., None])[..., 0]
    assert allowed[rows.mask].all()
    assert not rows.action_mask[rows.mask].all()
    table = policy.logits.detach()[rows.observations[rows.mask]].masked_fill(~rows.action_mask[rows.mask], -torch.inf)
    expected = table.log_softmax(1).gather(1, rows.actions[rows.mask][:, None])[:, 0]
    torch.testing.assert_close(policy(rows).log_probs[rows.mask], expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PPO, {"clip": 0.0}, "clip is ε in"),
        (PPO, {"clip": 1.5}, "clip is ε in"),
        (PPO, {"clip_high": 0.0}, "clip_high is positive"),
        (PPO, {"target_kl": -1.0}, "target_kl is positive"),
        (PPO, {"value_clip": 0.0}, "value_clip is positive"),
        (PPO, {"trace": 1.1}, "trace is λ"),
        (PPO, {"discount": 1.1}, "discount must be in"),
        (PPO, {"epochs": 0}, "epochs is how often"),
        (PPO, {"minibatch_size": 0}, "minibatch_size is at least 1"),
        (PPO, {"entropy_coefficient": -0.1}, "entropy_coefficient is not negative"),
        (PPO, {"normalise": "tokens"}, "normalise is one of actions, trajectories, lengths"),
        (PPO, {"kl": "k1"}, "kl is one of"),
        (REINFORCE, {"baseline": "mean"}, "baseline is 'none'"),
        (REINFORCE, {"baseline": "leave_one_out"}, "has a critic, which is a baseline already"),
    ],
)
def test_impossible_numbers_are_refused(kind, options, message):
    env = GridWorld("S.\n.G")
    with pytest.raises(ValueError, match=message):
        kind(TabularPolicy.for_env(env, critic=True), EnvironmentSampler(env, steps=8), **options)


def test_what_cannot_work_is_refused_when_it_is_seen():
    env = GridWorld("S.\n.G")
    with pytest.raises(TypeError, match="PPO needs a critic"):
        PPO(TabularPolicy.for_env(env), EnvironmentSampler(env, steps=8))
    agent = PPO(TabularPolicy.for_env(env, critic=True), EnvironmentSampler(env, steps=8), minibatch_size=65)
    with pytest.raises(ValueError, match="minibatch_size=65 is more than the 64 actions of a batch"):
        agent.iterate()
    agent = GRPO(TabularPolicy.for_env(env), EnvironmentSampler(env, steps=8))
    with pytest.raises(ValueError, match="sample with a group_size"):
        agent.iterate()
    agent = RLOO(TabularPolicy.for_env(env), EpisodeSampler(env, episodes=4, max_steps=10))
    with pytest.raises(ValueError, match="at least two members"):
        agent.iterate()


def test_a_subclass_is_a_new_algorithm():
    """Ranks instead of returns: what the README shows."""

    class Ranked(GRPO):
        def advantages(self, batch):
            ranks = batch.returns.argsort().argsort().float()
            return ranks / ranks.mean() - 1

    env = gymnasium.wrappers.TimeLimit(GridWorld("S..\n.#.\n..G", step_reward=-0.05), 30)
    exact = PolicyIteration(env, discount=0.99).learn(progress=False)
    agent = Ranked(TabularPolicy.for_env(env), EpisodeSampler(env, episodes=32, group_size=32), learning_rate=0.1)
    agent.learn(100, progress=False)
    table = agent.policy.probability_table().numpy()
    assert exact.mdp.initial @ exact.mdp.evaluate(table, 0.99) > 0.9 * float(exact.mdp.initial @ exact.values)


def test_experience_keeps_the_fields_of_its_trajectories():
    rows = Trajectories(torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    batch = Experience.of(rows, advantages=torch.arange(6.0).view(2, 3))
    assert batch.observations is rows.observations
    torch.testing.assert_close(batch.shares, torch.tensor([[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]))
    steps = batch.steps()
    assert steps.mask.shape == (5, 1)
    assert steps.advantages[:, 0].tolist() == [0, 1, 3, 4, 5]
    assert float(steps.shares.sum()) == pytest.approx(2)


@pytest.mark.parametrize("at_once", [60, 30, 1])
@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.2}, {"beta": 0.2, "kl": "k3", "epochs": 2}, {"normalise": "lengths"}]
)
def test_pieces_of_equal_numbers_of_tokens_do_not_change_the_step(tiny_policy, monkeypatch, at_once, options):
    """GRPO on completions in groups: whole, a few groups at a time, one group at a time, one row at a time."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 257, (4, 6), generator=generator).repeat_interleave(4, dim=0)
    mask = torch.arange(7) < torch.randint(1, 8, (16, 1), generator=generator)
    actions = torch.randint(0, 257, (16, 7), generator=generator).where(mask, -1)
    rewards = torch.randn(16, 1, generator=generator) * (torch.arange(7) == mask.sum(1, keepdim=True) - 1)
    rows = Trajectories(prompts, actions, mask, rewards, terminated=rewards != 0, truncated=mask & False)
    rows.group = torch.arange(4).repeat_interleave(4)
    found = {}
    for size in (None, at_once):
        policy = tiny_policy()
        monkeypatch.setattr(type(policy), "steps_at_once", size)
        agent = GRPO(policy, Given(rows), discount=1.0, learning_rate=0.0, **options)
        cut = [len(piece) for piece in agent.pieces(rows)]
        assert cut == {None: [16], 60: [8, 8], 30: [4] * 4, 1: [1] * 16}[size]
        batch = agent.judge(rows)
        metrics = agent.backward(next(agent.minibatches(batch)))
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
        found[size] = metrics, gradient, batch.advantages, batch.reference_log_probs
    (metrics, gradient, *judged), (other, other_gradient, *other_judged) = found[None], found[at_once]
    assert (other_gradient - gradient).norm() <= 5e-6 * gradient.norm()
    assert other == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(other_judged, judged, rtol=1e-5, atol=1e-5)


def test_policy_and_reference_are_asked_about_the_same_rows(problem, monkeypatch):
    """One after the other about every piece, so that a language model lays it out once."""
    _, rows, _ = problem
    policy, seen = policy_of(problem), []
    monkeypatch.setattr(type(policy), "steps_at_once", 30)
    for name in ("forward", "reference_log_probs"):
        method = getattr(policy, name)
        monkeypatch.setattr(policy, name, lambda rows, method=method, **_: seen.append(rows) or method(rows))
    agent = REINFORCE(policy, Given(rows), beta=0.1, epochs=2, learning_rate=1.0)
    agent.judge(rows)
    assert [len(piece) for piece in seen[::2]] == [len(piece) for piece in agent.pieces(rows)]
    assert len(seen) > 4
    assert all(one is other for one, other in zip(seen[::2], seen[1::2], strict=True))
