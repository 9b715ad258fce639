import numpy as np
import pytest
import torch

from aligngym.agents import A2C, EnvironmentSampler, PolicyIteration
from aligngym.agents.exact_gradients import discounted_visitation
from aligngym.agents.off_policy_actor_critic import BehaviourSampler, OffPolicyActorCritic, v_trace
from aligngym.core import NetworkPolicy, TabularPolicy, Trajectories
from aligngym.core.advantages import gae
from aligngym.envs import GridWorld, TabularMDP, enumerate_trajectories

DISCOUNT = 0.9


def model(seed=0, states=4, actions=3):
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(states, 0.5), size=(states, actions))
    rewards = generator.normal(size=(states, actions))
    return TabularMDP.from_arrays(transitions, rewards, generator.dirichlet(np.ones(states)))


def random_table(states, actions, seed, **options):
    policy = TabularPolicy(states, actions, **options)
    policy.logits.data = torch.randn(states, actions, generator=torch.Generator().manual_seed(seed))
    return policy


def grid(slip=0.0):
    return GridWorld("S.F\n.#.\n..G", slip=slip, boundary_reward=-0.1)


def agent(policy, behaviour, env=None, *, num_envs=8, steps=8, **options):
    sampler = EnvironmentSampler(env or grid(), num_envs=num_envs, steps=steps)
    return OffPolicyActorCritic(policy, BehaviourSampler(sampler, behaviour), **{"discount": DISCOUNT} | options)


def random_segments(rows=4, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, rows, length, generator=generator, dtype=torch.float64)
    ratios = torch.randn(rows, length, generator=generator, dtype=torch.float64).exp()
    terminated, truncated = torch.rand(2, rows, length, generator=generator) < 0.15
    return rewards, values, next_values, terminated, truncated & ~terminated, ratios


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
def test_v_trace_is_the_published_sum(trace):
    rewards, values, next_values, terminated, truncated, ratios = random_segments()
    mask = torch.ones_like(terminated)
    ours = v_trace(rewards, values, next_values, terminated, truncated, ratios, DISCOUNT, trace, mask)
    targets = values + ratios * ours
    # L. Espeholt et al., eq. 1: v_s = V + Σ_t γ^(t−s) (Π_{s ≤ i < t} c_i) ρ_t δ_t, to the episode's or the row's end.
    for row in range(4):
        for s in range(9):
            total, product = values[row, s].item(), 1.0
            for t in range(s, 9):
                bootstrap = 0 if terminated[row, t] else DISCOUNT * next_values[row, t]
                error = rewards[row, t] + bootstrap - values[row, t]
                total += product * float(ratios[row, t] * error)
                product *= DISCOUNT * trace * ratios[row, t].item()
                if terminated[row, t] or truncated[row, t]:
                    break
            assert targets[row, s].item() == pytest.approx(total)
            if trace == 1:
                # The actor's is q_s − V with q_s = r + γ v_{s+1}.
                over = terminated[row, s] or truncated[row, s] or s == 8
                following = (
                    next_values[row, s] if over else targets[row, s + 1] + next_values[row, s] - values[row, s + 1]
                )
                q = rewards[row, s] + DISCOUNT * following * ~terminated[row, s]
                assert ours[row, s].item() == pytest.approx(float(q - values[row, s]))


def test_v_trace_with_weights_of_one_is_gae_and_steps_over_what_is_masked():
    rewards, values, next_values, terminated, truncated, ratios = random_segments(seed=1)
    mask = torch.rand(ratios.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    mask |= terminated | truncated
    arguments = (rewards, values, next_values, terminated, truncated)
    ones = v_trace(*arguments, torch.ones_like(ratios), DISCOUNT, 0.8, mask)
    torch.testing.assert_close(ones, gae(*arguments, DISCOUNT, 0.8, mask))
    whole = v_trace(*arguments, ratios, DISCOUNT, 0.8, mask)
    for row in range(len(mask)):
        kept = [tensor[row, mask[row]][None] for tensor in (*arguments, ratios)]
        alone = v_trace(*kept, DISCOUNT, 0.8, torch.ones(1, int(mask[row].sum()), dtype=torch.bool))
        torch.testing.assert_close(whole[row, mask[row]], alone[0])


def all_outcomes(mdp, behaviour):
    """Every single step that can happen, and how probable it is under the behaviour's visits."""
    outcomes = mdp.outcomes
    states, actions = np.divmod(outcomes.rows, mdp.num_actions)
    beta = behaviour.probability_table().numpy()
    visits = discounted_visitation(mdp, beta, DISCOUNT)
    visits /= visits.sum()
    chances = visits[states] * beta[states, actions] * outcomes.probabilities
    columns = [torch.tensor(column)[:, None] for column in (states, actions, outcomes.rewards, outcomes.next_states)]
    ends = torch.zeros(len(states), 1, dtype=torch.bool)
    rows = Trajectories(
        *columns[:2], ~ends, columns[2].float(), terminated=ends, truncated=~ends, next_observations=columns[3]
    )
    rows.log_probs = behaviour(rows).log_probs.detach()
    return rows, torch.tensor(chances)[:, None].float(), visits


@pytest.mark.parametrize("max_ratio", [None, 0.8])
def test_the_expected_gradient_is_that_of_the_objective(max_ratio):
    mdp = model()
    policy, behaviour = random_table(4, 3, 1, critic=True), random_table(4, 3, 2)
    policy.values.data = torch.randn(4, 1, generator=torch.Generator().manual_seed(3))
    one = agent(policy, behaviour, max_ratio=max_ratio)
    rows, chances, visits = all_outcomes(mdp, behaviour)
    batch = one.judge(rows)
    batch.weights = chances
    one.value_coefficient = 1.0
    losses, metrics = one.losses(batch)
    losses.sum().backward()
    pi, beta = policy.probability_table().numpy(), behaviour.probability_table().numpy()
    values = policy.values.detach().numpy()[:, 0]
    followed = pi if max_ratio is None else np.minimum(pi, max_ratio * beta)
    errors = visits[:, None] * followed * (mdp.action_values(values, DISCOUNT) - values[:, None])
    # Σ_s d_β Σ_a ρβ ∇ log π A and, for the critic, Σ_s d_β Σ_a ρβ ∇V A, with the critic's A, right or wrong.
    actor = errors - pi * errors.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(-policy.logits.grad.numpy(), actor, atol=1e-6)
    np.testing.assert_allclose(-policy.values.grad.numpy()[:, 0], errors.sum(axis=1), atol=1e-6)
    ratio = float((metrics["ratio"] * chances).sum())
    assert ratio == pytest.approx((visits[:, None] * followed).sum(), rel=1e-5)
    assert (ratio == pytest.approx(1, rel=1e-5)) == (max_ratio is None)


@pytest.mark.parametrize("trace", [0.0, 1.0])
def test_over_all_trajectories_of_the_behaviour_advantages_are_those_of_the_policy(trace):
    base = GridWorld("S.\nFG", step_reward=-0.25).mdp
    paths, mdp = enumerate_trajectories(base, 4), base.unrolled(4)
    policy, behaviour = (random_table(mdp.num_states, 4, seed, critic=True) for seed in (1, 2))
    policy.values.data = torch.randn(mdp.num_states, 1, generator=torch.Generator().manual_seed(3))
    paths.log_probs = behaviour(paths).log_probs.detach()
    batch = agent(policy, behaviour, trace=trace).judge(paths)
    beta = np.exp(paths.log_probs.double().sum(dim=1).numpy())
    assert beta.sum() == pytest.approx(1, rel=1e-5)
    # With λ = 1 it does not matter how wrong the critic is, and with λ = 0 it is bootstrapped from.
    pi, critic = policy.probability_table().numpy(), policy.values.detach().numpy()[:, 0]
    values = np.where(mdp.terminal, 0, critic) if trace == 0 else mdp.evaluate(pi, DISCOUNT)
    start = int(mdp.initial.argmax())
    exact = mdp.action_values(values, DISCOUNT)[start] - critic[start]
    first = paths.actions[:, 0].numpy()
    for action in range(4):
        here = first == action
        mean = (beta * batch.advantages[:, 0].numpy())[here].sum() / beta[here].sum()
        assert mean == pytest.approx(exact[action], abs=1e-5)
    # Weighted by the first ratio as well, what the critic is drawn to is the value of the policy.
    target = (beta * batch.targets[:, 0].numpy()).sum()
    assert target == pytest.approx(critic[start] + pi[start] @ exact, abs=1e-5)


@pytest.mark.parametrize("kind", [TabularPolicy, NetworkPolicy])
@pytest.mark.parametrize("trace", [0.0, 0.9])
def test_a_behaviour_that_is_the_policy_makes_it_a2c(kind, trace):
    env = grid(0.2)
    parameters = []
    for off in (True, False):
        policy = kind.for_env(env, critic="separate") if kind is NetworkPolicy else kind.for_env(env, critic=True)
        sampler = EnvironmentSampler(env, num_envs=4, steps=8)
        options = {"discount": DISCOUNT, "trace": trace, "learning_rate": 0.01, "seed": 5}
        if off:
            one = OffPolicyActorCritic(policy, BehaviourSampler(sampler, policy), **options)
        else:
            one = A2C(policy, sampler, **options)
        one.learn(5, progress=False)
        parameters.append(list(policy.parameters()))
    for ours, theirs in zip(*parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("trace", [0.0, 0.5])
def test_the_critic_learns_the_value_of_the_policy_and_not_of_the_behaviour(trace):
    # Episodes start anywhere, so that the behaviour sees every state often enough.
    env = GridWorld("..F\n.#.\n..G", boundary_reward=-0.1)
    policy, behaviour = random_table(8, 4, 1, critic=True), random_table(8, 4, 2)
    policy.logits.requires_grad_(False)
    one = agent(policy, behaviour, env, num_envs=64, trace=trace, learning_rate=0.02, max_grad_norm=None)
    averages = [one.learn(1, progress=False).policy.values.detach().clone() for _ in range(160)][-80:]
    learned = torch.stack(averages).mean(dim=0).numpy()[:, 0]
    ours, theirs = (env.mdp.evaluate(x.probability_table().numpy(), DISCOUNT) for x in (policy, behaviour))
    visited = ~env.mdp.terminal
    assert np.abs(learned - ours)[visited].max() < 0.12
    assert np.abs(ours - theirs)[visited].max() > 0.4


@pytest.mark.parametrize("slip", [0.0, 0.2], ids=["deterministic", "slippery"])
@pytest.mark.parametrize("seed", range(5))
def test_reaches_the_optimum_from_random_actions_within_ten_thousand_steps(slip, seed):
    env = grid(slip)
    optimum = env.mdp.initial @ env.mdp.evaluate(PolicyIteration(env, DISCOUNT).learn(progress=False).policy, DISCOUNT)
    policy = TabularPolicy.for_env(env, critic=True)
    one = agent(policy, TabularPolicy.for_env(env), env, num_envs=32, learning_rate=0.2, seed=seed)
    one.learn(39, progress=False)
    assert 39 * 32 * 8 < 10_000
    assert env.mdp.initial @ env.mdp.evaluate(policy.probability_table().numpy(), DISCOUNT) >= 0.99 * optimum


@pytest.mark.parametrize("options", [{}, {"trace": 0.9, "max_ratio": 1.0}], ids=["one step", "v-trace"])
def test_reaches_the_optimum_with_a_network(options):
    env = grid()
    policy = NetworkPolicy.for_env(env, hidden=(16,))
    agent(policy, TabularPolicy.for_env(env), env, num_envs=32, learning_rate=0.02, **options).learn(80, progress=False)
    assert env.mdp.initial @ env.mdp.evaluate(policy.probability_table().numpy(), DISCOUNT) >= 0.99 * DISCOUNT**3


def test_metrics_speak_of_the_behaviour_and_evaluation_of_the_policy():
    env = grid()
    right = np.eye(4)[PolicyIteration(env, DISCOUNT).learn(progress=False).policy.argmax(axis=1)]
    policy = TabularPolicy.for_env(env, 0.97 * right + 0.0075, critic=True)
    one = agent(policy, TabularPolicy.for_env(env), env, steps=64)
    metrics = one.iterate()
    assert "return" not in metrics
    assert metrics["behaviour_return"] < 0 < one.evaluate(episodes=5)["return"]
    assert one.evaluate(episodes=5)["return"] == 1


def test_saved_and_resumed_bit_for_bit(tmp_path):
    env = grid(0.1)

    def made():
        return agent(TabularPolicy.for_env(env, critic=True), random_table(8, 4, 7), env, learning_rate=0.1, trace=0.5)

    whole = made().learn(6, progress=False)
    made().learn(3, progress=False).save(tmp_path / "agent")
    second = made().load(tmp_path / "agent").learn(3, progress=False)
    for pair in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(*pair)


def test_what_cannot_work():
    policy, behaviour = TabularPolicy(8, 4, critic=True), TabularPolicy(8, 4)
    for options, message in (
        ({"trace": 2}, r"λ in \[0, 1\], not 2"),
        ({"max_ratio": 0.0}, "max_ratio is positive or None, not 0.0"),
        ({"beta": 0.1}, "beta=0.1: a KL penalty is estimated from actions of the policy itself"),
    ):
        with pytest.raises(ValueError, match=message):
            agent(policy, behaviour, **options)
    with pytest.raises(TypeError, match="needs a critic"):
        agent(TabularPolicy(8, 4), behaviour)
    with pytest.raises(
        ValueError, match=r"action_space of the behaviour is Discrete\(5\), and that of the policy Disc"
    ):
        agent(policy, TabularPolicy(8, 5)).iterate()
    with pytest.raises(ValueError, match="observation_space of the behaviour"):
        agent(policy, TabularPolicy(9, 4)).iterate()
