import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from aligngym.agents import A2C, EnvironmentSampler, PolicyIteration
from aligngym.agents.exact_gradients import (
    advantages,
    discounted_visitation,
    fisher_information,
    natural_gradient,
    policy_gradient,
)
from aligngym.agents.natural_policy_gradient import NaturalPolicyGradient, actor_parameters
from aligngym.core import Experience, NetworkPolicy, Policy, Power, TabularPolicy
from aligngym.envs import GridWorld, TabularMDP
from aligngym.envs.tabular_env import TabularEnv

DISCOUNT = 0.9


def model(seed=0, states=4, actions=3):
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(states, 0.5), size=(states, actions))
    rewards = generator.normal(size=(states, actions))
    return TabularMDP.from_arrays(transitions, rewards, generator.dirichlet(np.ones(states)))


class ScaledTable(TabularPolicy):
    """π(a|s) ∝ exp(scale[s, a] · logits[s, a])."""

    scales = 1.0

    def outputs(self, observations):
        return super().outputs(observations) * torch.as_tensor(self.scales).expand_as(self.logits)[observations]


def table(mdp, *, kind=TabularPolicy, scales=None, seed=1):
    policy = kind(mdp.num_states, mdp.num_actions, critic=True).double()
    logits = torch.tensor(np.random.default_rng(seed).normal(size=(mdp.num_states, mdp.num_actions)))
    if scales is not None:
        policy.scales = torch.tensor(scales)
        logits /= policy.scales
    policy.logits.data = logits
    return policy


def agent(policy, env=None, **options):
    env = env or GridWorld("S.G")
    return NaturalPolicyGradient(
        policy, EnvironmentSampler(env, num_envs=4, steps=8), **{"discount": DISCOUNT} | options
    )


def every_step(mdp, policy, discount=DISCOUNT):
    """All states and actions as a batch, weighted by how often they happen, with their exact advantages."""
    states, actions = (torch.tensor(x.ravel()) for x in np.indices((mdp.num_states, mdp.num_actions)))
    probabilities = policy.probability_table().numpy()
    visits = discounted_visitation(mdp, probabilities, discount)
    weights = (visits[:, None] * probabilities / visits.sum()).ravel() * len(states)
    return Experience(
        states[:, None],
        actions[:, None],
        torch.ones(len(states), 1, dtype=torch.bool),
        advantages=torch.tensor(advantages(mdp, probabilities, discount).ravel())[:, None],
        targets=torch.zeros(len(states), 1),
        weights=torch.tensor(weights)[:, None],
    )


def explicit_fisher(policy, batch, parameters):
    """Σ_s w(s) Σ_a π(a|s) ∇ log π ∇ log πᵀ, one action at a time."""
    size = sum(parameter.numel() for parameter in parameters)
    fisher = torch.zeros(size, size, dtype=torch.float64)
    for row in range(len(batch)):
        log_probs = policy.distribution(batch[row : row + 1]).log_probs[0, 0]
        for log_prob in log_probs:
            score = torch.cat([g.flatten() for g in torch.autograd.grad(log_prob, parameters, retain_graph=True)])
            fisher += batch.weights[row].item() * log_prob.exp().item() * torch.outer(score, score) / len(batch)
    return fisher


def matrix(product, size):
    return torch.stack([product(column) for column in torch.eye(size, dtype=torch.float64)], dim=1)


def flat(parameters):
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@pytest.mark.parametrize("seed", range(3))
def test_the_step_on_all_actions_is_the_exact_natural_gradient(seed):
    mdp = model(seed)
    policy = table(mdp)
    before, batch = policy.logits.detach().clone(), every_step(mdp, policy)
    exact = natural_gradient(mdp, policy.probability_table().numpy(), DISCOUNT)
    one = agent(policy, step_size=0.7, damping=0.0, solver_iterations=50)
    metrics = one.step_actor(batch)
    np.testing.assert_allclose((policy.logits.detach() - before).numpy(), 0.7 * exact, atol=1e-8)
    assert metrics["step_size"] == 0.7
    # With much damping nothing is left of F, and it is the plain gradient of the mean over steps.
    policy.logits.data = before.clone()
    agent(policy, step_size=1.0, damping=1e6).step_actor(batch)
    visits = discounted_visitation(mdp, policy.probability_table().numpy(), DISCOUNT).sum()
    plain = policy_gradient(mdp, before.softmax(1).numpy(), DISCOUNT) / visits
    np.testing.assert_allclose((policy.logits.detach() - before).numpy() * 1e6, plain, rtol=1e-4, atol=1e-8)


def test_the_step_on_samples_is_the_exact_natural_gradient_on_average():
    mdp = model(5, states=3)
    policy = table(mdp)
    probabilities = policy.probability_table().numpy()
    policy.values.data = torch.tensor(mdp.evaluate(probabilities, DISCOUNT))[:, None]
    before = policy.logits.detach().clone()
    sampler = EnvironmentSampler(TabularEnv(mdp), num_envs=200, steps=200)
    one = NaturalPolicyGradient(
        policy, sampler, discount=DISCOUNT, trace=0.0, step_size=1.0, damping=0.0, solver_iterations=50
    )
    batch = one.next_batch()
    one.step_actor(one.weighted(batch.steps()))
    moved = (policy.logits.detach() - before).numpy()
    exact = natural_gradient(mdp, probabilities, DISCOUNT)
    states, actions, errors = (x.flatten().numpy() for x in (batch.observations, batch.actions, batch.advantages))
    for state in range(mdp.num_states):
        here = states == state
        terms = (actions[here, None] == np.arange(3)) / probabilities[state] * errors[here, None]
        terms -= terms.mean(axis=1, keepdims=True)
        # In every state the estimate is the mean of these, up to float32 rewards.
        np.testing.assert_allclose(moved[state], terms.mean(axis=0), atol=1e-4)
        error = terms.std(axis=0) / np.sqrt(here.sum())
        assert error.max() < 0.05
        assert (np.abs(moved[state] - exact[state]) < 4.5 * error).all()


def test_products_with_the_fisher_matrix_of_a_table():
    mdp = model(2)
    policy = table(mdp)
    batch = every_step(mdp, policy)
    product = agent(policy).fisher_product(batch)
    exact = fisher_information(mdp, policy, DISCOUNT)
    exact /= discounted_visitation(mdp, policy, DISCOUNT).sum()
    np.testing.assert_allclose(matrix(product, policy.logits.numel()), exact, atol=1e-12)


def network(critic="separate"):
    # Weights of usual size: with the last layer almost 0, curvature would be almost none.
    space = spaces.Box(-1, 1, (3,))
    return NetworkPolicy(space, spaces.Discrete(3), hidden=(4,), critic=critic, orthogonal=False, seed=3).double()


def network_batch(rows=6):
    generator = torch.Generator().manual_seed(4)
    return Experience(
        torch.randn(rows, 1, 3, generator=generator),
        torch.randint(3, (rows, 1), generator=generator),
        torch.ones(rows, 1, dtype=torch.bool),
        advantages=torch.randn(rows, 1, generator=generator, dtype=torch.float64),
        targets=torch.zeros(rows, 1),
        weights=torch.rand(rows, 1, generator=generator, dtype=torch.float64),
    )


@pytest.fixture
def float64_network(monkeypatch):
    # Observations are read as float32, whatever the weights are.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())


@pytest.mark.usefixtures("float64_network")
def test_products_with_the_fisher_matrix_of_a_network():
    policy, batch = network(), network_batch()
    one = agent(policy)
    expected = explicit_fisher(policy, batch, one.actor)
    torch.testing.assert_close(matrix(one.fisher_product(batch), len(expected)), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.usefixtures("float64_network")
def test_products_with_the_fisher_matrix_of_a_gaussian():
    space = spaces.Box(-1, 1, (3,))
    policy = NetworkPolicy(space, spaces.Box(-9, 9, (2,)), hidden=(), orthogonal=False, log_std=-0.5).double()
    batch = network_batch()
    one = agent(policy)
    names = [name for name, p in policy.named_parameters() if any(p is q for q in one.actor)]
    assert names == ["log_std", "action_head.weight", "action_head.bias"]
    fisher = matrix(one.fisher_product(batch), 2 + 6 + 2)
    # The deviations: 2 each. A linear mean W x + b: x xᵀ / σ² for either row, with a 1 in x for b.
    weights = batch.weights[:, 0] / len(batch)
    x = torch.cat([batch.observations[:, 0].double(), torch.ones(6, 1, dtype=torch.float64)], dim=1)
    block = torch.einsum("n,ni,nj->ij", weights, x, x) / np.exp(-1)
    expected = torch.zeros(10, 10, dtype=torch.float64)
    expected[:2, :2] = 2 * weights.sum() * torch.eye(2, dtype=torch.float64)
    for places in ([2, 3, 4, 8], [5, 6, 7, 9]):
        expected[np.ix_(places, places)] = block
    torch.testing.assert_close(fisher, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.usefixtures("float64_network")
def test_the_step_solves_the_equations_and_ends_at_the_edge_of_the_trust_region():
    policy, batch = network(), network_batch()
    one = agent(policy, max_kl=0.02, damping=0.05, solver_iterations=200)
    before, fisher = flat(one.actor), explicit_fisher(policy, batch, one.actor)
    loss = -(policy(batch).log_probs * batch.advantages * batch.weights).sum() / len(batch)
    gradient = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, one.actor)])
    damped = fisher + 0.05 * torch.eye(len(fisher))
    direction = torch.linalg.solve(damped, gradient)
    critic = [parameter.detach().clone() for parameter in policy.critic_body.parameters()]
    metrics = one.step_actor(batch)
    step = flat(one.actor) - before
    length = np.sqrt(2 * 0.02 / float(direction @ damped @ direction))
    torch.testing.assert_close(step, length * direction, rtol=1e-6, atol=1e-10)
    assert float(step @ damped @ step) / 2 == pytest.approx(0.02)
    assert metrics["step_size"] == pytest.approx(length)
    assert metrics["gradient_norm"] == pytest.approx(float(gradient.norm()))
    assert metrics["kl"] == pytest.approx(float(step @ fisher @ step) / 2, rel=0.3)
    assert all(torch.equal(*pair) for pair in zip(critic, policy.critic_body.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"step_size": 0.5}, {"max_kl": 0.03}], ids=["kakade", "trust region"])
def test_how_the_policy_is_written_down_does_not_matter(options):
    mdp = model(1)
    scales = np.random.default_rng(0).uniform(0.2, 5, size=(mdp.num_states, mdp.num_actions))
    policies = table(mdp), table(mdp, kind=ScaledTable, scales=scales)
    torch.testing.assert_close(policies[0].probability_table(), policies[1].probability_table())
    before = policies[0].probability_table()
    for policy in policies:
        agent(policy, damping=0.0, solver_iterations=100, **options).step_actor(every_step(mdp, policy))
    plain, scaled = (policy.probability_table() for policy in policies)
    assert (plain - before).abs().max() > 0.05
    torch.testing.assert_close(plain, scaled, atol=1e-7, rtol=0)
    # The plain gradient sees the difference.
    gradients = [agent(policy, damping=1e9, step_size=1e9) for policy in policies]
    for one in gradients:
        one.step_actor(every_step(mdp, one.policy))
    assert (policies[0].probability_table() - policies[1].probability_table()).abs().max() > 0.05


def test_the_critic_takes_the_optimisers_steps_and_the_actor_none():
    env = GridWorld("S..\n..G")
    policy = TabularPolicy.for_env(env, critic=True)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0, weight_decay=0.1)
    one = agent(
        policy,
        env,
        optimizer=optimizer,
        learning_rate=0.5,
        critic_steps=2,
        max_grad_norm=None,
        step_size=0.0,
        trace=1.0,
    )
    batch = one.next_batch()
    expected = policy.values.detach()[:, 0].clone()
    for _ in range(2):
        gradient = torch.zeros_like(expected)
        gradient.index_add_(0, batch.observations.flatten(), (expected[batch.observations] - batch.targets).flatten())
        expected -= 0.5 * (gradient / batch.mask.sum() + 0.1 * expected)
    logits = policy.logits.detach().clone() + 1
    policy.logits.data += 1
    metrics = one.step(one.weighted(batch.steps()))
    torch.testing.assert_close(policy.values.detach()[:, 0], expected)
    assert torch.equal(policy.logits.detach(), logits)
    assert (metrics["kl"], metrics["learning_rate"]) == (0, 0.5)
    assert metrics["entropy"] == pytest.approx(np.log(4))


def test_without_advantages_nothing_moves():
    mdp = model()
    policy = table(mdp)
    batch, before = every_step(mdp, policy), policy.logits.detach().clone()
    batch.advantages = torch.zeros_like(batch.advantages)
    assert agent(policy).step_actor(batch)["step_size"] == 0
    assert torch.equal(policy.logits.detach(), before)
    batch.advantages[3] = torch.nan
    with pytest.raises(FloatingPointError, match="nan"):
        agent(policy).step(batch)
    assert torch.equal(policy.logits.detach(), before)
    assert (policy.values == 0).all()


def test_schedules_and_entropy():
    mdp = model()
    policy = table(mdp)
    one = agent(policy, step_size=Power(2.0), entropy_coefficient=0.3, damping=1e6)
    one.iteration = 3
    batch, before = every_step(mdp, policy), policy.logits.detach().clone()
    batch.advantages = torch.zeros_like(batch.advantages)
    entropy = (policy.distribution(batch).entropy() * batch.weights).sum() / len(batch)
    (gradient,) = torch.autograd.grad(0.3 * entropy, policy.logits)
    assert one.step_actor(batch)["step_size"] == 0.5
    torch.testing.assert_close((policy.logits.detach() - before) * 2e6, gradient, rtol=1e-4, atol=1e-9)


GRIDS = {"deterministic": 0.0, "slippery": 0.2}


@pytest.mark.parametrize("slip", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("seed", range(5))
def test_reaches_the_optimum_within_ten_thousand_steps(slip, seed):
    env = GridWorld("S.F\n.#.\n..G", slip=slip, boundary_reward=-0.1)
    optimum = env.mdp.initial @ env.mdp.evaluate(PolicyIteration(env, DISCOUNT).learn(progress=False).policy, DISCOUNT)
    policy = TabularPolicy.for_env(env, critic=True)
    sampler = EnvironmentSampler(env, num_envs=32, steps=16)
    options = {"step_size": 4.0, "learning_rate": 0.05, "critic_steps": 5, "trace": 0.9, "seed": seed}
    NaturalPolicyGradient(policy, sampler, discount=DISCOUNT, **options).learn(19, progress=False)
    assert 19 * 32 * 16 < 10_000
    assert env.mdp.initial @ env.mdp.evaluate(policy.probability_table().numpy(), DISCOUNT) >= 0.99 * optimum


def test_reaches_the_optimum_with_a_network():
    env = GridWorld("S.F\n.#.\n..G", boundary_reward=-0.1)
    policy = NetworkPolicy.for_env(env, hidden=(16,))
    sampler = EnvironmentSampler(env, num_envs=32, steps=32)
    one = NaturalPolicyGradient(policy, sampler, discount=DISCOUNT, step_size=2.0, damping=0.01, trace=0.9)
    one.learn(20, progress=False)
    assert env.mdp.initial @ env.mdp.evaluate(policy.probability_table().numpy(), DISCOUNT) >= 0.99 * DISCOUNT**3


@pytest.mark.parametrize("kind", [TabularPolicy, NetworkPolicy])
def test_saved_and_resumed_bit_for_bit(kind, tmp_path):
    env = GridWorld("S..\n..G", slip=0.1)

    def made():
        policy = TabularPolicy.for_env(env, critic=True) if kind is TabularPolicy else kind.for_env(env, hidden=(8,))
        return agent(policy, env, learning_rate=Power(0.1, 0.5))

    whole = made().learn(6, progress=False)
    first = made().learn(3, progress=False)
    first.save(tmp_path / "agent.safetensors")
    second = made().load(tmp_path / "agent.safetensors").learn(3, progress=False)
    copied = copy.deepcopy(first).learn(3, progress=False)
    for other in (second, copied):
        for mine, theirs in zip(whole.policy.parameters(), other.policy.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(*(x.policy.probability_table() for x in (whole, first)))


def test_the_gradient_is_a_natural_step_apart_from_a2c():
    # The same batch, advantages and gradient as A2C's; what differs is F.
    env = GridWorld("S..\n..G", slip=0.1)
    ours, theirs = (TabularPolicy.for_env(env, critic=True) for _ in range(2))
    one = agent(ours, env, damping=1e9, step_size=1e9, critic_steps=1)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    sampler = EnvironmentSampler(env, num_envs=4, steps=8)
    other = A2C(theirs, sampler, discount=DISCOUNT, learning_rate=1.0, optimizer=optimizer, max_grad_norm=None)
    one.learn(1, progress=False)
    other.learn(1, progress=False)
    torch.testing.assert_close(ours.logits, theirs.logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0}, "max_kl is δ, positive and finite, not 0"),
        ({"max_kl": float("nan")}, "not nan"),
        ({"damping": -0.1}, "damping is not negative, and this one is -0.1"),
        ({"solver_iterations": 0}, "solver_iterations is at least 1, not 0"),
        ({"critic_steps": 0}, "critic_steps is at least 1, not 0"),
        ({"step_size": -1.0}, "not negative"),
        ({"trace": 1.5}, "trace is"),
    ],
)
def test_numbers_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        agent(TabularPolicy(3, 4, critic=True), **options)


def test_policies_that_cannot_work():
    with pytest.raises(TypeError, match="needs a critic"):
        agent(TabularPolicy(3, 4))
    with pytest.raises(ValueError, match="critic='separate'"):
        agent(network("shared").float())

    class Talker(Policy):
        has_critic = True
        forward = reference_log_probs = act = save = None

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    with pytest.raises(TypeError, match="distributions are known, not Talker"):
        agent(Talker())
    assert [p.shape for p in actor_parameters(TabularPolicy(3, 4, critic=True))] == [(3, 4)]
    for space in (spaces.Discrete(3, start=1), spaces.Box(0, 255, (4, 4, 2), np.uint8), spaces.MultiBinary(3)):
        policy = NetworkPolicy(space, spaces.Discrete(2), hidden=(4,))
        named = {id(parameter): name for name, parameter in policy.named_parameters()}
        found = {named[id(parameter)].split(".")[0] for parameter in actor_parameters(policy)}
        assert found == {"actor_body", "action_head"}
