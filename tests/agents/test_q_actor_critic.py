import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from aligngym.agents import EnvironmentSampler, EpisodeSampler, PolicyIteration
from aligngym.agents.exact_gradients import advantages, discounted_visitation, policy_gradient
from aligngym.agents.q_actor_critic import ActionValuePolicy, QActorCritic
from aligngym.core import Experience, NetworkPolicy, TabularPolicy, Trajectories
from aligngym.envs import GridWorld, TabularMDP

DISCOUNT = 0.9


def model(seed=0, states=4, actions=3):
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(states, 0.5), size=(states, actions))
    rewards = generator.normal(size=(states, actions))
    return TabularMDP.from_arrays(transitions, rewards, generator.dirichlet(np.ones(states)))


def random_table(states, actions, seed=1):
    policy = TabularPolicy(states, actions)
    policy.logits.data = torch.randn(states, actions, generator=torch.Generator().manual_seed(seed))
    return policy


def grid(slip=0.0):
    return GridWorld("S.F\n.#.\n..G", slip=slip, boundary_reward=-0.1)


def agent(policy, env=None, *, num_envs=8, steps=8, **options):
    sampler = EnvironmentSampler(env or grid(), num_envs=num_envs, steps=steps)
    return QActorCritic(policy, sampler, **{"discount": DISCOUNT} | options)


def set_action_values(one, values):
    one.policy.critic.weight.data = torch.as_tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("trace", [0.0, 0.6])
def test_targets_are_those_of_sarsa(trace):
    one = agent(random_table(5, 2), trace=trace)
    values = np.arange(10.0).reshape(5, 2) ** 1.5
    set_action_values(one, values)
    policy = one.policy.probability_table().numpy()
    # The task ends in the third step, the recording in the fifth, the row in the last, and one step is nobody's.
    states, actions, following = [0, 1, 2, 3, 1, -1, 4, 2], [1, 0, 1, 1, 0, -1, 0, 1], [1, 2, 4, 1, 3, 4, 2, 0]
    rewards = [1.0, -2.0, 3.0, 0.5, 4.0, 0.0, 2.0, -1.0]
    terminated, truncated = np.zeros((2, 8), dtype=bool)
    terminated[2] = truncated[4] = True
    acted = np.arange(8) != 5
    batch = one.judge(
        Trajectories(
            *(torch.tensor(row)[None] for row in (states, actions, acted, rewards)),
            terminated=torch.tensor(terminated)[None],
            truncated=torch.tensor(truncated)[None],
            next_observations=torch.tensor(following)[None],
        )
    )
    means = (policy * values).sum(axis=1)
    expected, errors = np.zeros(8), np.zeros(9)
    for t in reversed(range(8)):
        if not acted[t]:
            continue
        if terminated[t]:
            bootstrap = 0.0
        elif truncated[t] or t == 7:
            bootstrap = means[following[t]]
        else:
            bootstrap = values[states[t + 1], actions[t + 1]]
        error = rewards[t] + DISCOUNT * bootstrap - values[states[t], actions[t]]
        goes_on = not (terminated[t] or truncated[t])
        errors[t] = error + DISCOUNT * trace * goes_on * errors[t + 1]
        expected[t] = values[states[t], actions[t]] + errors[t]
    np.testing.assert_allclose(batch.targets[0, acted].numpy(), expected[acted], rtol=1e-5)
    taken = np.where(acted, values[states, actions], 0)
    np.testing.assert_allclose(batch.values[0].numpy(), taken, rtol=1e-6)
    np.testing.assert_allclose(batch.advantages[0].numpy(), np.where(acted, taken - means[states], 0), rtol=1e-4)


@pytest.mark.parametrize("baseline", [True, False])
def test_with_exact_action_values_the_gradient_is_exact(baseline):
    mdp = model()
    policy = random_table(mdp.num_states, mdp.num_actions)
    one = agent(policy, baseline=baseline)
    probabilities = one.policy.probability_table().numpy()
    exact = mdp.action_values(mdp.evaluate(probabilities, DISCOUNT), DISCOUNT)
    set_action_values(one, exact)
    states, actions = (torch.tensor(x.ravel())[:, None] for x in np.indices(exact.shape))
    ends = torch.zeros_like(states, dtype=torch.bool)
    rows = Trajectories(states, actions, ~ends, torch.zeros(12, 1), terminated=~ends, truncated=ends)
    batch = one.judge(rows)
    expected = advantages(mdp, probabilities, DISCOUNT) if baseline else exact
    np.testing.assert_allclose(batch.advantages.numpy().reshape(exact.shape), expected, atol=1e-5)
    visits = discounted_visitation(mdp, probabilities, DISCOUNT)
    batch.weights = torch.tensor(visits[:, None] * probabilities).reshape(12, 1).float()
    one.losses(batch)[0].sum().backward()
    np.testing.assert_allclose(-policy.logits.grad.numpy(), policy_gradient(mdp, probabilities, DISCOUNT), atol=3e-5)
    # And the critic is drawn from Q(s, a) to its target, 0 here, by ½ the squared difference.
    weights = batch.weights.reshape(exact.shape).numpy()
    np.testing.assert_allclose(one.policy.critic.weight.grad.numpy(), 0.5 * weights * exact, atol=1e-4)


def test_targets_are_unbiased_where_the_critic_is_right():
    env = grid(0.3)
    policy = random_table(8, 4)
    one = agent(policy, env, num_envs=300, steps=100)
    probabilities = one.policy.probability_table().numpy()
    exact = env.mdp.action_values(env.mdp.evaluate(probabilities, DISCOUNT), DISCOUNT)
    set_action_values(one, exact)
    batch = one.next_batch()
    rows = (batch.observations * 4 + batch.actions).flatten().numpy()
    errors = (batch.targets - batch.values).flatten().numpy()
    for row in np.unique(rows):
        here = errors[rows == row]
        if len(here) >= 100:
            assert abs(here.mean()) < 4.5 * here.std() / np.sqrt(len(here)) + 1e-5, divmod(row, 4)


@pytest.mark.parametrize("trace", [0.0, 0.6])
def test_the_critic_of_a_policy_that_stays_learns_its_action_values(trace):
    env = grid()
    policy = random_table(8, 4).requires_grad_(False)
    one = agent(policy, env, num_envs=64, learning_rate=0.05, trace=trace, max_grad_norm=None)
    critic = one.policy.critic.weight
    learned = torch.stack([(one.learn(1, progress=False), critic.detach().clone())[1] for _ in range(150)])[-75:]
    exact = env.mdp.action_values(env.mdp.evaluate(one.policy.probability_table().numpy(), DISCOUNT), DISCOUNT)
    inner = ~env.mdp.terminal
    assert np.abs(learned.mean(dim=0).numpy() - exact)[inner].max() < 0.12
    assert exact[inner].max() - exact[inner].min() > 1.5


@pytest.mark.parametrize("slip", [0.0, 0.2], ids=["deterministic", "slippery"])
@pytest.mark.parametrize("seed", range(5))
def test_reaches_the_optimum_within_ten_thousand_steps(slip, seed):
    env = grid(slip)
    optimum = env.mdp.initial @ env.mdp.evaluate(PolicyIteration(env, DISCOUNT).learn(progress=False).policy, DISCOUNT)
    policy = TabularPolicy.for_env(env)
    agent(policy, env, num_envs=32, learning_rate=0.2, seed=seed).learn(39, progress=False)
    assert 39 * 32 * 8 < 10_000
    assert env.mdp.initial @ env.mdp.evaluate(policy.probability_table().numpy(), DISCOUNT) >= 0.99 * optimum


@pytest.mark.parametrize("baseline", [True, False])
def test_reaches_the_optimum_with_networks(baseline):
    env = grid()
    policy = NetworkPolicy.for_env(env, hidden=(16,), critic=None)
    body = NetworkPolicy.for_env(env, hidden=(16,), critic=None, orthogonal=False, seed=1)
    critic = nn.Sequential(body.actor_body, body.action_head)
    one = agent(policy, env, num_envs=32, critic=critic, baseline=baseline, learning_rate=0.03)
    one.learn(60, progress=False)
    assert env.mdp.initial @ env.mdp.evaluate(one.policy.probability_table().numpy(), DISCOUNT) >= 0.99 * DISCOUNT**3


def test_a_critic_of_vectors_is_a_network_and_the_same_for_the_same_seed():
    policy = NetworkPolicy(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), critic=None)
    observations = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    once, again, other = (ActionValuePolicy(policy, seed=seed).critic(observations) for seed in (1, 1, 2))
    assert once.shape == (5, 2)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    wrapped = ActionValuePolicy(policy)
    mean = (wrapped.outputs(observations).softmax(1) * wrapped.critic(observations)).sum(1)
    torch.testing.assert_close(wrapped.state_values(observations), mean)
    assert torch.equal(wrapped.reference_outputs(observations), policy.reference_outputs(observations))


def test_whole_episodes_of_different_lengths():
    env = grid()
    policy = TabularPolicy.for_env(env)
    one = QActorCritic(policy, EpisodeSampler(env, episodes=4, max_steps=9), discount=DISCOUNT)
    batch = one.next_batch()
    assert not batch.mask.all()
    for field in (batch.values, batch.advantages):
        assert (field[~batch.mask] == 0).all()
    assert np.isfinite(one.learn(1, progress=False).evaluate(episodes=3)["return"])


def test_saved_and_resumed_bit_for_bit(tmp_path):
    env = grid(0.1)
    whole = agent(TabularPolicy.for_env(env), env, learning_rate=0.1).learn(6, progress=False)
    agent(TabularPolicy.for_env(env), env, learning_rate=0.1).learn(3, progress=False).save(tmp_path / "agent")
    second = agent(TabularPolicy.for_env(env), env, learning_rate=0.1).load(tmp_path / "agent").learn(3, progress=False)
    assert whole.policy.state_dict().keys() >= {"policy.logits", "critic.weight"}
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, second.policy.state_dict()[name]), name
    whole.policy.save(tmp_path / "policy")
    loaded = ActionValuePolicy(TabularPolicy.for_env(env)).load(tmp_path / "policy")
    assert torch.equal(loaded.probability_table(), whole.policy.probability_table())
    assert torch.equal(loaded.critic.weight, whole.policy.critic.weight)
    with pytest.raises(ValueError, match="arguments of the saved one"):
        ActionValuePolicy(TabularPolicy(3, 4)).load(tmp_path / "policy")
    whole.policy.policy.save(tmp_path / "table")
    with pytest.raises(ValueError, match="no network of this kind, ActionValuePolicy"):
        loaded.load(tmp_path / "table")


def test_what_cannot_work():
    with pytest.raises(ValueError, match="has a critic V"):
        agent(TabularPolicy(8, 4, critic=True))
    with pytest.raises(TypeError, match="discrete actions"):
        agent(NetworkPolicy(spaces.Discrete(3), spaces.Box(-1, 1, (2,)), critic=None))
    with pytest.raises(ValueError, match=r"λ in \[0, 1\], not -1"):
        agent(TabularPolicy(8, 4), trace=-1)
    one = agent(TabularPolicy(8, 4))
    state, allowed = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="action_masks=False"):
        one.policy(Experience(state, state, state == 0, action_mask=allowed))
