import gymnasium
import numpy as np
import pytest

from aligngym.agents.features import Aggregation, Coordinates, Features, FeatureTable, Fourier, OneHot, Polynomial
from aligngym.agents.gradient_td import GTD2, TDC, sweep_gtd2, sweep_tdc
from aligngym.agents.least_squares_td import LSTD, eligibility_traces
from aligngym.agents.linear_prediction import SemiGradientTD, TrueOnlineTD, sweep_semi_gradient, sweep_true_online
from aligngym.agents.markov_chain import markov_chain, state_distribution
from aligngym.agents.prediction import Episode
from aligngym.agents.projected_bellman import ProjectedBellman
from aligngym.agents.td_lambda import TDLambda
from aligngym.agents.td_prediction import TD0
from aligngym.core.compilation import interpreted
from aligngym.core.schedules import Power
from aligngym.envs.grid_world import GridWorld
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP


def random_task(states=8, actions=2, features=3, seed=0):
    """A task without end, a policy, and features of which the first is a constant."""
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(states, 0.5), size=(states, actions))
    mdp = TabularMDP.from_arrays(transitions, generator.normal(size=(states, actions)))
    table = np.column_stack([np.ones(states), generator.uniform(-1, 1, size=(states, features - 1))])
    return TabularEnv(mdp), generator.dirichlet(np.ones(actions), size=states), FeatureTable(table)


def thousand_states():
    """S&B, example 9.1, in 10 groups of 100 (example 9.2); jumps beyond an end are to the end."""
    transitions = np.zeros((1002, 1, 1002))
    for state in range(1, 1001):
        targets = np.concatenate([np.arange(state - 100, state), np.arange(state + 1, state + 101)]).clip(0, 1001)
        np.add.at(transitions[state, 0], targets, 1 / 200)
    transitions[0, 0, 0] = transitions[-1, 0, -1] = 1
    rewards = np.zeros((1002, 1, 1002))
    rewards[:, 0, 0], rewards[:, 0, -1] = -1, 1
    numbers = np.arange(1002)
    mdp = TabularMDP.from_arrays(transitions, rewards, numbers == 500, np.isin(numbers, (0, 1001)))
    groups = np.where(mdp.terminal, -1, (numbers - 1) // 100)
    return TabularEnv(mdp), Aggregation(groups), np.ones((1002, 1))


def baird():
    """S&B, figure 11.1: action 0, dashed, leads to one of the first six states, action 1, solid, to the seventh."""
    transitions = np.zeros((7, 2, 7))
    transitions[:, 0, :6] = 1 / 6
    transitions[:, 1, 6] = 1
    features = np.hstack([2 * np.eye(7), np.ones((7, 1))])
    features[6, 6:] = 1, 2
    target, behaviour = np.tile([0.0, 1.0], (7, 1)), np.tile([6 / 7, 1 / 7], (7, 1))
    first = np.array([1.0, 1, 1, 1, 1, 1, 10, 1])
    return TabularEnv(TabularMDP.from_arrays(transitions, np.zeros((7, 2)))), features, target, behaviour, first


def zhao():
    """Zhao, figures 8.6 to 8.8: the 5 × 5 grid without end, five actions, the uniform policy."""
    env = GridWorld(stay=True, terminal_target=False)
    # Episodes start anywhere, so that every state is visited.
    env = TabularEnv(TabularMDP(env.mdp.outcomes, np.full(25, 1 / 25), env.mdp.terminal, 5))
    return env, np.full((25, 5), 0.2), Coordinates.of_table(np.argwhere(np.ones((5, 5))))


def upper_limit(samples):
    """The upper end of a 99.9 % confidence interval of the mean."""
    return np.mean(samples) + 3.3 * np.std(samples, ddof=1) / np.sqrt(len(samples))


# The model: distributions, fixed points, bounds.


def test_the_distribution_of_states_counts_steps():
    env = GridWorld("S.\nFG", slip=0.3)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), size=4)
    chain = markov_chain(env.mdp, policy)[0].toarray()
    counts, now = np.zeros(4), env.mdp.initial
    for _ in range(3000):
        counts, now = counts + now * ~env.mdp.terminal, now @ chain
    np.testing.assert_allclose(state_distribution(env.mdp, policy), counts / counts.sum(), atol=1e-10)
    np.testing.assert_allclose(state_distribution(env.mdp, policy, steps=1), [1, 0, 0, 0])
    np.testing.assert_allclose(state_distribution(env.mdp, policy, steps=3000), counts / counts.sum(), atol=1e-10)
    endless, policy, _ = random_task()
    stationary = state_distribution(endless.mdp, policy)
    np.testing.assert_allclose(stationary @ markov_chain(endless.mdp, policy)[0], stationary, atol=1e-12)
    two_islands = TabularMDP.from_arrays(np.eye(2)[:, None, :], np.zeros((2, 1)))
    with pytest.raises(ValueError, match="several stationary distributions"):
        state_distribution(two_islands, np.ones((2, 1)))
    with pytest.raises(ValueError, match="state 0 and may never end"):
        state_distribution(GridWorld("SG").mdp, np.tile([1.0, 0, 0, 0], (2, 1)))


@pytest.mark.parametrize("seed", range(5))
def test_the_fixed_point_solves_the_projected_bellman_equation_within_the_bound(seed):
    env, policy, features = random_task(seed=seed)
    for discount in (0.5, 0.9, 0.99):
        problem = ProjectedBellman.of_model(env.mdp, features(np.arange(8)), policy, discount)
        chain, rewards = markov_chain(env.mdp, policy)
        values = problem.features @ problem.fixed_point
        backed_up = rewards + discount * (chain @ values)
        root = np.sqrt(problem.distribution)[:, None]
        projected = problem.features @ np.linalg.lstsq(root * problem.features, root[:, 0] * backed_up, rcond=None)[0]
        np.testing.assert_allclose(projected, values, atol=1e-9)
        assert problem.projected_bellman_error(problem.fixed_point) == pytest.approx(0, abs=1e-16)
        elsewhere = problem.fixed_point + 1.0
        shift = problem.features @ elsewhere
        gap = rewards + discount * (chain @ shift)
        gap = problem.features @ np.linalg.lstsq(root * problem.features, root[:, 0] * gap, rcond=None)[0] - shift
        assert problem.projected_bellman_error(elsewhere) == pytest.approx(problem.distribution @ gap**2)
        # R. Sutton and A. Barto, 2nd ed., eq. 9.14, and the sharper bound of Tsitsiklis and Van Roy, lemma 6.
        smallest = problem.value_error(problem.best_weights)
        assert (
            smallest
            <= problem.value_error(problem.fixed_point)
            <= smallest / (1 - discount**2)
            <= smallest / (1 - discount)
        )
        # And it is the smallest.
        for direction in np.eye(3):
            assert problem.value_error(problem.best_weights + 1e-3 * direction) > smallest
            assert problem.value_error(problem.best_weights - 1e-3 * direction) > smallest


def test_with_a_feature_for_every_state_the_fixed_point_is_exact():
    env = GridWorld("S.F\n.#.\n..G", slip=0.2)
    policy = np.full((8, 4), 0.25)
    problem = ProjectedBellman.of_model(env.mdp, np.eye(8), policy, 1.0)
    np.testing.assert_allclose(problem.fixed_point, env.mdp.evaluate(policy, 1.0), atol=1e-10)
    assert problem.value_error(problem.fixed_point) < 1e-20


# On one-hot features, linear methods are the tabular ones.


def test_semi_gradient_td_on_one_hot_features_is_tabular_td_bit_for_bit():
    env, policy = GridWorld("S.F\n.#.\n..G", slip=0.2), np.full((8, 4), 0.25)
    tabular = TD0(env, policy, 0.9, 0.1, seed=2).learn(100, progress=False)
    linear = SemiGradientTD(env, policy, OneHot(8), 0.9, 0.1, seed=2).learn(100, progress=False)
    np.testing.assert_array_equal(linear.values, tabular.values)
    np.testing.assert_array_equal(linear.weights, tabular.values)
    assert linear.steps == tabular.visits.sum()
    with_traces = SemiGradientTD(env, policy, OneHot(8), 0.9, 0.1, trace_decay=0.8, seed=2).learn(100, progress=False)
    table = TDLambda(env, policy, 0.9, 0.1, trace_decay=0.8, seed=2).learn(100, progress=False)
    np.testing.assert_allclose(with_traces.values, table.values, rtol=1e-10)


def test_true_online_td_is_the_online_lambda_return_algorithm():
    # R. Sutton and A. Barto, 2nd ed., section 12.4: after step h, start again from the first weights, with the targets
    # G^λ_{t:h} = (1 − λ) Σ_n λ^(n−1) G_{t:t+n} + λ^(h−t−1) G_{t:h}, each bootstrapping with the weights of its time.
    env, policy, features = random_task(states=5, features=3)
    discount, trace_decay, step_size, start = 0.9, 0.7, 0.1, np.array([0.3, -0.2, 0.5])
    agent = TrueOnlineTD(env, policy, features, discount, step_size, trace_decay=trace_decay, max_episode_steps=12)
    agent.weights[:] = start
    episode = agent.play(np.random.default_rng([0, 0]))
    agent.learn(1, progress=False)
    rows = features(episode.states)
    # former[t] holds the weights after t steps, which are those that value s_t when it is bootstrapped from.
    former = [start]
    for horizon in range(1, 13):
        weights = start.copy()
        for t in range(horizon):
            result = [
                sum(discount**k * episode.rewards[t + k] for k in range(n))
                + discount**n * rows[t + n] @ former[t + n - 1]
                for n in range(1, horizon - t + 1)
            ]
            share = (1 - trace_decay) * trace_decay ** np.arange(horizon - t)
            share[-1] = trace_decay ** (horizon - t - 1)
            weights += step_size * (share @ result - weights @ rows[t]) * rows[t]
        former.append(weights)
    np.testing.assert_allclose(agent.weights, former[-1], rtol=1e-10)
    assert np.abs(former[-1] - start).max() > 0.1


# Convergence.


@pytest.mark.parametrize(
    ("algorithm", "options", "bound"),
    [
        (SemiGradientTD, {"step_size": Power(0.3, 1.0, 500)}, 0.3),
        (TDC, {"step_size": Power(0.5, 1.0, 500), "auxiliary_step_size": Power(0.3, 0.6, 500)}, 0.3),
        (GTD2, {"step_size": Power(1.0, 1.0, 1000), "auxiliary_step_size": Power(0.3, 0.6, 500)}, 0.45),
        (LSTD, {}, 0.1),
    ],
)
@pytest.mark.parametrize("off_policy", [True, False])
def test_linear_methods_reach_the_td_fixed_point(algorithm, options, bound, off_policy):
    env, policy, _ = random_task()
    features = Aggregation([0, 0, 0, 1, 1, 1, 2, 2])
    behaviour = 0.7 * policy + 0.15 if off_policy else None
    acts = policy if behaviour is None else behaviour
    visited = state_distribution(env.mdp, acts, steps=4000)
    problem = ProjectedBellman.of_model(env.mdp, features(np.arange(8)), policy, 0.7, visited)
    options = {**options, "behaviour": behaviour, "max_episode_steps": 4000}

    def distances(episodes):
        agents = [algorithm(env, policy, features, 0.7, seed=seed, **options) for seed in range(6)]
        gaps = [agent.learn(episodes, progress=False).weights - problem.fixed_point for agent in agents]
        return np.sqrt([problem.distribution @ (problem.features @ gap) ** 2 for gap in gaps])

    # In this norm the fixed point is 2.3 from 0, and 1.6 from the true values.
    assert np.sqrt(problem.value_error(problem.fixed_point)) > 1.5
    assert upper_limit(distances(10)) < bound


def test_lstd_approaches_the_fixed_point_like_one_over_the_root_of_the_steps():
    env, policy, features = random_task()
    problem = ProjectedBellman.of_model(env.mdp, features(np.arange(8)), policy, 0.9)

    def error(episodes):
        agents = [LSTD(env, policy, features, 0.9, seed=seed, max_episode_steps=1000) for seed in range(15)]
        gaps = [agent.learn(episodes, progress=False).weights - problem.fixed_point for agent in agents]
        return np.sqrt(np.mean(np.square(gaps)))

    assert 2.5 < error(2) / error(32) < 6


def test_lstd_of_example_6_4_is_certainty_equivalence_and_the_mean_return():
    # R. Sutton and A. Barto, 2nd ed., example 6.4: A,0,B,0; six times B,1; B,0.
    env, policy = GridWorld("S.G"), np.full((3, 4), 0.25)

    def solved(**options):
        agent = LSTD(env, policy, OneHot(3), 1.0, **options)
        actions = np.zeros(2, int)
        agent.update(Episode(np.array([0, 1, 2]), actions, np.zeros(2), True))
        for reward in (1.0,) * 6 + (0.0,):
            agent.update(Episode(np.array([1, 2]), actions[:1], np.array([reward]), True))
        return agent.values

    np.testing.assert_allclose(solved(), [0.75, 0.75, 0], atol=1e-12)
    np.testing.assert_allclose(solved(trace_decay=1.0), [0, 0.75, 0], atol=1e-12)
    # Eight visits of B and one of A, with a ridge of 1: V(B) = 6 / 9, V(A) = V(B) / 2.
    np.testing.assert_allclose(solved(ridge=1.0), [1 / 3, 2 / 3, 0], atol=1e-12)


def test_traces_by_hand():
    # z_0 = 2 · 1, z_1 = 3 · (2 / 2 + 10), z_2 = 5 · (33 / 2 + 100).
    traces = eligibility_traces(np.array([[1.0], [10.0], [100.0]]), np.array([2.0, 3.0, 5.0]), 0.5)
    np.testing.assert_allclose(traces[:, 0], [2, 33, 582.5])


def test_off_policy_lstd_weighs_with_importance_ratios():
    env, policy, _ = random_task(states=4)
    behaviour = np.full((4, 2), 0.5)
    agent = LSTD(env, policy, OneHot(4), 0.8, behaviour=behaviour, max_episode_steps=100_000)
    agent.learn(2, progress=False)
    exact = env.mdp.evaluate(policy, 0.8)
    assert np.abs(agent.values - exact).max() < 0.05
    assert np.abs(env.mdp.evaluate(behaviour, 0.8) - exact).max() > 0.3


def test_a_thousand_states_in_ten_groups():
    # R. Sutton and A. Barto, 2nd ed., figures 9.1 and 9.2 (left).
    env, features, policy = thousand_states()
    problem = ProjectedBellman.of_model(env.mdp, features(np.arange(1002)), policy, 1.0)
    fixed_point = problem.fixed_point
    assert (np.diff(fixed_point) > 0).all()
    # Started in the middle of 1 … 1000, between 500 and 501, everything is symmetric.
    middle = TabularMDP(env.mdp.outcomes, np.isin(np.arange(1002), (500, 501)) / 2, env.mdp.terminal, 1)
    symmetric = ProjectedBellman.of_model(middle, features(np.arange(1002)), policy, 1.0).fixed_point
    np.testing.assert_allclose(symmetric, -symmetric[::-1], atol=1e-10)
    # State 500 is visited most: the peak of figure 9.1 is 0.0137 there.
    assert problem.distribution.argmax() == 500
    assert problem.distribution[500] == pytest.approx(0.0137, abs=2e-4)
    # TD is flatter than the best approximation, figure 9.2: the outer groups are not low enough.
    assert problem.best_weights[0] < fixed_point[0] < -0.6
    learner = LSTD(env, policy, features, 1.0).learn(500, progress=False)
    assert np.abs(learner.weights - fixed_point).max() < 0.15
    agents = [SemiGradientTD(env, policy, features, 1.0, Power(0.5, 0.6, 500), seed=seed) for seed in range(4)]
    distances = [np.abs(agent.learn(500, progress=False).weights - fixed_point).max() for agent in agents]
    # The weights of the ends are 0.7 from 0.
    assert upper_limit(distances) < 0.25


def test_the_grid_of_zhao_chapter_8():
    # S. Zhao, figure 8.6 (b), the true values of the uniform policy; figures 8.7 and 8.8: more features, smaller error.
    env, policy, coordinates = zhao()
    published = [
        [-3.8, -3.8, -3.6, -3.1, -3.2],
        [-3.8, -3.8, -3.8, -3.1, -2.9],
        [-3.6, -3.9, -3.4, -3.2, -2.9],
        [-3.9, -3.6, -3.4, -2.9, -3.2],
        [-4.5, -4.2, -3.4, -3.4, -3.5],
    ]
    exact = env.mdp.evaluate(policy, 0.9)
    np.testing.assert_array_equal(exact.reshape(5, 5).round(1), published)
    visited = state_distribution(env.mdp, policy, steps=500)

    def errors(features, step_size=0.002):
        problem = ProjectedBellman.of_model(env.mdp, features(np.arange(25)), policy, 0.9, visited)
        agent = SemiGradientTD(env, policy, features, 0.9, step_size, seed=1, max_episode_steps=500)
        agent.learn(300, progress=False)
        limit = problem.features @ problem.fixed_point
        return np.sqrt(np.mean((limit - exact) ** 2)), np.sqrt(np.mean((agent.values - limit) ** 2)), agent.rms_error()

    limit, gap, reached = errors(OneHot(25), step_size=0.02)
    assert limit < 1e-10
    assert reached == pytest.approx(gap)
    assert gap < 0.15
    for family in (Polynomial, Fourier):
        limits = []
        for order in (1, 2, 3):
            limit, gap, reached = errors(family(coordinates, order))
            assert gap < 0.1
            assert abs(reached - limit) <= gap + 1e-12
            limits.append(limit)
        assert 0.25 > limits[0] > limits[1] > limits[2] > 0.05


# Baird's counterexample.


def test_expected_semi_gradient_updates_diverge_on_bairds_counterexample():
    # R. Sutton and A. Barto, 2nd ed., figure 11.2 (right): the weights of dynamic programming with α = 0.01.
    env, features, target, _, weights = baird()
    problem = ProjectedBellman.of_model(env.mdp, features, target, 0.99, np.full(7, 1 / 7))
    assert np.linalg.eigvals(-problem.matrix).real.max() == pytest.approx(0.2392504642024577, abs=1e-9)
    published = {
        1: (1.0253714285714286, 9.999828571428571, 1.0757714285714286),
        10: (1.2567349726552988, 9.998187733785107, 1.766580385536114),
        100: (3.894885705914764, 9.971198567465292, 9.627054252674881),
        1000: (114.4337161426462, 6.8500303422288535, 335.0012091123967),
    }
    for sweep in range(1, 1001):
        weights = weights + 0.01 * (problem.vector - problem.matrix @ weights)
        if sweep in published:
            np.testing.assert_allclose(weights[[0, 6, 7]], published[sweep], rtol=1e-9)
            np.testing.assert_allclose(weights[:6], weights[0], rtol=1e-12)


@pytest.mark.parametrize("algorithm", [TDC, GTD2])
def test_expected_gradient_updates_converge_on_bairds_counterexample(algorithm):
    env, features, target, _, first = baird()
    problem = ProjectedBellman.of_model(env.mdp, features, target, 0.99, np.full(7, 1 / 7))
    matrix, covariance = problem.matrix, problem.covariance
    step_size, auxiliary = 0.005, 0.05
    # With r = 0, one expected update is linear in (w, u): E[ρ δ x] = −A w, E[ρ (x − γx') xᵀ] = Aᵀ.
    upper = [-matrix, matrix.T - covariance] if algorithm is TDC else [np.zeros((8, 8)), matrix.T]
    change = np.block([[step_size * block for block in upper], [-auxiliary * matrix, -auxiliary * covariance]])
    update = np.eye(16) + change
    # Nothing grows, and what stays belongs to weights without effect on values: 8 weights for 7 states.
    assert np.abs(np.linalg.eigvals(update)).max() < 1 + 1e-9
    both = np.append(first, np.zeros(8))
    after_1000 = np.linalg.matrix_power(update, 1000) @ both
    if algorithm is TDC:
        # R. Sutton and A. Barto, 2nd ed., figure 11.5 (right): √PBE falls to 0, and √VE stays near 2 for long.
        assert np.sqrt(problem.projected_bellman_error(after_1000[:8])) < 0.2
        assert np.sqrt(problem.value_error(after_1000[:8])) == pytest.approx(2, abs=0.3)
    eventually = np.linalg.matrix_power(update, 10**8) @ both
    assert problem.value_error(eventually[:8]) < 1e-6 * problem.value_error(first)
    assert problem.projected_bellman_error(eventually[:8]) < 1e-12
    assert np.linalg.norm(eventually) < np.linalg.norm(both)


@pytest.mark.parametrize(("algorithm", "auxiliary"), [(TDC, 0.05), (GTD2, 0.05)])
def test_sampled_gradient_updates_have_the_expected_mean(algorithm, auxiliary):
    # One update of every (s, a, s') of Baird's model, weighed by its probability, is the expected update.
    env, features, target, behaviour, first = baird()
    problem = ProjectedBellman.of_model(env.mdp, features, target, 0.99, np.full(7, 1 / 7))
    slow = np.random.default_rng(0).normal(size=8)
    mean = np.zeros(16)
    for state in range(7):
        for action, followers in ((0, range(6)), (1, [6])):
            for follower in followers:
                agent = algorithm(
                    env,
                    target,
                    FeatureTable(features),
                    0.99,
                    0.005,
                    auxiliary,
                    behaviour=behaviour,
                    max_episode_steps=1,
                )
                agent.weights[:], agent.auxiliary_weights[:] = first, slow
                agent.update(Episode(np.array([state, follower]), np.array([action]), np.zeros(1), False))
                weight = behaviour[state, action] / 7 / len(followers)
                mean += weight * np.append(agent.weights - first, agent.auxiliary_weights - slow)
    matrix, covariance = problem.matrix, problem.covariance
    expected = matrix.T @ slow if algorithm is GTD2 else -matrix @ first - (covariance - matrix).T @ slow
    np.testing.assert_allclose(mean[:8], 0.005 * expected, atol=1e-12)
    np.testing.assert_allclose(mean[8:], auxiliary * (-matrix @ first - covariance @ slow), atol=1e-12)


def test_samples_of_bairds_counterexample_diverge_loudly_or_converge():
    env, features, target, behaviour, first = baird()
    problem = ProjectedBellman.of_model(env.mdp, features, target, 0.99, np.full(7, 1 / 7))

    def learner(algorithm, *step_sizes, seed=0):
        agent = algorithm(
            env,
            target,
            FeatureTable(features),
            0.99,
            *step_sizes,
            behaviour=behaviour,
            seed=seed,
            max_episode_steps=1000,
        )
        agent.weights[:] = first
        return agent

    for seed in range(3):
        agent = learner(SemiGradientTD, 0.01, seed=seed).learn(2, progress=False)
        assert np.abs(agent.weights).max() > 100
    with pytest.raises(FloatingPointError, match=r"no longer finite.*smaller than .*0.01.* TDC and GTD2 do not"):
        learner(SemiGradientTD, 0.01).learn(1000, progress=False)
    for seed in range(3):
        # R. Sutton and A. Barto, 2nd ed., figure 11.5 (left).
        agent = learner(TDC, 0.005, 0.05, seed=seed).learn(10, progress=False)
        assert np.sqrt(problem.projected_bellman_error(agent.weights)) < 0.2
        assert np.abs(agent.weights).max() < 10
    # On-policy the same features are harmless; 12 is the value that the seventh state begins with.
    agent = SemiGradientTD(env, target, FeatureTable(features), 0.99, 0.01, max_episode_steps=1000)
    agent.weights[:] = first
    assert abs(agent.learn(30, progress=False).values[6]) < 0.1


def test_too_large_a_step_size_is_reported_as_such():
    env, policy, features = random_task()
    with pytest.raises(FloatingPointError, match=r"SemiGradientTD, episode 0: .* step_size smaller than .*5") as caught:
        SemiGradientTD(env, policy, features, 0.9, 5.0, max_episode_steps=2000).learn(1, progress=False)
    assert "TDC" not in str(caught.value)


# The rest.


def test_compiled_sweeps_are_the_python_ones():
    generator = np.random.default_rng(1)
    rows, start = generator.normal(size=(31, 5)), generator.normal(size=5)
    rewards, discounts = generator.normal(size=30), np.full(30, 0.9)
    ratios, small = generator.random(30) * 2, generator.random(30) / 20

    def both(function, *rest, copies=1):
        results = []
        for run in (function, interpreted(function)):
            weights = [start.copy() for _ in range(copies)]
            run(*weights, rows, rewards, discounts, *rest)
            results.append(weights)
        np.testing.assert_array_equal(*results)
        assert all((one != start).all() for one in results[0])

    both(sweep_semi_gradient, ratios, small, 0.6)
    both(sweep_true_online, small, 0.6)
    both(sweep_gtd2, ratios, small, small, copies=2)
    both(sweep_tdc, ratios, small, small, copies=2)
    np.testing.assert_array_equal(
        eligibility_traces(rows[:-1], ratios, 0.5), interpreted(eligibility_traces)(rows[:-1], ratios, 0.5)
    )


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (SemiGradientTD, {"step_size": Power(0.1, 0.6), "trace_decay": 0.5}),
        (TrueOnlineTD, {"step_size": 0.05}),
        (LSTD, {"trace_decay": 0.5}),
        (GTD2, {"step_size": Power(0.1, 0.6), "auxiliary_step_size": Power(0.1, 0.6)}),
        (TDC, {"step_size": 0.02, "auxiliary_step_size": 0.05}),
    ],
)
def test_a_saved_learner_continues_bit_for_bit(tmp_path, algorithm, options):
    env, policy, features = random_task()

    def make():
        return algorithm(env, policy, features, 0.9, seed=7, max_episode_steps=50, **options)

    through, halfway = make().learn(9, progress=False), make().learn(4, progress=False)
    halfway.save(tmp_path / "weights.safetensors")
    resumed = make().load(tmp_path / "weights.safetensors").learn(5, progress=False)
    np.testing.assert_array_equal(resumed.weights, through.weights)
    np.testing.assert_array_equal(resumed.values, through.values)
    assert np.abs(through.weights).min() > 0
    with pytest.raises(ValueError, match=r"shape \(3,\), and these \(8,\)"):
        algorithm(env, policy, OneHot(8), 0.9, max_episode_steps=50, **options).load(tmp_path / "weights.safetensors")


def test_values_of_terminal_states_are_zero():
    env, policy = GridWorld("S.G"), np.full((3, 4), 0.25)
    agent = SemiGradientTD(env, policy, FeatureTable(np.ones((3, 1))), 0.9, 0.1)
    agent.weights[:] = 5
    np.testing.assert_array_equal(agent.values, [5, 5, 0])


def test_bad_arguments_are_refused():
    env, policy, features = random_task()
    options = {"max_episode_steps": 10}
    with pytest.raises(ValueError, match="state 0: the policy takes action 0 and the behaviour never does"):
        LSTD(env, policy, features, 0.9, behaviour=np.tile([0.0, 1.0], (8, 1)), **options)
    with pytest.raises(ValueError, match=r"behaviour has shape \(2, 2\)"):
        LSTD(env, policy, features, 0.9, behaviour=np.eye(2), **options)
    for algorithm, more in ((LSTD, {}), (SemiGradientTD, {"step_size": 0.1})):
        with pytest.raises(ValueError, match="between 0 and 1, not -1"):
            algorithm(env, policy, features, 0.9, trace_decay=-1, **more, **options)
    with pytest.raises(ValueError, match="ridge is at least 0, not -1"):
        LSTD(env, policy, features, 0.9, ridge=-1, **options)
    with pytest.raises(ValueError, match="on-policy only"):
        TrueOnlineTD(env, policy, features, 0.9, 0.1, behaviour=policy, **options)
    with pytest.raises(ValueError, match="features of state 1 are not finite"):
        LSTD(env, policy, FeatureTable([[1.0], [np.nan], *[[1.0]] * 6]), 0.9, **options)
    with pytest.raises(ValueError, match="state numbers 0 … 4"):
        LSTD(env, policy, OneHot(5), 0.9, **options)
    with pytest.raises(TypeError, match="discrete observations"):
        LSTD(gymnasium.make("MountainCar-v0"), policy, features, 0.9)

    class Wrong(Features):
        size = 3

        def __call__(self, observations):
            return np.zeros((len(observations), 2))

    with pytest.raises(ValueError, match=r"shape \(8, 2\), and a feature map of size 3"):
        LSTD(env, policy, Wrong(), 0.9, **options)
    with pytest.raises(ValueError, match=r"shape \(3, 1\), and the model 8 states"):
        ProjectedBellman.of_model(env.mdp, np.ones((3, 1)), policy, 0.9)
    with pytest.raises(ValueError, match="distribution is a probability of each of 8 states"):
        ProjectedBellman.of_model(env.mdp, np.ones((8, 1)), policy, 0.9, np.zeros(8))
