import math

import gymnasium
import numpy as np
import pytest

from aligngym.agents import PolicyIteration, QLearning, TDControl, error_bound
from aligngym.core.callbacks import Callback
from aligngym.core.schedules import Constant, Power
from aligngym.envs import GridWorld


class Scripted(gymnasium.Env):
    """Two steps with given rewards through states 0, 1, 2, and then an end of the given kind."""

    observation_space = gymnasium.spaces.Discrete(3)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, truncates):
        self.truncates = truncates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return 0, {}

    def step(self, action):
        self.time += 1
        over = self.time == 2
        return self.time, float(self.time), over and not self.truncates, over and self.truncates, {}


class Recorder(Callback):
    """Collects the return of every episode."""

    def __init__(self, returns):
        self.returns = returns

    def on_iteration(self, agent, metrics):
        self.returns.append(metrics["return"])


@pytest.mark.parametrize("truncates", [True, False])
def test_one_episode_by_hand_truncation_bootstraps_and_termination_does_not(truncates):
    agent = QLearning(Scripted(truncates), discount=0.5, step_size=0.1, epsilon=0.0)
    agent.action_values[:] = [[1.0, 0.0], [0.0, 3.0], [8.0, 9.0]]
    agent.iterate()
    first = 1.0 + 0.1 * (1.0 + 0.5 * 3.0 - 1.0)
    second = 3.0 + 0.1 * (2.0 + (0.5 * 9.0 if truncates else 0.0) - 3.0)
    np.testing.assert_allclose(agent.action_values, [[first, 0.0], [0.0, second], [8.0, 9.0]])
    np.testing.assert_array_equal(agent.visits, [[1, 0], [0, 1], [0, 0]])


def test_step_sizes_count_the_visits_of_each_entry():
    # One state, one step, rewards that are all 1: with α_k = 1 / (k + 2), Q after n visits is 1 − 1 / (n + 1).
    agent = QLearning(GridWorld("SG"), 0.9, step_size=Power(0.5, exponent=1.0, offset=2.0), epsilon=0.5, seed=1)
    agent.learn(50, progress=False)
    assert agent.visits[0, 1] == 50
    assert agent.action_values[0, 1] == pytest.approx(1 - 1 / 51)


@pytest.mark.parametrize("seed", range(3))
def test_q_learning_converges_to_the_exact_optimum(seed):
    env = GridWorld("..F\n.#.\n..G", slip=0.2, step_reward=-0.1)
    exact = PolicyIteration(env, 0.8).learn(progress=False)
    agent = QLearning(env, 0.8, step_size=Power(exponent=0.7), epsilon=0.5, seed=seed)
    errors = []
    for episodes in (100, 900, 4000):
        agent.learn(episodes, progress=False)
        errors.append(np.abs(agent.values - exact.values).max())
        assert errors[-1] <= agent.error_bound
    assert agent.step_size.is_robbins_monro
    # The optimal values span 1.3 and an untrained table is off by 0.7.
    assert errors[2] < 0.1
    assert errors[2] < errors[0] / 3
    assert agent.converged is False
    # Where the exact optimum leaves a choice no larger than twice the error, either action is right.
    chosen = np.take_along_axis(exact.action_values, agent.act(np.arange(8))[:, None], axis=1)[:, 0]
    assert (exact.values - chosen <= 2 * np.abs(agent.action_values - exact.action_values).max() + 1e-12).all()


def test_a_deterministic_problem_is_learned_exactly_and_reported_as_converged():
    env = GridWorld("S.\n.G")
    agent = QLearning(env, 0.9, step_size=1.0, epsilon=0.5)
    assert agent.converged is False
    agent.learn(200, progress=False)
    exact = PolicyIteration(env, 0.9).learn(progress=False)
    np.testing.assert_allclose(agent.action_values[:3], exact.action_values[:3], atol=1e-12)
    assert agent.error_bound < 1e-12
    assert agent.converged is True
    np.testing.assert_array_equal(agent.policy[0], [0, 0.5, 0.5, 0])


def test_the_bound_is_the_bellman_residual_over_one_minus_gamma():
    env = GridWorld("S.\n.G")
    agent = QLearning(env, 0.9)
    # V = 0, and the best first reward is 1.
    assert agent.error_bound == pytest.approx(10, rel=1e-12)
    assert agent.error_bound >= error_bound(env.mdp, np.zeros(4), 1.0, 0.9)
    assert QLearning(env, 1.0).error_bound == math.inf


def test_without_a_model_nobody_knows():
    agent = QLearning(Scripted(truncates=False), 0.9)
    assert agent.error_bound is None
    assert agent.converged is None


def test_the_extra_terminal_state_of_taxi_is_no_obstacle():
    agent = QLearning(gymnasium.make("Taxi-v4"), 0.9)
    assert agent.model.num_states == 501
    # The best single reward is 20.
    assert agent.error_bound == pytest.approx(200)


def test_a_saved_learner_continues_bit_for_bit(tmp_path):
    def make():
        return QLearning(GridWorld(slip=0.2), 0.9, epsilon=Power(0.5, exponent=0.3), seed=7)

    through, halfway = make().learn(60, progress=False), make().learn(25, progress=False)
    halfway.save(tmp_path / "table.safetensors")
    resumed = make().load(tmp_path / "table.safetensors").learn(35, progress=False)
    np.testing.assert_array_equal(resumed.action_values, through.action_values)
    np.testing.assert_array_equal(resumed.visits, through.visits)
    assert resumed.iteration == 60
    other = QLearning(GridWorld(slip=0.2), 0.9, epsilon=Power(0.5, exponent=0.3), seed=8).learn(60, progress=False)
    assert (other.action_values != through.action_values).any()
    with pytest.raises(ValueError, match=r"saved table of \(25, 4\), and this is \(3, 4\)"):
        QLearning(GridWorld("S.G"), 0.9).load(tmp_path / "table.safetensors")


def test_exploration_is_epsilon_greedy_with_fair_ties():
    agent = QLearning(GridWorld(), 0.9)
    agent.action_values[0] = [0.0, 1.0, 1.0, -1.0]
    generator = np.random.default_rng(0)
    drawn = np.bincount([agent.explore(0, 0.2, generator) for _ in range(20_000)], minlength=4) / 20_000
    # Hoeffding for four frequencies, wrong with probability 1e-6.
    bound = math.sqrt(math.log(8 / 1e-6) / 40_000)
    np.testing.assert_allclose(drawn, [0.05, 0.45, 0.45, 0.05], atol=bound)


def test_a_new_algorithm_is_one_method():
    class Sarsa(TDControl):
        """The next state is worth what the behaviour does there."""

        @staticmethod
        def next_value(values, next_action, epsilon):
            return values[next_action]

    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., example 6.6: Sarsa walks around the cliff at a distance,
    # Q-learning along its edge, so with ε = 0.1 Sarsa collects more while it learns.
    def collected(algorithm):
        agent = algorithm(gymnasium.make("CliffWalking-v1"), 1.0, step_size=Constant(0.5), epsilon=0.1, seed=0)
        returns = []
        agent.learn(400, progress=False, callbacks=[Recorder(returns)])
        return np.mean(returns[100:])

    assert collected(Sarsa) > collected(QLearning) + 10


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"starts at 1\.5"):
        QLearning(GridWorld(), 0.9, epsilon=1.5)
    with pytest.raises(ValueError, match=r"not -0\.1"):
        QLearning(GridWorld(), -0.1)
    with pytest.raises(TypeError, match="discrete observations"):
        QLearning(gymnasium.make("CartPole-v1"), 0.9)
    with pytest.raises(ValueError, match="say how many iterations"):
        QLearning(GridWorld(), 0.9).learn()
