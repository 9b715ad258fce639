import numpy as np
import pytest
import torch

from aligngym.agents import SoftValueIteration, ValueIteration
from aligngym.core.tabular_policy import TabularPolicy
from aligngym.envs import FiniteHorizon, GridWorld, TabularMDP, TokenMDP, enumerate_trajectories


def random_reference(states, actions, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(actions), size=states)


def log_probability(policy, trajectories):
    """``[B]``, Σ_t ln π(a_t | s_t) over the steps of each trajectory."""
    steps = torch.as_tensor(np.log(policy))[trajectories.observations.clamp(min=0), trajectories.actions.clamp(min=0)]
    return (steps * trajectories.mask).sum(dim=1).numpy()


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_the_policy_is_the_gibbs_distribution_over_all_trajectories(beta):
    mdp = GridWorld("S.\nFG", step_reward=-0.25).mdp
    reference = random_reference(4, 4)
    agent = SoftValueIteration(mdp, 1.0, beta, reference, horizon=4).learn(progress=False)
    trajectories = enumerate_trajectories(mdp, 4)
    log_reference = log_probability(agent.reference, trajectories)
    weights = log_reference + trajectories.returns.double().numpy() / beta
    log_partition = np.logaddexp.reduce(weights)
    np.testing.assert_allclose(log_probability(agent.policy, trajectories), weights - log_partition, atol=1e-6)
    assert agent.values[0] == pytest.approx(beta * log_partition, abs=1e-6)
    # The value of the optimum is what it earns minus what the penalty costs.
    probabilities = np.exp(weights - log_partition)
    kl = probabilities @ (weights - log_partition - log_reference)
    assert agent.values[0] == pytest.approx(probabilities @ trajectories.returns.double().numpy() - beta * kl, abs=1e-6)
    assert agent.iteration == 4
    assert agent.converged


def test_the_optimum_over_token_sequences_is_the_gibbs_distribution():
    tokens = TokenMDP(np.random.default_rng(1).normal(size=27), 3, 3)
    reference = random_reference(tokens.mdp.num_states, 3, seed=2)
    agent = SoftValueIteration(tokens.mdp, 1.0, 0.7, reference).learn(progress=False)
    trajectories = tokens.all_trajectories()
    weights = log_probability(reference, trajectories) + tokens.rewards / 0.7
    expected = weights - np.logaddexp.reduce(weights)
    np.testing.assert_allclose(log_probability(agent.policy, trajectories), expected, atol=1e-12)
    # A tree of depth 3 ends within 3 steps, so there is a certified bound without discount.
    assert agent.error_bound < 1e-12


def test_the_fixed_point_solves_the_soft_bellman_equation():
    mdp = GridWorld(slip=0.2).mdp
    reference = random_reference(25, 4, seed=3)
    agent = SoftValueIteration(mdp, 0.95, 0.3, reference, tolerance=1e-9).learn(progress=False)
    policy, live = agent.policy, ~mdp.terminal
    # Independently of any logsumexp: the value of this policy under rewards minus its penalty, by a linear solve.
    penalised = mdp.rewards - 0.3 * np.log(policy / reference)
    shaped = TabularMDP.from_arrays(mdp.transitions, penalised, mdp.initial, mdp.terminal)
    np.testing.assert_allclose(agent.values[live], shaped.evaluate(policy, 0.95)[live], atol=2e-9)
    # No other policy has more: try mixtures with random ones.
    for seed in range(20):
        other = 0.8 * policy + 0.2 * random_reference(25, 4, seed=100 + seed)
        shaped = TabularMDP.from_arrays(
            mdp.transitions, mdp.rewards - 0.3 * np.log(other / reference), mdp.initial, mdp.terminal
        )
        assert (shaped.evaluate(other, 0.95) <= agent.values + 2e-9).all()


def test_its_limits_are_the_hard_optimum_and_the_reference():
    mdp = GridWorld(slip=0.1).mdp
    reference = random_reference(25, 4, seed=4)
    hard = ValueIteration(mdp, 0.9, tolerance=1e-9).learn(progress=False).values
    soft = SoftValueIteration(mdp, 0.9, 1e-6, reference).learn(progress=False).values
    # β ln π_ref(best) is lost at each step: at most β ln(1 / min π_ref) / (1 − γ).
    assert np.abs(soft - hard).max() <= 1e-6 * -np.log(reference.min()) / 0.1 + 2e-6
    stiff = SoftValueIteration(mdp, 0.9, 1e6, reference, tolerance=1e-5).learn(progress=False).values
    np.testing.assert_allclose(stiff, mdp.evaluate(reference, 0.9), atol=2e-5)


def test_the_bound_holds_after_every_sweep():
    mdp = GridWorld(slip=0.1).mdp
    truth = SoftValueIteration(mdp, 0.9, 0.5, tolerance=1e-11).learn(progress=False).values
    agent = SoftValueIteration(mdp, 0.9, 0.5)
    while not agent.finished:
        agent.iterate()
        assert np.abs(agent.values - truth).max() <= agent.error_bound + 1e-11


def test_what_the_reference_forbids_stays_forbidden():
    grid = GridWorld("S.\n.G")
    reference = np.tile([0.0, 0.5, 0.0, 0.5], (4, 1))
    policy = SoftValueIteration(grid, 0.9, 0.1, reference).learn(progress=False).policy
    assert (policy[:, [0, 2]] == 0).all()
    np.testing.assert_allclose(policy.sum(axis=1), 1)


def test_playing_a_finite_horizon_earns_what_the_policy_is_worth():
    env = FiniteHorizon(GridWorld("S.\nFG", step_reward=-0.25, slip=0.2), horizon=4)
    agent = SoftValueIteration(env.unwrapped, 1.0, 0.5, horizon=4).learn(progress=False)
    played = agent.evaluate(env, episodes=4000, seed=0)
    expected = env.mdp.evaluate(agent.policy, 1.0)[0]
    assert abs(played["return"] - expected) < 5 * played["return_standard_error"]


def test_backward_induction_continues_bit_for_bit(tmp_path):
    def make():
        return SoftValueIteration(GridWorld(slip=0.2), 1.0, 0.5, horizon=6)

    halfway = make()
    with pytest.warns(UserWarning, match="not converged"):
        halfway.learn(2, progress=False)
    halfway.save(tmp_path / "soft.safetensors")
    resumed, through = make().load(tmp_path / "soft.safetensors").learn(progress=False), make().learn(progress=False)
    np.testing.assert_array_equal(resumed.values, through.values)
    assert resumed.iteration == through.iteration == 6


def test_the_policy_starts_a_table_that_gradient_agents_can_compare_with():
    env = FiniteHorizon(GridWorld("S.\n.G"), horizon=3)
    agent = SoftValueIteration(env, 1.0, 0.5).learn(progress=False)
    table = TabularPolicy.for_env(env, reference=agent.policy)
    np.testing.assert_allclose(table.probabilities.numpy(), agent.policy, atol=1e-6)


def test_bad_arguments_are_refused():
    grid = GridWorld("S.\n.G")
    for arguments, message in [
        ({"beta": 0.0}, "beta is positive"),
        ({"beta": 1.0, "reference": np.ones((3, 4)) / 4}, r"shape \(3, 4\)"),
        ({"beta": 1.0, "reference": np.diag([1, 1, 2, 1])}, "reference, state 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            SoftValueIteration(grid, 0.9, **arguments)
