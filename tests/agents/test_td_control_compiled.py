"""Compiled code, plain Python and a stepped environment must end in the same table, bit for bit."""

import copy

import gymnasium
import numpy as np
import pytest
from gymnasium.utils import seeding

from aligngym.agents import compiled_control
from aligngym.agents.compiled_control import CompiledEpisodes, Learner, Progress, sampler
from aligngym.agents.temporal_difference import ExpectedSarsa, QLearning, Sarsa, TDControl
from aligngym.core.compilation import compiled, function_pointer, interpreted, numba
from aligngym.core.schedules import Constant, Decay, Power
from aligngym.envs import GridWorld, TabularEnv, TabularMDP

needs_numba = pytest.mark.skipif(
    numba is None or numba.config.DISABLE_JIT, reason="there is nothing to compare without a compiler"
)
MAP = "S.F.\n.#.S\n..FG"


class Smallest(TDControl):
    """A pessimist of one's own, compiled like the others."""

    @staticmethod
    @compiled
    def next_value(values, next_action, epsilon):
        return min(values) + 0.1 * epsilon * values[next_action]


def many_outcomes():
    """A task with up to 40 outcomes per row, some of them with rewards of their own, and 7 starts."""
    generator = np.random.default_rng(3)
    transitions = generator.dirichlet(np.full(40, 0.1), size=(40, 3))
    initial = np.zeros(40)
    initial[:7] = generator.dirichlet(np.ones(7))
    return TabularEnv(
        TabularMDP.from_arrays(transitions, generator.normal(size=(40, 3, 40)), initial, np.arange(40) > 36)
    )


def limited(env, steps):
    return gymnasium.wrappers.TimeLimit(env, steps)


ENVIRONMENTS = {
    "deterministic": lambda: GridWorld("S..\n.#.\n..G"),
    "slip, two starts": lambda: GridWorld(MAP, slip=0.3),
    "any start": lambda: GridWorld("...\n.FG", slip=0.3),
    "time limit": lambda: limited(GridWorld(MAP, slip=0.3, stay=True), 7),
    "registered": lambda: gymnasium.make("aligngym/GridWorld-v0", slip=0.1, max_episode_steps=30),
    "many outcomes": lambda: limited(many_outcomes(), 50),
    "continuing": lambda: limited(GridWorld(MAP, terminal_target=False), 80),
}


def both_ways(kind, make, iterations=6, **options):
    """Learn with and without compiling; return both agents and their metrics."""
    agents, histories = [], []
    for compiled_path in (True, False):
        agent = kind(make(), 0.9, compiled=compiled_path, **options)
        assert agent.compiled is compiled_path
        # Terminal states have values too, which must not be used.
        agent.action_values[:] = np.random.default_rng(9).normal(size=agent.action_values.shape)
        histories.append([])
        for _ in range(iterations):
            histories[-1].append(agent.iterate())
            agent.iteration += 1
        agents.append(agent)
    return agents, histories


def assert_identical(agents, histories):
    np.testing.assert_array_equal(agents[0].action_values, agents[1].action_values)
    np.testing.assert_array_equal(agents[0].visits, agents[1].visits)
    assert histories[0] == histories[1]
    assert agents[0].visits.sum() > 0


@needs_numba
@pytest.mark.parametrize("kind", [Sarsa, ExpectedSarsa, QLearning, Smallest])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_compiled_and_stepped_learning_are_identical(kind, name):
    options = {"step_size": Power(exponent=0.7), "epsilon": Power(0.8, exponent=0.5), "seed": 5}
    assert_identical(*both_ways(kind, ENVIRONMENTS[name], episodes_per_iteration=4, **options))


@needs_numba
@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.3, "epsilon": 0.0},
        {"step_size": Decay(1.0, steps=40), "epsilon": 1.0},
        {"step_size": Constant(1.0), "max_episode_steps": 5},
        {"behaviour": np.tile([0.1, 0.2, 0.3, 0.4], (11, 1)), "seed": 2},
        {"behaviour": np.eye(4)[np.arange(11) % 4], "max_episode_steps": 20},
    ],
)
def test_they_are_identical_with_every_option(options):
    assert_identical(*both_ways(Sarsa, lambda: GridWorld(MAP, slip=0.3), episodes_per_iteration=3, **options))
    # The shorter of two limits counts.
    assert_identical(*both_ways(QLearning, lambda: limited(GridWorld(MAP), 9), **options))


@needs_numba
def test_an_episode_goes_on_where_the_table_of_step_sizes_has_to_grow():
    # Two pairs share 10,000 steps, and the first table has 1024 step sizes.
    options = {"step_size": Power(exponent=0.6), "epsilon": 1.0, "max_episode_steps": 10_000}
    mdp = TabularMDP.from_arrays(np.ones((1, 2, 1)), [[1.0, 0.0]], [1.0])
    agents, histories = both_ways(QLearning, lambda: TabularEnv(mdp), iterations=2, **options)
    assert_identical(agents, histories)
    assert agents[0].visits.min() > 4 * 1024


@needs_numba
@pytest.mark.parametrize("seed", range(3))
def test_the_compiled_loop_is_the_same_as_its_own_python(seed):
    mdp = many_outcomes().mdp
    results = []
    for play, next_value in (
        (compiled_control.play, function_pointer(ExpectedSarsa.next_value, "float64(float64[::1], int64, float64)")),
        (interpreted(compiled_control.play), interpreted(ExpectedSarsa.next_value)),
    ):
        learner = Learner(
            np.zeros((40, 3)), np.zeros((40, 3), np.int64), np.full(50, 0.5), np.zeros((0, 3)), 0.9, 0.3, 30
        )
        generators = np.random.default_rng(seed), seeding.np_random(seed)[0]
        progress = play(next_value, sampler(mdp), learner, Progress(20), *generators)
        results.append((learner, progress, *(generator.random() for generator in generators)))
    np.testing.assert_array_equal(results[0][0].action_values, results[1][0].action_values)
    np.testing.assert_array_equal(results[0][0].visits, results[1][0].visits)
    # Also the generators have been used as often.
    assert results[0][1:] == results[1][1:]


@needs_numba
def test_whatever_else_an_algorithm_does_is_left_to_python():
    class Plain(TDControl):
        @staticmethod
        def next_value(values, next_action, epsilon):
            return max(values)

    class Counting(QLearning):
        updates = 0

        def update(self, state, action, target):
            super().update(state, action, target)
            self.updates += 1

    class Noisy(gymnasium.RewardWrapper):
        def reward(self, reward):
            return reward + 1.0

    assert QLearning(GridWorld(MAP), 0.9).compiled
    assert not Plain(GridWorld(MAP), 0.9).compiled
    assert not QLearning(Noisy(GridWorld(MAP)), 0.9).compiled
    assert not QLearning(gymnasium.make("FrozenLake-v1"), 0.9).compiled
    counting = Counting(GridWorld(MAP), 0.9).learn(3, progress=False)
    assert counting.updates == counting.visits.sum() > 0
    # The same algorithm, whoever plays.
    ours, plain = (kind(GridWorld(MAP), 0.9, seed=4).learn(5, progress=False) for kind in (QLearning, Plain))
    np.testing.assert_array_equal(ours.action_values, plain.action_values)


@pytest.mark.parametrize("probabilities", [[1.0], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0], np.full(33, 1 / 33)])
def test_drawing_is_that_of_searchsorted(probabilities):
    cumulative = np.cumsum(probabilities)
    ours, theirs = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(200):
        expected = cumulative[:-1].searchsorted(theirs.random(), "right") if len(cumulative) > 1 else 0
        assert interpreted(compiled_control.draw)(cumulative.tolist(), ours) == expected
    assert ours.random() == theirs.random()


@pytest.mark.parametrize("compiled_path", [True, False])
def test_an_iteration_is_the_given_number_of_episodes_and_reports_means(compiled_path):
    env = limited(GridWorld("S.G", step_reward=-1.0, target_reward=0.0), 12)
    agent = QLearning(env, 0.9, epsilon=1.0, episodes_per_iteration=7, compiled=compiled_path, seed=3)
    metrics = agent.iterate()
    assert metrics["length"] * 7 == agent.visits.sum()
    # Of an episode's steps, all but the one that ends at the target pay −1.
    ended = metrics["length"] + metrics["return"]
    assert 0 < ended <= 1
    assert ended * 7 == pytest.approx(round(ended * 7), abs=1e-9)


@pytest.mark.parametrize("compiled_path", [True, False])
def test_a_diverging_table_is_noticed(compiled_path):
    mdp = TabularMDP.from_arrays(np.ones((1, 2, 1)), [[1.0, 0.5]], [1.0])
    agent = QLearning(
        TabularEnv(mdp), 0.99, step_size=1e10, max_episode_steps=2000, epsilon=0.5, compiled=compiled_path
    )
    with pytest.raises(FloatingPointError, match="step size is too large"):
        agent.learn(1, progress=False)


def test_step_sizes_come_from_the_schedule_in_order():
    asked = []

    class Recording(Power):
        def __call__(self, step):
            asked.append(step)
            return super().__call__(step)

    episodes = CompiledEpisodes(GridWorld("SG").mdp, QLearning.next_value, Recording(), np.zeros((0, 4)), 0.9, np.inf)
    for _ in range(3):
        episodes._add_step_sizes()
    np.testing.assert_array_equal(asked, np.arange(4096))
    np.testing.assert_array_equal(episodes.step_sizes, [Power()(k) for k in range(4096)])


@pytest.mark.parametrize("compiled", [True, False])
def test_a_copy_learns_the_same_and_leaves_the_original_alone(compiled):
    agent = QLearning(GridWorld(slip=0.2), 0.9, compiled=compiled).learn(20, progress=False)
    before, twin = agent.action_values.copy(), copy.deepcopy(agent)
    copy.deepcopy(agent).update(0, 0, 100.0)
    np.testing.assert_array_equal(agent.action_values, before)
    twin.learn(20, progress=False)
    np.testing.assert_array_equal(agent.action_values, before)
    assert not np.array_equal(twin.action_values, before)
    agent.learn(20, progress=False)
    np.testing.assert_array_equal(agent.action_values, twin.action_values)
    np.testing.assert_array_equal(agent.visits, twin.visits)
