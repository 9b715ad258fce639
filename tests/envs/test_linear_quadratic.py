import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

from aligngym.envs.linear_quadratic import LinearQuadratic

GOLDEN_RATIO = (1 + 5**0.5) / 2


def random_problem(seed=0, size=3, actions=2, **options):
    generator = np.random.default_rng(seed)
    dynamics, control = generator.normal(size=(size, size)), generator.normal(size=(size, actions))
    dynamics *= 1.1 / np.abs(np.linalg.eigvals(dynamics)).max()
    q, r = generator.normal(size=(size, size)), generator.normal(size=(actions, actions))
    options = {"noise": [0.1, 0.2, 0.3], "start": [0.5, 1.0, 1.5]} | options
    return LinearQuadratic(dynamics, control, q @ q.T, r @ r.T + 0.1 * np.eye(actions), **options)


PROBLEMS = {"default": LinearQuadratic, "random": random_problem}


def difference(function, point, width=1e-5):
    """Central finite differences of a function of a matrix."""
    gradient = np.zeros_like(point)
    for index in np.ndindex(*point.shape):
        step = np.zeros_like(point)
        step[index] = width
        gradient[index] = (function(point + step) - function(point - step)) / (2 * width)
    return gradient


def test_the_scalar_problem_is_solved_by_the_golden_ratio():
    # A = B = Q = R = γ = 1: P = 1 + P − P²/(1 + P), so P² = P + 1, and K = P/(1 + P) = 1/P.
    env = LinearQuadratic([[1]], [[1]], [[1]], [[1]], noise=0, start=1)
    gain = env.optimal_gain(1)
    np.testing.assert_allclose(gain, [[1 / GOLDEN_RATIO]])
    np.testing.assert_allclose(env.cost_matrix(gain, 1), [[GOLDEN_RATIO]])
    assert env.value([2.0], gain, 1) == pytest.approx(-4 * GOLDEN_RATIO)
    # Of a uniform start in [−1, 1], x² is 1/3 in the mean.
    assert env.expected_return(gain, 1) == pytest.approx(-GOLDEN_RATIO / 3)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_riccati_equation_agrees_with_value_iteration_on_matrices(name, discount):
    env = PROBLEMS[name]()
    a, b, cost = env.dynamics, env.control, np.zeros_like(env.dynamics)
    for _ in range(5000):
        # The cost of (x, u) is a quadratic form in both, whose minimum over u is a Schur complement.
        xx, xu = env.state_cost + discount * a.T @ cost @ a, discount * a.T @ cost @ b
        uu = env.action_cost + discount * b.T @ cost @ b
        gain = np.linalg.solve(uu, xu.T)
        cost = xx - xu @ gain
    np.testing.assert_allclose(env.optimal_gain(discount), gain, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(env.cost_matrix(gain, discount), cost, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_values_satisfy_the_bellman_equation(name):
    env, discount = PROBLEMS[name](), 0.9
    size, actions = env.control.shape
    gain = 0.9 * env.optimal_gain(discount)
    covariance = 0.02 * np.eye(actions) + 0.01
    # 2d points with the mean and the covariance of a normal distribution give the mean of any quadratic function.
    width = np.concatenate([env.noise, np.zeros(actions)])
    root = np.zeros((size + actions, size + actions))
    root[:size, :size], root[size:, size:] = np.diag(env.noise), np.linalg.cholesky(covariance)
    points = np.concatenate([root.T, -root.T]) * len(width) ** 0.5
    for state in np.random.default_rng(0).normal(size=(5, size)):
        taken = -gain @ state + points[:, size:]
        rewards = -(state @ env.state_cost @ state + np.einsum("ki,ij,kj->k", taken, env.action_cost, taken))
        following = env.dynamics @ state + taken @ env.control.T + points[:, :size]
        expected = np.mean(rewards + discount * env.value(following, gain, discount, covariance))
        assert env.value(state, gain, discount, covariance) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_simulated_returns_have_the_exact_mean(name):
    env, discount, steps, episodes = PROBLEMS[name](), 0.8, 30, 1500
    generator = np.random.default_rng(1)
    gain = 0.8 * env.optimal_gain(discount)
    covariance = 0.05 * np.eye(len(gain)) + 0.03
    root = np.linalg.cholesky(covariance)
    returns, undiscounted = np.zeros(episodes), np.zeros(episodes)
    for episode in range(episodes):
        # Observations are rounded to float32, so the policy is linear in them but for some 1e-8.
        state, _ = env.reset(seed=0 if episode == 0 else None)
        for step in range(steps):
            state, reward, *_ = env.step(-gain @ state + root @ generator.standard_normal(len(gain)))
            returns[episode] += discount**step * reward
            undiscounted[episode] += reward
    for measured, factor in [(returns, discount), (undiscounted, 1.0)]:
        exact = env.expected_return(gain, factor, covariance, steps=steps)
        error = measured.std() / episodes**0.5
        assert error < 0.05 * abs(exact)
        assert abs(measured.mean() - exact) < 3 * error


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_return_of_many_steps_is_that_of_all(name):
    env, discount = PROBLEMS[name](), 0.9
    gain = 0.9 * env.optimal_gain(discount)
    for covariance in (None, 0.3 * np.eye(len(gain))):
        exact = env.expected_return(gain, discount, covariance)
        assert env.expected_return(gain, discount, covariance, steps=2000) == pytest.approx(exact, rel=1e-10)
        # The mean of the value over the corners of a box with the covariance of the start.
        corners = np.stack(np.meshgrid(*[[-s, s] for s in env.start / 3**0.5]), axis=-1).reshape(-1, len(env.start))
        assert env.value(corners, gain, discount, covariance).mean() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_that_of_the_return_and_vanishes_at_the_optimum(name):
    env, discount = PROBLEMS[name](), 0.95
    best = env.optimal_gain(discount)
    covariance = 0.02 * np.eye(len(best)) + 0.01
    for factor in (0.8, 1.0, 1.05):
        for noise in (None, covariance):
            numeric = difference(lambda k, noise=noise: env.expected_return(k, discount, noise), factor * best)
            exact = env.return_gradient(factor * best, discount, noise)
            np.testing.assert_allclose(exact, numeric, rtol=1e-6, atol=1e-7)
    scale = np.abs(env.return_gradient(0.8 * best, discount)).max()
    assert np.abs(env.return_gradient(best, discount)).max() < 1e-10 * scale
    generator = np.random.default_rng(2)
    for _ in range(20):
        other = best + 0.02 * generator.normal(size=best.shape)
        assert env.expected_return(other, discount) < env.expected_return(best, discount)


def test_the_best_forces_of_the_default_problem_stay_within_its_bounds():
    env = LinearQuadratic()
    gain, largest = env.optimal_gain(0.99), 0.0
    for episode in range(50):
        state, _ = env.reset(seed=episode)
        for _ in range(100):
            largest = max(largest, float(np.abs(gain @ state).max()))
            state, *_ = env.step(-gain @ state)
    assert 0.3 < largest < 0.5 * env.action_space.high[0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_gymnasiums_checker_has_nothing_to_say(name):
    spec = EnvSpec("LinearQuadratic-v0", entry_point=PROBLEMS[name], max_episode_steps=200)
    env = gymnasium.make(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    env.reset(seed=0)
    flags = [env.step(np.zeros(env.action_space.shape, np.float32))[2:4] for _ in range(200)]
    assert flags == [(False, False)] * 199 + [(False, True)]


def test_seeds_repeat_episodes_and_steps_follow_the_equations():
    env, other = random_problem(), random_problem()
    actions = np.random.default_rng(3).normal(size=(20, 2))
    histories = []
    for one in (env, other):
        first, info = one.reset(seed=7)
        histories.append([first.tolist(), *[(x.tolist(), r) for x, r, *_ in map(one.step, actions)]])
        assert info == {}
    assert histories[0] == histories[1]
    assert env.reset(seed=8)[0].tolist() != histories[0][0]
    quiet, state = random_problem(noise=0.0), np.array([0.25, -0.5, 1.0])
    observation, _ = quiet.reset(options={"state": state})
    np.testing.assert_array_equal(observation, state)
    # Far outside the action space: nothing is clipped.
    action = np.array([30.0, -20.0])
    observation, reward, terminated, truncated, _ = quiet.step(action)
    np.testing.assert_allclose(observation, quiet.dynamics @ state + quiet.control @ action, rtol=1e-6)
    assert reward == pytest.approx(-(state @ quiet.state_cost @ state) - action @ quiet.action_cost @ action)
    assert not terminated
    assert not truncated
    starts = np.array([env.reset(seed=seed)[0] for seed in range(300)])
    assert (np.abs(starts) <= env.start).all()
    assert (np.abs(starts).max(axis=0) > 0.95 * env.start).all()


def test_bad_problems_are_refused():
    eye = np.eye(2)
    for arguments, options, message in [
        ((eye, [[1.0]], eye, [[1.0]]), {}, r"dynamics has shape \(2, 2\); with this control it must be \(1, 1\)"),
        ((eye, [1.0, 2.0], eye, [[1.0]]), {}, "control is a matrix of finite numbers"),
        ((np.nan * eye, eye, eye, eye), {}, "dynamics is a matrix of finite numbers"),
        ((eye, eye, [[1.0, 1.0], [0.0, 1.0]], eye), {}, "state_cost is a symmetric 2 × 2 matrix"),
        ((eye, eye, np.diag([1.0, -0.5]), eye), {}, "state_cost is positive semi-definite, .* -0.5"),
        ((eye, eye, eye, np.diag([1.0, 0.0])), {}, "action_cost is positive definite"),
        ((eye, eye, eye, eye), {"noise": -1.0}, "noise is one number from 0"),
        ((eye, eye, eye, eye), {"start": [1.0, 2.0, 3.0]}, "start is one number from 0, or one for each of 2"),
        ((eye, eye, eye, eye), {"action_bound": 0.0}, "action_bound is positive and finite, not 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LinearQuadratic(*arguments, **options)


def test_bad_actions_states_and_gains_are_refused():
    env = LinearQuadratic()
    with pytest.raises(ValueError, match=r"options: state is 2 finite numbers"):
        env.reset(options={"state": [1.0]})
    env.reset(seed=0)
    for action in ([0.0, 1.0], 0.0, [np.nan]):
        with pytest.raises(ValueError, match="action is 1 finite numbers"):
            env.step(action)
    with pytest.raises(OverflowError, match="makes the system unstable"):
        env.step([1e40])
    gain = env.optimal_gain(0.9)
    for call, message in [
        (lambda: env.optimal_gain(1.1), "between 0 and 1, not 1.1"),
        (lambda: env.value([0.0, 0.0], gain, -0.1), "between 0 and 1, not -0.1"),
        (lambda: env.value([0.0, 0.0], gain, 1.0), "noise costs something in every step"),
        (lambda: env.expected_return(gain.T, 0.9), r"gain has shape \(2, 1\)"),
        (lambda: env.expected_return(-gain, 0.9), "lets costs grow for ever: .* size 1.517"),
        (lambda: env.expected_return(gain, 0.9, [[-1.0]]), "action_covariance is positive semi-definite"),
        (lambda: env.expected_return(gain, 0.9, steps=0), "at least 1, not 0"),
        (lambda: env.return_gradient(gain, 1.0), "below 1, not 1.0"),
        (lambda: LinearQuadratic([[2]], [[0]], [[1]], [[1]]).optimal_gain(0.9), "no policy is known to be best"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    # A return over some steps is finite for a gain that is not.
    assert env.expected_return(-gain, 0.9, steps=50) < env.expected_return(gain, 0.9)
