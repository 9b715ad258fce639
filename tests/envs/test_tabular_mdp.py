import gymnasium
import numpy as np
import pytest
from scipy.sparse import csr_array

from aligngym.envs import FiniteHorizon, GridWorld, Outcomes, TabularMDP


def random_arrays(seed=0, states=6, actions=3):
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.ones(states), size=(states, actions))
    return transitions, generator.normal(size=(states, actions, states))


def test_arrays_become_expected_rewards_and_rows():
    transitions, rewards = random_arrays()
    mdp = TabularMDP.from_arrays(transitions, rewards)
    np.testing.assert_allclose(mdp.transitions.toarray().reshape(6, 3, 6), transitions, atol=1e-15)
    np.testing.assert_allclose(mdp.rewards, (transitions * rewards).sum(axis=2), atol=1e-15)
    sparse = TabularMDP.from_arrays(csr_array(transitions.reshape(18, 6)), mdp.rewards)
    np.testing.assert_allclose(sparse.rewards, mdp.rewards, atol=1e-15)
    np.testing.assert_allclose(mdp.initial, 1 / 6)


def test_terminal_states_absorb_with_zero_reward_whatever_the_tables_say():
    transitions, rewards = random_arrays()
    mdp = TabularMDP.from_arrays(transitions, rewards, terminal=np.arange(6) == 2)
    np.testing.assert_array_equal(mdp.transitions.toarray()[6:9], np.eye(6)[[2, 2, 2]])
    np.testing.assert_array_equal(mdp.rewards[2], 0)
    np.testing.assert_allclose(mdp.initial, [0.2, 0.2, 0, 0.2, 0.2, 0.2])
    mdp.check_model()


def test_equal_outcomes_are_added_and_different_rewards_kept_apart():
    outcomes = Outcomes(
        np.array([0, 0, 0, 1]),
        np.array([1, 1, 1, 1]),
        np.array([0.25, 0.25, 0.5, 1.0]),
        np.array([2.0, 2.0, -4.0, 0.0]),
    )
    mdp = TabularMDP(outcomes, [1.0, 0.0], [False, True], num_actions=1)
    np.testing.assert_array_equal(mdp.outcomes.probabilities, [0.5, 0.5, 1.0])
    np.testing.assert_array_equal(mdp.outcomes.rewards, [-4.0, 2.0, 0.0])
    assert mdp.rewards[0, 0] == -1.0
    assert mdp.transitions[0, 1] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, r: t.__setitem__((4, 1), t[4, 1] * 0.9), r"state 4, action 1: .*miss it by 0\.1"),
        (lambda t, r: t.__setitem__((3, 2, 0), -0.5), "state 3, action 2: 1 outcomes have a probability"),
        (lambda t, r: r.__setitem__((5, 0, 1), np.nan), "state 5, action 0: 1 outcomes have a reward"),
    ],
)
def test_a_bad_table_is_refused_with_its_state_and_action(change, message):
    transitions, rewards = random_arrays()
    change(transitions, rewards)
    with pytest.raises(ValueError, match=message):
        TabularMDP.from_arrays(transitions, rewards)


def test_a_bad_initial_distribution_and_unknown_states_are_refused():
    transitions, rewards = random_arrays()
    with pytest.raises(ValueError, match="sums to 2"):
        TabularMDP.from_arrays(transitions, rewards, initial=np.full(6, 1 / 3))
    with pytest.raises(ValueError, match="beyond 1"):
        TabularMDP(Outcomes(np.array([0]), np.array([7]), np.ones(1), np.zeros(1)), [1.0], [False], 1)


def test_check_model_finds_what_was_broken_afterwards():
    mdp = GridWorld().mdp
    mdp.check_model()
    mdp.transitions.data[10] += 0.3
    with pytest.raises(ValueError, match=r"state 2, action 2: .*misses it by 0\.3"):
        mdp.check_model()
    mdp = GridWorld().mdp
    mdp.rewards[mdp.terminal] = 0.5
    with pytest.raises(ValueError, match=r"state 17, action 0: a terminal state pays 0\.5"):
        mdp.check_model()


def test_evaluation_is_the_dense_linear_solution():
    transitions, rewards = random_arrays(seed=3)
    policy = np.random.default_rng(1).dirichlet(np.ones(3), size=6)
    mdp = TabularMDP.from_arrays(transitions, rewards)
    matrix = np.eye(6) - 0.95 * np.einsum("sa,sat->st", policy, transitions)
    expected = np.linalg.solve(matrix, np.einsum("sa,sat,sat->s", policy, transitions, rewards))
    np.testing.assert_allclose(mdp.evaluate(policy, 0.95), expected, atol=1e-12)


def test_evaluation_reproduces_sutton_and_bartos_figure_4_1():
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., figure 4.1, k = ∞: equiprobable, undiscounted.
    grid = GridWorld("G...\n....\n....\n...G", step_reward=-1, boundary_reward=-1, target_reward=-1)
    values = grid.mdp.evaluate(np.full((16, 4), 0.25), discount=1.0)
    published = [0, -14, -20, -22, -14, -18, -20, -20, -20, -20, -18, -14, -22, -20, -14, 0]
    np.testing.assert_allclose(values, published, atol=1e-10)


def test_evaluation_without_discount_needs_an_end():
    grid = GridWorld("S.G", step_reward=-1, boundary_reward=-1, target_reward=-1)
    leftwards = np.tile([0.0, 0, 0, 1], (3, 1))
    with pytest.raises(ValueError, match=r"from state 0 .* -1\.0 a step"):
        grid.mdp.evaluate(leftwards, 1.0)
    free = GridWorld("S.G", boundary_reward=0)
    np.testing.assert_array_equal(free.mdp.evaluate(leftwards, 1.0), 0)
    with pytest.raises(ValueError, match="distribution over actions"):
        grid.mdp.evaluate(leftwards * 2, 0.9)
    with pytest.raises(ValueError, match="shape"):
        grid.mdp.evaluate(leftwards[:2], 0.9)


def test_the_unrolled_model_is_a_power_of_the_transition_matrix():
    transitions, rewards = random_arrays(seed=5)
    mdp = TabularMDP.from_arrays(transitions, rewards, initial=np.eye(6)[1])
    unrolled = mdp.unrolled(4)
    assert unrolled.num_states == 30
    np.testing.assert_array_equal(unrolled.terminal, np.arange(30) >= 24)
    policy = np.random.default_rng(2).dirichlet(np.ones(3), size=6)
    matrix, reward = np.einsum("sa,sat->st", policy, transitions), (policy * mdp.rewards).sum(axis=1)
    expected = sum(0.9**t * np.linalg.matrix_power(matrix, t) @ reward for t in range(4))
    values = unrolled.evaluate(np.tile(policy, (5, 1)), 0.9)
    np.testing.assert_allclose(values[:6], expected, atol=1e-12)
    assert unrolled.initial[1] == 1
    with pytest.raises(ValueError, match="at least 1, not 0"):
        mdp.unrolled(0)


TOY_TEXT = {
    "FrozenLake-v1": {},
    "FrozenLake-v1 8x8": {"map_name": "8x8"},
    "CliffWalking-v1": {},
    "CliffWalking-v1 slippery": {"is_slippery": True},
    "Taxi-v4": {},
}


@pytest.mark.parametrize("name", TOY_TEXT)
def test_gymnasiums_models_agree_with_their_simulators(name):
    env = gymnasium.make(name.split()[0], **TOY_TEXT[name]).unwrapped
    TabularMDP.from_env(env).check_model(env, samples=10_000)


def test_a_flagged_state_that_is_also_entered_in_passing_keeps_its_value():
    class Passing(gymnasium.Env):
        # Going right ends the episode in state 1; going left passes through state 1, which then pays 5.
        P = {  # noqa: RUF012
            0: {0: [(1.0, 1, 0.0, False)], 1: [(1.0, 1, 1.0, True)]},
            1: {0: [(1.0, 0, 5.0, False)], 1: [(1.0, 0, 5.0, False)]},
        }

    mdp = TabularMDP.from_env(Passing())
    np.testing.assert_array_equal(mdp.terminal, [False, False, True])
    np.testing.assert_array_equal(mdp.transitions.toarray()[:2], [[0, 1, 0], [0, 0, 1]])
    # V(0) = max(0 + γ (5 + γ V(0)), 1) is the first, for γ = 1/2: V(0) = 2.5 / 0.75.
    left = mdp.evaluate(np.tile([1.0, 0.0], (3, 1)), 0.5)
    np.testing.assert_allclose(left, [2.5 / 0.75, 5 + 0.5 * 2.5 / 0.75, 0])


def test_cliff_walkings_goal_absorbs():
    mdp = TabularMDP.from_env(gymnasium.make("CliffWalking-v1"))
    assert mdp.num_states == 48
    np.testing.assert_array_equal(np.flatnonzero(mdp.terminal), [47])
    assert mdp.initial[36] == 1


def test_taxis_ends_go_to_one_extra_state():
    mdp = TabularMDP.from_env(gymnasium.make("Taxi-v4"))
    assert mdp.num_states == 501
    np.testing.assert_array_equal(np.flatnonzero(mdp.terminal), [500])


def test_an_environment_without_a_model_is_refused():
    with pytest.raises(TypeError, match="neither an attribute mdp nor Gymnasium's P"):
        TabularMDP.from_env(gymnasium.make("CartPole-v1"))


class Lying(gymnasium.Wrapper):
    """Does something else than the model says, by choice: a rarer slip, another reward, no end, another start."""

    def __init__(self, env, lie):
        super().__init__(env)
        self.lie = lie

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        if self.lie == "start":
            observation = self.env.unwrapped.state = 3
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.lie == "reward" and terminated:
            reward = 2.0
        if self.lie == "end":
            terminated = False
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("reward", r"with reward 2\.0 and ended there, which the model calls impossible"),
        ("end", "and went on, which the model calls impossible"),
        ("start", "state 3: an episode started there"),
    ],
)
def test_a_simulator_that_differs_is_refused(lie, message):
    env = GridWorld("S..\n..G", slip=0.2)
    env.mdp.check_model(Lying(env, lie=None), samples=2000)
    with pytest.raises(ValueError, match=message):
        env.mdp.check_model(Lying(env, lie), samples=2000)


def test_a_simulator_that_slips_more_often_is_refused():
    map = "S..\n..G"
    with pytest.raises(ValueError, match="the model gives next state"):
        GridWorld(map, slip=0.1).mdp.check_model(GridWorld(map, slip=0.4), samples=20_000)
    two = GridWorld("SS.G")
    two.mdp.initial[:] = [0.1, 0.9, 0, 0]
    with pytest.raises(ValueError, match=r"state \d: the model starts there with probability 0\.[19]"):
        two.mdp.check_model(GridWorld("SS.G"), samples=5000)


def test_a_finite_horizon_ends_and_tells_the_time():
    env = FiniteHorizon(GridWorld("S.....\n.....G", slip=0.3), horizon=5)
    env.mdp.check_model(env, samples=5000)
    observation, _ = env.reset(seed=0)
    times = [observation // 12]
    terminated = False
    while not terminated:
        observation, _, terminated, truncated, _ = env.step(0)
        times.append(observation // 12)
    assert times == [0, 1, 2, 3, 4, 5]
    assert not truncated
