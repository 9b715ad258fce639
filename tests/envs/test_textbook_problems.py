import numpy as np
import pytest
from scipy.stats import norm, poisson

from aligngym.agents import PolicyIteration
from aligngym.envs.bairds_counterexample import BairdsCounterexample
from aligngym.envs.gamblers_problem import GamblersProblem
from aligngym.envs.jacks_car_rental import JacksCarRental
from aligngym.envs.random_walk import RandomWalk
from aligngym.envs.short_corridor import AliasedStates, ShortCorridor
from aligngym.envs.tabular_mdp import TabularMDP


def only_action(mdp):
    return np.ones((mdp.num_states, 1))


# Random walks


def test_the_walk_of_example_6_2():
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., example 6.2: 1/6 … 5/6 from A to E, from C in the middle.
    mdp = RandomWalk().mdp
    np.testing.assert_allclose(
        mdp.evaluate(only_action(mdp), 1.0), [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 0], atol=1e-12
    )
    assert mdp.initial[3] == 1


def test_the_walk_of_19_states():
    # Example 7.1: −1 to the left, 0.1 a state.
    mdp = RandomWalk(19, left_reward=-1.0).mdp
    np.testing.assert_allclose(mdp.evaluate(only_action(mdp), 1.0)[1:20], np.arange(-9, 10) / 10, atol=1e-12)
    assert mdp.initial[10] == 1


def test_the_walk_of_1000_states():
    # Example 9.1. V is the only solution of its equations, which are written out here state by state.
    mdp = RandomWalk(1000, reach=100, left_reward=-1.0).mdp
    matrix, rewards = np.eye(1000), np.zeros(1000)
    for state in range(1, 1001):
        for jump in range(1, 101):
            for next_state in (state - jump, state + jump):
                if 1 <= next_state <= 1000:
                    matrix[state - 1, next_state - 1] -= 1 / 200
                else:
                    rewards[state - 1] += (1 if next_state > 1000 else -1) / 200
    values = mdp.evaluate(only_action(mdp), 1.0)
    np.testing.assert_allclose(values[1:1001], np.linalg.solve(matrix, rewards), atol=1e-10)
    np.testing.assert_allclose(values, -values[::-1], atol=1e-10)
    # All the mass beyond the left end goes there: 100 of the 200 jumps from state 1, 50 of those from state 51.
    assert mdp.transitions[1, 0] == pytest.approx(0.5)
    assert mdp.transitions[51, 0] == pytest.approx(0.25)
    assert mdp.transitions[500, 400] == pytest.approx(1 / 200)
    assert mdp.transitions[500, 500] == 0
    assert mdp.initial[500] == 1


def test_a_walk_without_room_is_refused():
    for arguments in ({"num_states": 0}, {"reach": 0}):
        with pytest.raises(ValueError, match="at least one state and a reach of 1"):
            RandomWalk(**arguments)
    with pytest.raises(ValueError, match="not finite"):
        RandomWalk(left_reward=np.inf)


# The gambler

#: Optimal values for p_h = 0.4 and a capital of 1 … 99; R. Sutton and A. Barto, Reinforcement Learning, 2nd ed.,
#: example 4.3 and figure 4.3, here to 6 decimals.
GAMBLER = [
    0.002066, 0.005164, 0.009225, 0.012910, 0.017385, 0.023064, 0.027814, 0.032275, 0.037685, 0.043463, 0.050354,
    0.057659, 0.065239, 0.069535, 0.074431, 0.080688, 0.086611, 0.094213, 0.103144, 0.108659, 0.115967, 0.125886,
    0.133580, 0.144148, 0.160000, 0.163098, 0.167746, 0.173838, 0.179365, 0.186078, 0.194596, 0.201721, 0.208413,
    0.216528, 0.225195, 0.235532, 0.246489, 0.257859, 0.264303, 0.271647, 0.281033, 0.289917, 0.301319, 0.314715,
    0.322988, 0.333950, 0.348829, 0.360370, 0.376222, 0.400000, 0.403098, 0.407746, 0.413838, 0.419365, 0.426078,
    0.434596, 0.441721, 0.448413, 0.456528, 0.465195, 0.475532, 0.486489, 0.497859, 0.504303, 0.511647, 0.521033,
    0.529917, 0.541319, 0.554715, 0.562988, 0.573950, 0.588829, 0.600370, 0.616222, 0.640000, 0.644648, 0.651619,
    0.660757, 0.669048, 0.679117, 0.691893, 0.702582, 0.712620, 0.724791, 0.737793, 0.753298, 0.769733, 0.786789,
    0.796454, 0.807470, 0.821549, 0.834875, 0.851979, 0.872073, 0.884482, 0.900925, 0.923244, 0.940555, 0.964333,
]  # fmt: skip


def test_the_gamblers_published_values():
    agent = PolicyIteration(GamblersProblem(), 1.0).learn(progress=False)
    np.testing.assert_allclose(agent.values[1:100], GAMBLER, atol=6e-7)
    np.testing.assert_allclose(agent.values[[25, 50, 75]], [0.16, 0.4, 0.64], atol=1e-12)
    assert agent.values[0] == agent.values[100] == 0
    # Bold play is optimal; at 50 nothing else is.
    assert (agent.policy[np.arange(1, 100), np.minimum(np.arange(1, 100), np.arange(99, 0, -1)) - 1] > 0).all()
    np.testing.assert_array_equal(np.flatnonzero(agent.policy[50]), [49])


@pytest.mark.parametrize("p_heads", [0.25, 0.4, 0.55])
def test_timid_play_is_a_random_walk(p_heads):
    # Staking 1 always is the gambler's ruin: (1 − (q/p)^s) / (1 − (q/p)^goal). W. Feller, An Introduction to
    # Probability Theory, vol. I, section XIV.2. Above 1/2 it is optimal.
    env = GamblersProblem(p_heads, goal=20)
    timid = np.eye(10)[np.zeros(21, dtype=int)]
    ratio = (1 - p_heads) / p_heads
    ruin = (1 - ratio ** np.arange(20)) / (1 - ratio**20)
    np.testing.assert_allclose(env.mdp.evaluate(timid, 1.0)[:20], ruin, atol=1e-10)
    best = PolicyIteration(env, 1.0).learn(progress=False).values[:20]
    assert np.allclose(best, ruin, atol=1e-9) == (p_heads > 0.5)


def test_stakes_that_are_too_large_count_as_the_largest():
    env = GamblersProblem(p_heads=0.3, goal=10)
    transitions = env.mdp.transitions.toarray().reshape(11, 5, 11)
    for stake, used in ((1, 1), (2, 2), (3, 2), (5, 2)):
        np.testing.assert_allclose(transitions[8, stake - 1], 0.3 * np.eye(11)[8 + used] + 0.7 * np.eye(11)[8 - used])
    np.testing.assert_allclose(transitions[1, 4], 0.3 * np.eye(11)[2] + 0.7 * np.eye(11)[0])
    np.testing.assert_allclose(env.mdp.rewards[8], [0, 0.3, 0.3, 0.3, 0.3])
    # No stake stands still, so no policy can go on for ever.
    assert all(transitions[s, :, s].max() == 0 for s in range(1, 10))
    for arguments, message in (({"p_heads": 1.2}, "1.2 is not between"), ({"goal": 1}, "at least 2, not 1")):
        with pytest.raises(ValueError, match=message):
            GamblersProblem(**arguments)


# Jack


@pytest.fixture(scope="module")
def jack():
    return JacksCarRental()


def test_jacks_model_is_the_story_told_event_by_event(jack):
    """Rows of the model against sums over requests and returns, up to numbers beyond which nothing is left."""
    asked, back = np.arange(60)[:, None], np.arange(60)
    for first, second, moved in ((0, 0, 0), (20, 20, 5), (7, 19, 5), (3, 2, -2), (12, 4, 1)):
        distributions, rented = [], 0.0
        for cars, requests, returns in ((first - moved, 3, 3), (second + moved, 4, 2)):
            cars = min(20, cars)
            evening = np.minimum(20, cars - np.minimum(asked, cars) + back)
            probability = poisson.pmf(asked, requests) * poisson.pmf(back, returns)
            distributions.append(np.bincount(evening.ravel(), probability.ravel(), minlength=21))
            rented += (probability * np.minimum(asked, cars)).sum()
        row = (21 * first + second) * 11 + moved + 5
        model = jack.mdp.transitions[[row]].toarray()[0]
        np.testing.assert_allclose(model, np.outer(*distributions).ravel(), atol=1e-13)
        assert jack.mdp.rewards.ravel()[row] == pytest.approx(10 * rented - 2 * abs(moved), abs=1e-10)


def test_cars_that_are_not_there_cannot_be_moved(jack):
    state = 21 * 3 + 2
    assert [int(jack.moved(state, action)) for action in range(11)] == [-2, -2, -2, -2, -1, 0, 1, 2, 3, 3, 3]
    transitions = jack.mdp.transitions.toarray().reshape(441, 11, 441)[state]
    np.testing.assert_array_equal(transitions[0], transitions[3])
    np.testing.assert_array_equal(transitions[10], transitions[8])
    assert jack.mdp.rewards[state, 10] == jack.mdp.rewards[state, 8]


def test_jacks_policy_iteration_takes_four_improvements(jack):
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., figure 4.2: from never moving a car, π₄ is the optimum.
    # It moves up to five cars to the second location and up to four to the first; more, the more cars there are where
    # they come from, and the fewer where they go.
    states = np.arange(441)
    legal = jack.moved(states[:, None], np.arange(11)) == np.arange(11) - 5
    actions, improvements = np.full(441, 5), 0
    while True:
        values = jack.mdp.evaluate(np.eye(11)[actions], 0.9)
        better = np.where(legal, jack.mdp.action_values(values, 0.9), -np.inf)
        replaced = better.max(axis=1) > better[states, actions] + 1e-8
        if not replaced.any():
            break
        actions, improvements = np.where(replaced, better.argmax(axis=1), actions), improvements + 1
    assert improvements == 4
    moved = actions.reshape(21, 21) - 5
    assert (moved.min(), moved.max()) == (-4, 5)
    assert (moved[20, 0], moved[0, 20], moved[20, 20]) == (5, -4, 0)
    assert (np.diff(moved, axis=0) >= 0).all()
    assert (np.diff(moved, axis=1) <= 0).all()
    agent = PolicyIteration(jack, 0.9, tolerance=1e-6).learn(progress=False)
    np.testing.assert_allclose(agent.values, values, atol=1e-6)


def test_jacks_days_go_as_the_model_says():
    """Poisson draws against the exact model, 300 from each state and action.

    Frequencies are tested by χ², mean rewards by their standard errors, over all rows and each: a right model fails
    with a probability of about 10⁻⁴.
    """
    env = JacksCarRental(3, max_moved=1, request_means=(1.0, 2.0), return_means=(1.5, 0.5))
    env.reset(seed=7)
    counts, rewards = np.zeros((48, 16)), np.zeros((48, 300))
    for row in range(48):
        for draw in range(300):
            env.reset(options={"state": row // 3})
            evening, reward, terminated, truncated, info = env.step(row % 3)
            counts[row, evening] += 1
            rewards[row, draw] = reward
            assert reward == 10 * sum(info["rented"]) - 2 * abs(info["moved"])
            assert not terminated
            assert not truncated
    expected = 300 * env.mdp.transitions.toarray()
    assert counts[expected == 0].sum() == 0
    # χ² has a variance of 2 · 15 + Σ 1/E by row, roughly, where expected counts E are small.
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = kept.sum() - 48
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees + (1 / expected[kept]).sum())
    mean, spread = rewards.mean(axis=1), rewards.std(axis=1)
    certain = spread == 0
    np.testing.assert_allclose(mean[certain], env.mdp.rewards.ravel()[certain], atol=1e-12)
    z = ((mean - env.mdp.rewards.ravel())[~certain]) / spread[~certain] * np.sqrt(300)
    assert np.abs(z).max() < norm.isf(1e-5 / len(z))
    assert abs(z.sum()) < 4 * np.sqrt(len(z))


def test_no_requests_and_no_returns_leave_the_cars_alone():
    env = JacksCarRental(4, max_moved=2, request_means=(0.0, 0.0), return_means=(0.0, 0.0))
    stay = env.mdp.transitions.toarray().reshape(25, 5, 25)[:, 2]
    np.testing.assert_array_equal(stay, np.eye(25))
    np.testing.assert_array_equal(env.mdp.rewards[:, 2], 0)
    # Moved cars above the limit leave the problem: (3, 4) becomes (1, 4) for the price of two.
    assert env.mdp.transitions.toarray().reshape(25, 5, 25)[3 * 5 + 4, 4, 1 * 5 + 4] == 1
    assert env.mdp.rewards[3 * 5 + 4, 4] == -4


def test_bad_rentals_are_refused():
    for arguments, message in (
        ({"max_cars": 3}, "max_moved is from 1 to max_cars, and 5 and 3 were given"),
        ({"request_means": (-1.0, 2.0)}, "request_means are two numbers"),
        ({"return_means": (1.0, np.nan)}, "return_means are two numbers"),
        ({"rent": np.inf}, "inf and 2.0 are not both finite"),
    ):
        with pytest.raises(ValueError, match=message):
            JacksCarRental(**arguments)
    env = JacksCarRental(3, max_moved=1)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action 3 is not one of 0 … 2"):
        env.step(3)


# Baird

#: R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., figure 11.2 (right): weights 1 to 6 (all the same), 7 and 8
#: after n synchronous updates with α = 0.01; computed from the figure's definition.
BAIRD = {
    0: (1.0, 10.0, 1.0),
    1: (1.0253714285714286, 9.999828571428571, 1.0757714285714286),
    10: (1.2567349726552988, 9.998187733785107, 1.766580385536114),
    100: (3.894885705914764, 9.971198567465292, 9.627054252674881),
    1000: (114.4337161426462, 6.8500303422288535, 335.0012091123967),
}


def expected_update(env):
    """A = Σ_s d(s) x(s) (γ Σ_s' p_π(s' | s) x(s') − x(s))ᵀ, all of it from the environment and its model."""
    transitions = env.mdp.transitions.toarray().reshape(7, 2, 7)
    under_target = np.einsum("sa,sat->st", env.target, transitions)
    under_behaviour = np.einsum("sa,sat->st", env.behaviour, transitions)
    np.testing.assert_allclose(np.full(7, 1 / 7) @ under_behaviour, 1 / 7)
    x = env.features
    return x.T @ np.diag(np.full(7, 1 / 7)) @ (env.discount * under_target @ x - x)


def test_baird_diverges_as_published():
    env = BairdsCounterexample()
    matrix = expected_update(env)
    assert np.linalg.eigvals(matrix).real.max() == pytest.approx(0.2392504642024577, abs=1e-9)
    weights = env.initial_weights.copy()
    for step in range(1001):
        if step in BAIRD:
            six, seventh, eighth = BAIRD[step]
            np.testing.assert_allclose(weights, [six] * 6 + [seventh, eighth], rtol=1e-9)
        weights = weights + 0.01 * matrix @ weights


def test_bairds_values_are_all_zero_and_it_does_not_end():
    env = BairdsCounterexample()
    assert not env.mdp.terminal.any()
    for policy in (env.behaviour, env.target):
        np.testing.assert_array_equal(env.mdp.evaluate(policy, env.discount), 0)
    np.testing.assert_array_equal(env.features[2], [0, 0, 2, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(env.features[6], [0, 0, 0, 0, 0, 0, 1, 2])
    assert np.linalg.matrix_rank(env.features) == 7
    with pytest.raises(ValueError, match="read-only"):
        env.initial_weights[0] = 5.0


# The short corridor


def test_the_corridors_published_values():
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., example 13.1: ε-greedy with ε = 0.1 gets less than −44
    # (right) and −82 (left); the best p is about 0.59, with about −11.6 (−6 − 4√2).
    mdp = ShortCorridor().mdp

    def value(p):
        return mdp.evaluate(np.tile([1 - p, p], (4, 1)), 1.0)[0]

    for p in (0.05, 0.3, 0.586, 0.95):
        assert value(p) == pytest.approx((2 * p - 4) / (p * (1 - p)))
    assert -45 < value(0.95) < -44
    assert -83 < value(0.05) < -82
    grid = np.linspace(0.5, 0.7, 201)
    best = grid[np.argmax([value(p) for p in grid])]
    assert best == pytest.approx(2 - np.sqrt(2), abs=6e-4)
    assert value(2 - np.sqrt(2)) == pytest.approx(-6 - 4 * np.sqrt(2))
    # Who sees the state needs three steps.
    assert PolicyIteration(mdp, 1.0).learn(progress=False).values[0] == pytest.approx(-3)


def test_aliased_states_look_the_same():
    env = AliasedStates(ShortCorridor(), [0, 0, 0, 0])
    assert env.observation_space.n == 1
    assert env.reset(seed=0)[0] == 0
    assert [env.step(action)[0:3] for action in (1, 0, 1)] == [(0, -1.0, False), (0, -1.0, False), (0, -1.0, True)]
    some = AliasedStates(ShortCorridor(), [2, 0, 0, 1])
    assert some.observation_space.n == 3
    assert [some.reset(seed=0)[0], *(some.step(action)[0] for action in (1, 0, 1))] == [2, 0, 0, 1]
    # A policy for labels, as one for states.
    labelled = np.array([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(labelled[some.labels], [[0.5, 0.5], [0, 1], [0, 1], [0.5, 0.5]])


def test_what_hides_the_state_has_no_model():
    env = AliasedStates(ShortCorridor(), [0, 0, 0, 0])
    with pytest.raises(TypeError, match=r"env\.unwrapped\.mdp"):
        TabularMDP.from_env(env)
    for labels in ([0, 0, 0], [0, 0, -1, 0], [0, 0, 0.5, 0]):
        with pytest.raises(ValueError, match="labels are 4 integers from 0"):
            AliasedStates(ShortCorridor(), labels)
