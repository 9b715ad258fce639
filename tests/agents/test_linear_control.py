import gymnasium
import numpy as np
import pytest

from aligngym.agents.dynamic_programming import PolicyIteration
from aligngym.agents.features import Coordinates, FeatureTable, Fourier, OneHot, TileCoding
from aligngym.agents.linear_control import (
    LinearControl,
    SemiGradientExpectedSarsa,
    SemiGradientQLearning,
    SemiGradientSarsa,
)
from aligngym.core.schedules import Power
from aligngym.envs.grid_world import GridWorld

ALGORITHMS = [SemiGradientSarsa, SemiGradientExpectedSarsa, SemiGradientQLearning]


class Recorder(gymnasium.Wrapper):
    """Remembers what happened: (s, a, r, s', terminated), episode by episode."""

    def reset(self, **options):
        self.episodes = [*getattr(self, "episodes", []), []]
        self.seen, info = self.env.reset(**options)
        return self.seen, info

    def step(self, action):
        result = self.env.step(action)
        self.episodes[-1].append((self.seen, action, result[1], result[0], result[2]))
        self.seen = result[0]
        return result


class Scripted(gymnasium.Env):
    """Two steps with rewards 1 and 2 past observations (1, 0), (1, 1), (1, 2), and then an end of the given kind."""

    observation_space = gymnasium.spaces.Box(0, 2, (2,), float)
    action_space = gymnasium.spaces.Discrete(1)

    def __init__(self, truncates):
        self.truncates = truncates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.array([1.0, 0.0]), {}

    def step(self, action):
        self.time += 1
        over = self.time == 2
        seen = np.array([1.0, self.time])
        return seen, float(self.time), over and not self.truncates, over and self.truncates, {}


class Raw:
    """The observation itself."""

    size = 2

    def __call__(self, observations):
        return np.asarray(observations, dtype=float)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("truncates", [True, False])
def test_one_episode_by_hand_truncation_bootstraps_and_termination_does_not(algorithm, truncates):
    agent = algorithm(Scripted(truncates), Raw(), 0.5, 0.1)
    agent.weights[:] = [1.0, 2.0]
    agent.learn(1, progress=False)
    weights = np.array([1.0, 2.0])
    # Q = 1, then 3, then 5 with the first weights; every step moves them.
    weights += 0.1 * (1 + 0.5 * 3 - 1) * np.array([1, 0])
    following = weights @ [1, 2]
    weights += 0.1 * (2 + 0.5 * following * truncates - weights @ [1, 1]) * np.array([1, 1])
    np.testing.assert_allclose(agent.weights, [weights])


def test_on_one_hot_features_the_updates_are_those_of_the_table_bit_for_bit():
    # R. Sutton and A. Barto, 2nd ed., boxes of sections 6.4 and 6.5, replayed on what the agents went through.
    policies = {
        SemiGradientSarsa: lambda row, action: row[action],
        SemiGradientExpectedSarsa: lambda row, action: (1 - 0.3) * row.max() + 0.3 * row.mean(),
        SemiGradientQLearning: lambda row, action: row.max(),
    }
    for algorithm, worth in policies.items():
        env = Recorder(GridWorld("S.F\n.#.\n..G", slip=0.2, step_reward=-0.1))
        agent = algorithm(env, OneHot(8), 0.9, 0.2, epsilon=0.3, seed=1).learn(60, progress=False)
        table = np.zeros((8, 4))
        for episode in env.episodes:
            for time, (state, action, reward, next_state, terminated) in enumerate(episode):
                following = 0.0 if terminated else worth(table[next_state], episode[time + 1][1])
                table[state, action] += 0.2 * (reward + 0.9 * following - table[state, action])
        assert np.abs(table).max() > 0.3
        np.testing.assert_array_equal(agent.weights.T, table)
        assert agent.steps == sum(map(len, env.episodes))


@pytest.mark.parametrize("seed", range(3))
def test_q_learning_with_full_features_reaches_the_optimum(seed):
    # Any basis of all functions of the state will do: here Fourier's, on a row of 4 cells, with the end left out.
    env = GridWorld("....G", slip=0.2, step_reward=-0.1, boundary_reward=-0.1)
    exact = PolicyIteration(env, 0.9).learn(progress=False)
    features = Fourier(Coordinates.of_table(np.append(np.arange(4) / 3, 1)), 3)
    agent = SemiGradientQLearning(env, features, 0.9, Power(0.3, 0.6, 500), epsilon=0.5, seed=seed)
    agent.learn(1000, progress=False)
    assert np.abs(agent.action_values(np.arange(4)) - exact.action_values[:4]).max() < 0.1
    np.testing.assert_array_equal(agent.policy[:4], exact.policy[:4])
    np.testing.assert_array_equal(agent.act(np.arange(4)), [1, 1, 1, 1])


def test_mountain_car_with_tile_coding():
    # R. Sutton and A. Barto, 2nd ed., example 10.1 and figure 10.2: 8 tilings of 8 × 8, α = 0.5/8, ε = 0, γ = 1. The
    # first episodes take hundreds of steps; later ones between 100 and 200.
    env = gymnasium.make("MountainCar-v0", max_episode_steps=5000)
    features = TileCoding(Coordinates.of_space(env.observation_space), tiles=8, tilings=8)
    agent = SemiGradientSarsa(env, features, 1.0, 0.5 / 8, epsilon=0.0, seed=0)
    lengths = [agent.iterate()["length"]]
    agent.learn(60, progress=False)
    assert lengths[0] > 300
    judged = agent.evaluate(env, episodes=10, seed=5)
    assert judged["truncated"] == 0
    # Gymnasium's threshold for a solution is −110, over 100 episodes; a full swing takes at least about 85 steps.
    assert -200 < judged["return"] < -85
    # The values are costs to go, largest at the bottom of the valley (figure 10.1).
    bottom, top = agent.action_values([[-0.5, 0.0], [0.45, 0.05]]).max(axis=-1)
    assert bottom < top - 40


def test_the_discounted_return_of_the_evaluation_uses_the_agents_discount():
    env = GridWorld("S.G")
    agent = SemiGradientQLearning(env, OneHot(3), 0.5, 0.1)
    agent.weights[1] = 1.0
    assert agent.evaluate(env, episodes=2)["return"] == pytest.approx(0.5)
    assert agent.evaluate(env, episodes=2, discount=1.0)["return"] == 1


def test_acting_takes_the_best_action_and_breaks_ties_on_request():
    env = GridWorld("S.G")
    agent = SemiGradientQLearning(env, OneHot(3), 0.9, 0.1)
    agent.weights[:, 0] = [0.0, 1.0, 1.0, -1.0]
    assert agent.act(0) == 1
    np.testing.assert_array_equal(agent.act([[0, 1], [1, 0]]), [[1, 0], [0, 1]])
    np.testing.assert_array_equal(agent.policy[:2], [[0, 0.5, 0.5, 0], [0.25] * 4])
    drawn = agent.act(np.zeros(20_000, int), greedy=False, generator=np.random.default_rng(0))
    # Hoeffding for a frequency, wrong with probability 1e-6.
    assert abs((drawn == 1).mean() - 0.5) < np.sqrt(np.log(2 / 1e-6) / 40_000)
    assert set(drawn) == {1, 2}
    with pytest.raises(ValueError, match="needs a generator"):
        agent.act(0, greedy=False)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_saved_learner_continues_bit_for_bit(tmp_path, algorithm):
    def make(seed=7):
        env = gymnasium.make("CartPole-v1")
        bounds = [2.5, 2.5, 0.25, 2.5]
        features = Fourier(Coordinates.of_space(env.observation_space, np.negative(bounds), bounds), 1)
        return algorithm(env, features, 0.9, Power(0.01, 0.6), Power(0.5, 0.3), seed=seed)

    through, halfway = make().learn(20, progress=False), make().learn(8, progress=False)
    halfway.save(tmp_path / "weights.safetensors")
    resumed = make().load(tmp_path / "weights.safetensors").learn(12, progress=False)
    np.testing.assert_array_equal(resumed.weights, through.weights)
    assert (resumed.steps, resumed.iteration) == (through.steps, 20)
    assert (make(seed=8).learn(20, progress=False).weights != through.weights).any()
    with pytest.raises(ValueError, match=r"shape \(2, 16\), and these \(4, 3\)"):
        algorithm(GridWorld("S.G"), OneHot(3), 0.9, 0.1).load(tmp_path / "weights.safetensors")


def test_divergence_is_loud():
    with pytest.raises(FloatingPointError, match=r"SemiGradientSarsa, episode \d+: .* step_size smaller than .*3"):
        SemiGradientSarsa(GridWorld(), FeatureTable(np.ones((25, 2))), 0.9, 3.0).learn(50, progress=False)


def test_weights_that_overflow_in_one_update_are_noticed_there():
    agent = SemiGradientQLearning(GridWorld("S.G"), FeatureTable([[1e200, 0.0]] * 3), 0.9, 1.0)
    with pytest.raises(FloatingPointError, match="no longer finite"):
        agent.update(np.array([1e200, 0.0]), 0, 1e200)


def test_a_task_without_end_can_be_cut():
    env = GridWorld("S.G", terminal_target=False)
    agent = SemiGradientQLearning(env, OneHot(3), 0.9, 0.1, max_episode_steps=40)
    assert agent.iterate()["length"] == 40
    with pytest.raises(ValueError, match="max_episode_steps"):
        SemiGradientQLearning(env, OneHot(3), 0.9, 0.1)
    with pytest.raises(ValueError, match="discount of 1"):
        SemiGradientQLearning(env, OneHot(3), 1.0, 0.1, max_episode_steps=40)


def test_a_new_algorithm_is_one_method():
    class Pessimist(LinearControl):
        """The next state is worth its worst action."""

        @staticmethod
        def next_value(values, next_action, epsilon):
            return values.min()

    env = GridWorld("SG", step_reward=-1.0)
    agent = Pessimist(env, OneHot(2), 0.5, 0.5, epsilon=1.0).learn(200, progress=False)
    # Three moves bounce for −1: Q = −1 + Q / 2 = −2, and the way to the end pays 1.
    np.testing.assert_allclose(agent.weights[:, 0], [-2, 1, -2, -2], atol=1e-6)


def test_bad_arguments_are_refused():
    env = GridWorld("S.G")
    with pytest.raises(ValueError, match=r"between 0 and 1, not -0\.1"):
        SemiGradientSarsa(env, OneHot(3), -0.1, 0.1)
    with pytest.raises(ValueError, match=r"starts at 1\.5"):
        SemiGradientSarsa(env, OneHot(3), 0.9, 0.1, epsilon=1.5)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        SemiGradientSarsa(env, OneHot(3), 0.9, 0.1, max_episode_steps=0)
    with pytest.raises(TypeError, match="discrete actions"):
        SemiGradientSarsa(gymnasium.make("Pendulum-v1"), Raw(), 0.9, 0.1)
    with pytest.raises(TypeError, match=r"ask act\(observations\)"):
        _ = SemiGradientSarsa(Scripted(True), Raw(), 0.9, 0.1).policy
    with pytest.raises(ValueError, match="state numbers 0 … 2"):
        SemiGradientSarsa(Scripted(True), OneHot(3), 0.9, 0.1).learn(1, progress=False)
