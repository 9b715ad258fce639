"""On linear dynamics with quadratic costs, where the gradient, the values and the best policy are known exactly."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from aligngym.agents import EnvironmentSampler
from aligngym.agents.deterministic_policy_gradient import DPG, Regression
from aligngym.agents.replay import NStepTransitions, Transitions
from aligngym.core import Decay, NetworkPolicy
from aligngym.core.deterministic_policy import ActionValueNetwork, DeterministicPolicy
from aligngym.envs.linear_quadratic import LinearQuadratic

DISCOUNT = 0.9
GAIN = np.array([[0.6, 0.5]])


def problem(**options):
    """The double integrator, with starts and actions wide enough that Adam's steps are of the size of what matters."""
    return LinearQuadratic(**{"start": 1.0, "action_bound": 3.0} | options)


class QuadraticCritic(nn.Module):
    """Q(x, u) = θᵀ (all products of two of the numbers in x and u) + constant: the form of the truth."""

    def __init__(self, size=3):
        super().__init__()
        self.first, self.second = torch.triu_indices(size, size)
        self.head = nn.Linear(len(self.first), 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, observations, actions):
        both = torch.cat([observations, actions], dim=1)
        return self.head(both[:, self.first] * both[:, self.second])[:, 0]

    def be_exact(self, env, gain):
        """Q(x, u) = r(x, u) + γ E[V(A x + B u + w)] of the policy u = −gain x."""
        following = np.hstack([env.dynamics, env.control])
        now = np.block([[env.state_cost, np.zeros((2, 1))], [np.zeros((1, 2)), env.action_cost]])
        cost = env.cost_matrix(gain, DISCOUNT)
        matrix = now + DISCOUNT * following.T @ cost @ following
        matrix = np.where(np.eye(3), matrix, 2 * matrix)
        constant = DISCOUNT * (env.value(np.zeros(2), gain, DISCOUNT) - np.trace(np.diag(env.noise**2) @ cost))
        self.head.weight.data = -torch.from_numpy(matrix[self.first, self.second])[None].float()
        self.head.bias.data = torch.tensor([float(constant)])
        return self


def linear(env, gain=None, critics=None, **options):
    """u = −K x."""
    critics = critics or [QuadraticCritic()]
    options = {"squash": False, "noise": 0.2} | options
    policy = DeterministicPolicy.for_env(env, hidden=(), critics=critics, **options)
    policy.action_head.bias.requires_grad_(False)
    if gain is not None:
        policy.action_head.weight.data = -torch.from_numpy(gain).float()
    return policy


def dpg(policy, env, *, num_envs=4, steps=4, limit=10, **options):
    sampler = EnvironmentSampler(gymnasium.wrappers.TimeLimit(env, limit), num_envs=num_envs, steps=steps)
    options = {"discount": DISCOUNT, "batch_size": 16, "warm_up": 16} | options
    return DPG(policy, sampler, **options)


def transitions(env, count=64, seed=0):
    """Steps of an environment from anywhere with any action, computed from its matrices."""
    generator = np.random.default_rng(seed)
    states, actions = generator.normal(size=(count, 2)), generator.normal(size=(count, 1))
    following = states @ env.dynamics.T + actions @ env.control.T
    costs = np.einsum("ni,ij,nj->n", states, env.state_cost, states) + env.action_cost[0, 0] * actions[:, 0] ** 2
    fields = (states, actions, -costs, np.full(count, DISCOUNT), following)
    return Transitions(*(torch.from_numpy(field).float() for field in fields))


def state_moments(env, gain):
    """[n, n], Σ_t γ^t E[x_t x_tᵀ], summed until nothing is left."""
    closed, moment = env.dynamics - env.control @ gain, np.diag(env.start**2 / 3)
    total = np.zeros_like(moment)
    for time in range(1000):
        total += DISCOUNT**time * moment
        moment = closed @ moment @ closed.T + np.diag(env.noise**2)
    return total


class TestGradient:
    def test_with_the_exact_critic_it_is_that_of_the_return(self):
        """∇_K J by theorem 1, by the Lyapunov equation and by finite differences of the exact return.

        Two states stand for the distribution: only its second moments count, and theirs are Σ_t γ^t E[x_t x_tᵀ].
        """
        env = problem(noise=0.1)
        agent = dpg(linear(env, GAIN, [QuadraticCritic().be_exact(env, GAIN)]), env)
        states = np.linalg.cholesky(state_moments(env, GAIN)).T * 2**0.5
        agent.policy_losses(torch.from_numpy(states).float()).mean().backward()
        # The weights are −K and the loss is −J, so signs cancel.
        found = agent.policy.action_head.weight.grad
        np.testing.assert_allclose(found, env.return_gradient(GAIN, DISCOUNT), rtol=1e-4)
        slopes = [
            (env.expected_return(GAIN + step, DISCOUNT) - env.expected_return(GAIN - step, DISCOUNT)) / 2e-5
            for step in 1e-5 * np.eye(2)[:, None]
        ]
        np.testing.assert_allclose(found[0], slopes, rtol=1e-4)

    def test_it_vanishes_at_the_best_gain_in_every_state(self):
        env = problem()
        best = env.optimal_gain(DISCOUNT)
        agent = dpg(linear(env, best, [QuadraticCritic().be_exact(env, best)]), env)
        agent.policy_losses(torch.randn(1000, 2)).mean().backward()
        assert agent.policy.action_head.weight.grad.abs().max() < 1e-4

    def test_of_a_network_it_is_the_chain_rule_and_leaves_the_critic_alone(self):
        env = problem()
        policy = DeterministicPolicy.for_env(env, hidden=(8,), critics=2)
        agent = dpg(policy, env)
        states = torch.randn(7, 2)
        agent.policy_losses(states).sum().backward()
        found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        assert found
        assert not any(name.startswith("critics") for name in found)
        policy.zero_grad()
        (-policy.action_values(states, policy.outputs(states))[0].sum()).backward()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, dict(policy.named_parameters())[name].grad)

    @pytest.mark.parametrize("micro_batch_size", [1, 5, 15])
    def test_pieces_do_not_change_it(self, micro_batch_size):
        env = problem()

        def gradient(size):
            agent = dpg(DeterministicPolicy.for_env(env, hidden=(8,), critics=2), env, micro_batch_size=size)
            agent.replay.add(transitions(env))
            agent.backward(agent.next_batch())
            return torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None])

        torch.testing.assert_close(gradient(micro_batch_size), gradient(None), rtol=1e-4, atol=1e-5)


class TestTargets:
    env = problem(noise=0.0)

    def agent(self, **options):
        return dpg(linear(self.env, GAIN, [QuadraticCritic().be_exact(self.env, GAIN)]), self.env, **options)

    def test_without_noise_the_exact_critic_is_its_own_target(self):
        agent, batch = self.agent(), transitions(self.env)
        values = agent.policy.action_values(batch.observations, batch.actions)[0].detach()
        torch.testing.assert_close(agent.targets(batch, None), values, rtol=1e-4, atol=1e-4)

    def test_the_exact_critic_says_the_value_of_the_policy(self):
        agent, states = self.agent(), torch.randn(9, 2)
        values = agent.policy.action_values(states, agent.policy.outputs(states))[0].detach()
        np.testing.assert_allclose(values, self.env.value(states.numpy(), GAIN, DISCOUNT), rtol=1e-4, atol=1e-5)

    def test_a_termination_ends_the_sum_and_a_truncation_does_not(self):
        agent, env = self.agent(), self.env
        rows = agent.sampler.sample(agent.policy, 0)
        rows = EnvironmentSampler(gymnasium.wrappers.TimeLimit(env, 3), num_envs=2, steps=9).sample(agent.policy, 0)
        assert rows.truncated.sum() == 6
        agent.replay.add(agent.transitions(rows))
        batch = agent.replay.sample(200, np.random.default_rng(0))
        values = agent.policy.action_values(batch.observations, batch.actions)[0].detach()
        torch.testing.assert_close(agent.targets(batch, None), values, rtol=1e-4, atol=1e-4)
        rows.terminated, rows.truncated = rows.truncated, rows.terminated
        batch = agent.transitions(rows)
        ends = rows.terminated[rows.mask]
        torch.testing.assert_close(agent.targets(batch, None)[ends], rows.rewards[rows.mask][ends])
        assert (agent.targets(batch, None) < rows.rewards[rows.mask])[~ends].all()

    def test_of_several_critics_the_smallest_counts(self):
        class Sloped(nn.Module):
            def __init__(self, slope):
                super().__init__()
                self.slope = nn.Parameter(torch.tensor(slope))

            def forward(self, observations, actions):
                return self.slope * observations[:, 0]

        batch = transitions(self.env)
        agent = dpg(linear(self.env, GAIN, [Sloped(1.0), Sloped(-2.0)]), self.env)
        shown = batch.next_observations[:, 0]
        expected = batch.returns + DISCOUNT * torch.minimum(shown, -2 * shown)
        torch.testing.assert_close(agent.targets(batch, None), expected)
        # Each critic learns this one target, here without the policy, for whom these have no slope.
        agent.improves = False
        losses, _ = agent.losses(Regression(batch, torch.zeros(len(batch))))
        own = batch.observations[:, 0]
        torch.testing.assert_close(losses.detach(), (own**2 + (2 * own) ** 2) / 2)

    def test_noise_on_the_targets_action_is_cut_off_and_stays_in_the_box(self):
        class Action(nn.Module):
            def forward(self, observations, actions):
                return actions[:, 0]

        policy = linear(self.env, 0 * GAIN, [Action()])
        agent = dpg(policy, self.env, target_noise=0.2)
        batch = transitions(self.env, 20_000)
        batch.discounts[:] = 1.0
        noise = agent.targets(batch, torch.Generator().manual_seed(0)) - batch.returns
        # 0.2 of half the width of 3, cut off at 2.5 standard deviations, which leaves 0.986 of them.
        assert noise.abs().max() == pytest.approx(0.6 * 2.5, rel=1e-5)
        assert float(noise.mean()) == pytest.approx(0.0, abs=5 * 0.6 / 20_000**0.5)
        assert float(noise.std()) == pytest.approx(0.6 * 0.986, rel=0.02)
        policy.action_head.bias.data += 2.5
        agent.target.load_trainable_state(policy.trainable_state())
        agent.target.action_head.bias.data += 2.5
        noisy = agent.targets(batch, torch.Generator().manual_seed(0)) - batch.returns
        assert noisy.max() == pytest.approx(3.0, abs=1e-5)

    def test_targets_move_by_their_share(self):
        agent = dpg(DeterministicPolicy.for_env(self.env, hidden=(4,)), self.env, tau=0.25)
        before = {name: value.clone() for name, value in agent.target.trainable_state().items()}
        said = agent.targets(batch := transitions(self.env), None)
        with torch.no_grad():
            for parameter in agent.policy.parameters():
                parameter += 1
        # Of actor and critic alike, what the policy has become does not matter until the targets have followed it.
        assert torch.equal(agent.targets(batch, None), said)
        agent.follow()
        for name, value in agent.target.trainable_state().items():
            torch.testing.assert_close(value, before[name] + 0.25)


def test_the_policy_takes_every_other_step():
    env = problem()
    agent = dpg(DeterministicPolicy.for_env(env, hidden=(4,)), env, policy_delay=2, gradient_steps=3, tau=1.0)
    agent.learn(1, progress=False)
    moved = []

    def step(batch):
        before = agent.policy.trainable_state()
        before = {name: value.clone() for name, value in before.items()}
        metrics = DPG.step(agent, batch)
        after = agent.policy.trainable_state()
        changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        moved.append(("critics" in changed, "action_head" in changed))
        return metrics

    agent.step = step
    agent.learn(2, progress=False)
    # Iterations 1 and 2 have the steps 3 … 8; the policy moves at even ones, and Adam's momentum must not move it.
    assert moved == [(True, step % 2 == 0) for step in range(3, 9)]


class Recorder(gymnasium.Wrapper):
    """Keeps the actions that it is given."""

    def __init__(self, env):
        super().__init__(env)
        self.given = []

    def step(self, action):
        self.given.append(np.array(action))
        return super().step(action)


def test_actions_are_clipped_in_the_environment_and_before_the_critic_only():
    env = Recorder(problem(action_bound=0.2))
    policy = linear(env, 0 * GAIN, noise=2.0)
    agent = DPG(policy, EnvironmentSampler(lambda: env, num_envs=1, steps=50), batch_size=50, warm_up=50)
    rows = agent.sampler.sample(policy, 0)
    inside = rows.actions.clamp(-0.2, 0.2)
    assert (rows.actions != inside).float().mean() > 0.3
    np.testing.assert_array_equal(np.stack(env.given)[-50:], inside[0].numpy())
    seen = []
    policy.critics[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    agent.losses(Regression(NStepTransitions(DISCOUNT, 1)(rows), torch.zeros(50)))
    torch.testing.assert_close(seen[0], inside[0])


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_best_gain(seed):
    """2 % of the best cost, exactly evaluated, after 6,400 steps of the environment and 800 of the critic."""
    env = problem()
    best = env.expected_return(env.optimal_gain(DISCOUNT), DISCOUNT)
    policy = linear(env, seed=seed)
    agent = dpg(
        policy,
        problem(),
        num_envs=16,
        steps=8,
        batch_size=256,
        warm_up=256,
        learning_rate=Decay(0.1, 50),
        gradient_steps=16,
        policy_delay=4,
        tau=0.05,
        seed=seed,
    )
    agent.learn(50, progress=False)
    gain = -policy.action_head.weight.detach().double().numpy()
    assert env.expected_return(0.5 * env.optimal_gain(DISCOUNT), DISCOUNT) < 1.3 * best
    assert env.expected_return(gain, DISCOUNT) > 1.02 * best


@pytest.mark.parametrize("interruption", [1, 2, 5])
def test_training_resumes_exactly(tmp_path, interruption):
    """Before the warm-up has ended, and after the oldest transitions were forgotten."""

    def agent():
        policy = DeterministicPolicy.for_env(problem(), hidden=(8,), critics=2, seed=2)
        options = {"warm_up": 30, "capacity": 50, "gradient_steps": 3, "policy_delay": 2, "target_noise": 0.2}
        return dpg(policy, problem(), tau=0.1, seed=4, **options)

    whole = agent().learn(7, progress=False)
    agent().learn(interruption, progress=False).save(tmp_path / "agent")
    resumed = agent().load(tmp_path / "agent").learn(7 - interruption, progress=False)
    for one, other in ((whole.policy, resumed.policy), (whole.target, resumed.target)):
        for name, value in one.trainable_state().items():
            assert torch.equal(other.trainable_state()[name], value), name
    for name, value in whole.replay.state_dict()["fields"].items():
        assert torch.equal(resumed.replay.state_dict()["fields"][name], value), name


class TestPolicy:
    box = spaces.Box(np.array([-1.0, 0.0]), np.array([3.0, 10.0]), dtype=np.float64)
    seen = spaces.Box(-np.inf, np.inf, (3,))

    def test_it_stays_in_the_box_and_reaches_its_sides(self):
        policy = DeterministicPolicy(self.seen, self.box, hidden=())
        actions = policy.outputs(1e6 * torch.randn(100, 3))
        torch.testing.assert_close(actions.amin(0), torch.tensor([-1.0, 0.0]))
        torch.testing.assert_close(actions.amax(0), torch.tensor([3.0, 10.0]))
        torch.testing.assert_close(policy.outputs(torch.zeros(1, 3)), torch.tensor([[1.0, 5.0]]))

    def test_greedily_it_takes_its_action_and_otherwise_noise_around_it(self):
        policy = DeterministicPolicy(self.seen, self.box, hidden=(4,), noise=0.3)
        states = torch.randn(5, 3)
        greedy = policy.act(states, greedy=True)[0]
        torch.testing.assert_close(greedy, policy.outputs(states).detach())
        drawn = policy.act(states.expand(20_000, 5, 3), generator=torch.Generator().manual_seed(0))[0]
        deviations = (drawn - greedy).flatten(0, 1).std(dim=0)
        torch.testing.assert_close(deviations, torch.tensor([0.6, 1.5]), rtol=0.02, atol=0)

    def test_a_state_of_its_own_for_each_number(self):
        policy = DeterministicPolicy(spaces.Discrete(4), self.box, hidden=(8,), critics=2)
        states, actions = torch.tensor([0, 3, 3, 1]), torch.rand(4, 2)
        values = policy.action_values(states, actions)
        assert values.shape == (2, 4)
        assert not torch.allclose(values[0], values[1])
        assert len(policy.outputs(states).unique(dim=0)) == 3

    def test_its_reference_is_as_it_was_made(self):
        policy = DeterministicPolicy(self.seen, self.box, hidden=(4,))
        states, before = torch.randn(5, 3), policy.outputs
        before = before(states).detach()
        with torch.no_grad():
            policy.action_head.weight += 1
        torch.testing.assert_close(policy.reference_outputs(states), before)
        assert not torch.allclose(policy.outputs(states), before)

    def test_it_comes_back_from_a_file(self, tmp_path):
        policy, other = (DeterministicPolicy(self.seen, self.box, hidden=(4,), seed=seed) for seed in (0, 1))
        policy.save(tmp_path / "policy")
        states, actions = torch.randn(5, 3), torch.rand(5, 2)
        assert not torch.equal(other.action_values(states, actions), policy.action_values(states, actions))
        other.load(tmp_path / "policy")
        assert torch.equal(other.outputs(states), policy.outputs(states))
        assert torch.equal(other.action_values(states, actions), policy.action_values(states, actions))

    def test_critics_differ_and_a_seed_repeats_them(self):
        one, other = (DeterministicPolicy(self.seen, self.box, hidden=(4,), critics=2, seed=3) for _ in range(2))
        for name, value in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        assert isinstance(one.critics[0], ActionValueNetwork)

    @pytest.mark.parametrize(
        ("space", "options", "error", "message"),
        [
            (
                spaces.Discrete(3),
                {},
                TypeError,
                r"these actions are Discrete\(3\): for discrete ones take .* PPO, or DQN",
            ),
            (spaces.MultiDiscrete([2, 2]), {}, TypeError, "these actions are MultiDiscrete"),
            (spaces.Box(-1, 1, (2, 2)), {}, TypeError, "one-dimensional Box"),
            (spaces.Box(-np.inf, 1, (2,)), {}, ValueError, "open side.*say squash=False"),
            (box, {"noise": 0.0}, ValueError, "noise is positive, not 0"),
            (box, {"noise": float("nan")}, ValueError, "noise is positive"),
            (box, {"critics": 0}, ValueError, "at least one critic is needed, not 0"),
            (box, {"critics": -1}, ValueError, "at least one critic"),
            (box, {"critics": []}, ValueError, "at least one critic"),
            (box, {"activation": "sin"}, ValueError, "activation is one of"),
        ],
    )
    def test_bad_arguments_are_refused(self, space, options, error, message):
        with pytest.raises(error, match=message):
            DeterministicPolicy(self.seen, space, **options)

    def test_an_open_box_without_squashing(self):
        policy = DeterministicPolicy(self.seen, spaces.Box(-np.inf, np.inf, (2,)), squash=False, noise=0.5)
        assert policy.log_std.exp().tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, r"tau must be in \(0, 1\], not 0"),
        ({"tau": 1.5}, "tau must be in"),
        ({"tau": float("nan")}, "tau must be in"),
        ({"discount": 1.1}, "discount must be in"),
        ({"batch_size": 0}, "batch_size is at least 1, not 0"),
        ({"gradient_steps": 0}, "gradient_steps is at least 1"),
        ({"policy_delay": 0}, "policy_delay is at least 1"),
        ({"batch_size": 17}, "batch_size ≤ warm_up ≤ capacity must hold, not 17, 16"),
        ({"warm_up": 200, "capacity": 100}, "must hold, not 16, 200, 100"),
        ({"target_noise": -0.1}, "target_noise is not negative"),
        ({"learning_rate": -1.0}, "not negative"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    env = problem()
    with pytest.raises(ValueError, match=message):
        dpg(linear(env), env, **options)


def test_another_kind_of_policy_is_refused():
    env = problem()
    with pytest.raises(TypeError, match=r"DPG needs .* not NetworkPolicy: PPO trains that, and DQN"):
        dpg(NetworkPolicy.for_env(env), env)
