"""One-step control against exact fixed points, printed tables and the published examples."""

import gymnasium
import numpy as np
import pytest
from scipy import stats

from aligngym.agents import PolicyIteration
from aligngym.agents.double_q_learning import DoubleQLearning
from aligngym.agents.dyna import DynaQ, DynaQPlus, PrioritizedDyna
from aligngym.agents.eligibility_traces import SarsaLambda
from aligngym.agents.endless_tasks import endless_states, time_limit
from aligngym.agents.n_step import NStepExpectedSarsa, NStepSarsa, TreeBackup
from aligngym.agents.temporal_difference import ExpectedSarsa, QLearning, Sarsa, TDControl
from aligngym.core.callbacks import Callback
from aligngym.core.schedules import Constant, Power
from aligngym.envs import GridWorld, TabularEnv, TabularMDP

DISCOUNT = 0.8
CLASSES = [
    Sarsa,
    ExpectedSarsa,
    QLearning,
    DoubleQLearning,
    NStepSarsa,
    NStepExpectedSarsa,
    TreeBackup,
    SarsaLambda,
    DynaQ,
    DynaQPlus,
    PrioritizedDyna,
]


class Recorder(Callback):
    """Collects a metric of every iteration."""

    def __init__(self, metric):
        self.metric, self.values = metric, []

    def on_iteration(self, agent, metrics):
        self.values.append(metrics[self.metric])


def upper_bound(samples, confidence=0.99):
    """The one-sided upper confidence bound of a mean, by Student's t."""
    return np.mean(samples) + stats.t.ppf(confidence, len(samples) - 1) * stats.sem(samples)


def windy():
    return GridWorld("..F\n.#.\n..G", slip=0.2, step_reward=-0.1)


def optimal_action_values(mdp, epsilon=0.0):
    """The fixed point of Q = r + γ P ((1 − ε) max Q + ε mean Q): the best that an ε-soft policy can do."""
    values = np.zeros(mdp.rewards.shape)
    for _ in range(400):
        values = mdp.action_values((1 - epsilon) * values.max(axis=1) + epsilon * values.mean(axis=1), DISCOUNT)
    return values


@pytest.mark.parametrize(
    ("kind", "learned_about", "options", "bounds"),
    [
        (QLearning, 0.0, {"epsilon": 0.5}, (0.35, 0.1)),
        (QLearning, 0.0, {"behaviour": np.full((8, 4), 0.25)}, (0.15, 0.05)),
        (ExpectedSarsa, 0.0, {"epsilon": 0.0, "behaviour": np.full((8, 4), 0.25)}, (0.15, 0.05)),
        (ExpectedSarsa, 0.3, {"epsilon": 0.3}, (0.45, 0.15)),
        (Sarsa, 0.3, {"epsilon": 0.3}, (0.45, 0.15)),
    ],
)
def test_after_these_episodes_the_error_is_below_these_bounds(kind, learned_about, options, bounds):
    exact = optimal_action_values(windy().mdp, learned_about)
    errors = []
    for seed in range(8):
        agent = kind(
            windy(), DISCOUNT, step_size=Power(exponent=0.7), seed=seed, episodes_per_iteration=1000, **options
        )
        errors.append([])
        for iterations in (1, 19):
            agent.learn(iterations, progress=False)
            errors[-1].append(np.abs(agent.action_values - exact)[:7].max())
    # 1,000 and 20,000 episodes; Q ranges from −1.9 to 1.
    assert upper_bound(np.array(errors)[:, 0]) < bounds[0]
    assert upper_bound(np.array(errors)[:, 1]) < bounds[1]


def test_sarsa_with_a_constant_epsilon_is_not_optimal_and_with_a_vanishing_one_it_is():
    mdp = windy().mdp
    exact = optimal_action_values(mdp).max(axis=1)
    # What the best ε-soft policy expects in a state is not its max_a Q, but that is below the optimum too.
    assert np.abs(optimal_action_values(mdp, 0.3).max(axis=1) - exact).max() > 0.3
    errors = {0.3: [], Power(1.0, exponent=0.5): []}
    for seed in range(5):
        for epsilon, found in errors.items():
            agent = Sarsa(windy(), DISCOUNT, Power(exponent=0.7), epsilon, seed=seed, episodes_per_iteration=25)
            found.append(np.abs(agent.learn(400, progress=False).values - exact).max())
    constant, vanishing = errors.values()
    assert upper_bound(vanishing) < 0.27
    assert upper_bound(np.negative(constant)) < -0.4


def test_sarsa_with_a_fixed_behaviour_learns_its_values():
    env, behaviour = windy(), np.random.default_rng(1).dirichlet(np.ones(4), size=8)
    exact = env.mdp.action_values(env.mdp.evaluate(behaviour, DISCOUNT), DISCOUNT)
    errors = []
    for seed in range(6):
        agent = Sarsa(
            env, DISCOUNT, Power(exponent=0.7), seed=seed, behaviour=behaviour, episodes_per_iteration=10_000
        ).learn(1, progress=False)
        errors.append(np.abs(agent.action_values - exact)[:7].max())
    assert upper_bound(errors) < 0.25


@pytest.mark.parametrize("step_size", [Constant(0.5), Power()])
def test_a_constant_step_size_hovers_with_the_known_variance_and_one_over_n_is_the_mean(step_size):
    # One state, one action, rewards ±1 of mean 0 that end the episode: Q ← Q + α (r − Q).
    mdp = TabularMDP.from_arrays([[[0, 0.5, 0.5]], [[0, 1, 0]], [[0, 0, 1]]], [[[0, 1, -1]]] * 3, [1, 0, 0], [0, 1, 1])
    agent = QLearning(TabularEnv(mdp), 1.0, step_size=step_size)
    history, returns = [], Recorder("return")
    for _ in range(2000):
        agent.learn(1, progress=False, callbacks=[returns])
        history.append(agent.action_values[0, 0])
    if isinstance(step_size, Power):
        np.testing.assert_allclose(history, np.cumsum(returns.values) / np.arange(1, 2001), atol=1e-12)
    else:
        # Stationary variance α σ² / (2 − α); deviations 20 steps apart are as good as independent.
        squares = np.square(history[20:]).reshape(-1, 20).mean(axis=1)
        assert abs(squares.mean() - 0.5 / 1.5) < stats.t.ppf(0.9995, len(squares) - 1) * stats.sem(squares)
        assert stats.sem(squares) < 0.02


def test_zhao_figure_7_4_one_exploring_episode_of_100_000_steps_gives_the_optimal_values():
    # S. Zhao, Mathematical Foundations of Reinforcement Learning, figure 3.4 (a), printed values.
    printed = [5.8, 5.6, 6.2, 6.5, 5.8, 6.5, 7.2, 8.0, 7.2, 6.5, 7.2, 8.0, 10.0, 8.0, 7.2]
    printed += [8.0, 10.0, 10.0, 10.0, 8.0, 7.2, 9.0, 10.0, 9.0, 8.1]
    env = GridWorld(stay=True, terminal_target=False)
    exact = PolicyIteration(env, 0.9).learn(progress=False)
    for seed in range(3):
        agent = QLearning(
            env, 0.9, step_size=0.1, seed=seed, behaviour=np.full((25, 5), 0.2), max_episode_steps=100_000
        )
        agent.learn(1, progress=False)
        assert agent.visits.sum() == 100_000
        np.testing.assert_allclose(agent.values, printed, atol=0.051 + 0.02)
        assert np.abs(agent.values - exact.values).max() < 0.02
        assert np.abs(env.mdp.evaluate(agent.policy, 0.9) - exact.values).max() < 1e-9


def test_sutton_and_barto_example_6_6_the_cliff():
    # Figure of example 6.6 and figure 6.3: with ε = 0.1 Sarsa collects about −25 an episode, Q-learning about −50, and
    # Expected Sarsa more than Sarsa; but the greedy path of Q-learning is the shortest, 13 steps along the edge.
    env = TabularEnv(TabularMDP.from_env(gymnasium.make("CliffWalking-v1")))
    collected, greedy = {}, {}
    for kind in (Sarsa, QLearning, ExpectedSarsa):
        collected[kind], greedy[kind] = [], []
        for seed in range(10):
            returns = Recorder("return")
            agent = kind(env, 1.0, step_size=0.5, epsilon=0.1, seed=seed, episodes_per_iteration=10)
            agent.learn(50, progress=False, callbacks=[returns])
            collected[kind].append(np.mean(returns.values[10:]))
            greedy[kind].append(agent.evaluate(env, episodes=1, max_steps=100)["return"])
    assert upper_bound(np.subtract(collected[QLearning], collected[Sarsa])) < -15
    assert upper_bound(np.subtract(collected[Sarsa], collected[ExpectedSarsa])) < -2
    assert abs(np.mean(collected[Sarsa]) + 25) < 5
    assert abs(np.mean(collected[QLearning]) + 50) < 5
    assert greedy[QLearning] == [-13.0] * 10
    assert np.mean(greedy[Sarsa]) < -13.5


class MaximisationBias(gymnasium.Env):
    """Sutton and Barto, example 6.7: from A right ends with 0, left leads to B, where all actions pay N(−0.1, 1).

    Even actions are left and odd ones right, so that A has as many actions as B.
    """

    observation_space = gymnasium.spaces.Discrete(3)
    action_space = gymnasium.spaces.Discrete(10)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return 0, {}

    def step(self, action):
        if self.state == 0:
            self.lefts.append(action % 2 == 0)
            self.state = 1 if action % 2 == 0 else 2
            return self.state, 0.0, self.state == 2, False, {}
        return 2, self.np_random.normal(-0.1, 1.0), True, False, {}


def test_sutton_and_barto_example_6_7_double_q_learning_has_no_maximisation_bias():
    shares = {}
    for kind in (QLearning, DoubleQLearning):
        runs = []
        for seed in range(40):
            env = MaximisationBias()
            env.lefts = []
            kind(env, 1.0, step_size=0.1, epsilon=0.1, seed=seed, episodes_per_iteration=100).learn(3, progress=False)
            runs.append(np.reshape(env.lefts, (6, 50)).mean(axis=1))
        shares[kind] = np.array(runs)
    # The best there is goes left in 5 % of the episodes. At first Q-learning nearly always goes there, and after 300
    # episodes still too often; double Q-learning goes there as often as right at first, and after 100 not any more.
    assert upper_bound(-shares[QLearning][:, 0]) < -0.75
    assert upper_bound(shares[DoubleQLearning][:, 0]) < 0.6
    assert upper_bound(-shares[QLearning][:, 2]) < -0.25
    assert upper_bound(shares[DoubleQLearning][:, 2]) < 0.1


def test_double_q_learning_converges_in_both_tables():
    exact = optimal_action_values(windy().mdp)
    errors = []
    for seed in range(4):
        agent = DoubleQLearning(
            windy(), DISCOUNT, step_size=Power(exponent=0.7), epsilon=0.5, seed=seed, episodes_per_iteration=1000
        ).learn(1, progress=False)
        errors.append([np.abs(table - exact)[:7].max() for table in (*agent.tables, agent.action_values)])
        np.testing.assert_array_equal(agent.action_values, agent.tables.sum(axis=0) / 2)
        assert (agent.tables[0] != agent.tables[1]).any()
    # One-sided at 99 % from four seeds: 1,000 episodes, about 6,500 steps shared by two tables.
    assert upper_bound(np.array(errors)[:, 2]) < 0.5
    assert np.max(errors) < 0.7


def test_one_double_q_update_by_hand():
    agent = DoubleQLearning(GridWorld("S.G"), 0.5, step_size=0.5, epsilon=0.0, seed=0)
    agent.tables[:] = [[[0, 8.0, 0, 0], [1.0, 3.0, 0, 0], [6.0] * 4], [[0, 4.0, 0, 0], [5.0, 7.0, 0, 0], [6.0] * 4]]
    agent.action_values[:] = agent.tables.mean(axis=0)
    agent.iterate()
    learned = np.argwhere(agent.tables[:, 0, 1] != [8.0, 4.0]).item()
    # The table that learns chooses action 1 in the middle cell, and the other one values it.
    before, other = ((8.0, 7.0), (4.0, 3.0))[learned]
    assert agent.tables[learned, 0, 1] == before + 0.5 * (0.5 * other - before)
    # The step to the target pays 1, and nothing follows, whatever the table says there.
    assert sorted(agent.tables[:, 1, 1]) in ([2.0, 7.0], [3.0, 4.0])
    assert agent.visits.sum() == 2


@pytest.mark.parametrize("kind", CLASSES)
def test_every_saved_learner_continues_bit_for_bit(kind, tmp_path):
    def make(seed=7):
        env = GridWorld("S..\n.#F\n..G", slip=0.2)
        return kind(env, 0.9, epsilon=Power(0.5, exponent=0.3), seed=seed, episodes_per_iteration=2)

    through, halfway = make().learn(12, progress=False), make().learn(5, progress=False)
    halfway.save(tmp_path / "table.safetensors")
    resumed = make().load(tmp_path / "table.safetensors").learn(7, progress=False)
    np.testing.assert_array_equal(resumed.action_values, through.action_values)
    np.testing.assert_array_equal(resumed.visits, through.visits)
    assert resumed.iteration == 12
    assert (make(seed=8).learn(12, progress=False).action_values != through.action_values).any()


def test_a_table_of_ones_own_is_learned_in():
    for compiled in (True, False):
        agent = QLearning(GridWorld("SG"), 0.9, step_size=0.5, epsilon=0.0, compiled=compiled).learn(1, progress=False)
        agent.action_values = np.full((2, 4), 3.0)
        agent.visits[:] = 0
        agent.learn(1, progress=False)
        assert agent.action_values[0, 1] == 2.0
        assert agent.visits[0, 1] == 1


def test_bad_arguments_are_refused():
    env = GridWorld("S.G")
    with pytest.raises(ValueError, match=r"behaviour has shape \(2, 4\).*\(3, 4\)"):
        QLearning(env, 0.9, behaviour=np.full((2, 4), 0.25))
    with pytest.raises(ValueError, match=r"behaviour, state 1: .* no distribution"):
        QLearning(env, 0.9, behaviour=[[1, 0, 0, 0], [0.5, 0, 0, 0], [1, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"state 2: .* no distribution"):
        QLearning(env, 0.9, behaviour=[[1, 0, 0, 0], [1, 0, 0, 0], [2, -1, 0, 0]])
    with pytest.raises(ValueError, match="at least one episode of at least one step, not 0"):
        QLearning(env, 0.9, episodes_per_iteration=0)
    with pytest.raises(ValueError, match="not 1 of 0"):
        QLearning(env, 0.9, max_episode_steps=0)

    class Forgetful(TDControl):
        def next_value(self, values, next_action, epsilon):
            return max(values)

    with pytest.raises(TypeError, match="decorate it with @staticmethod"):
        Forgetful(env, 0.9)


def test_tasks_without_an_end_are_noticed():
    continuing = GridWorld("S.G", terminal_target=False)
    with pytest.raises(ValueError, match=r"from state 0 no episode ever ends.*max_episode_steps"):
        QLearning(continuing, 0.9)
    with pytest.raises(ValueError, match="discount of 1"):
        QLearning(continuing, 1.0, max_episode_steps=100)
    with pytest.raises(ValueError, match="discount of 1"):
        QLearning(gymnasium.wrappers.TimeLimit(continuing, 5), 1.0)
    QLearning(gymnasium.wrappers.TimeLimit(continuing, 5), 0.9).learn(1, progress=False)
    # A trap that pays nothing has a value, but an episode in it needs a limit.
    trap = TabularMDP.from_arrays(
        [[[0, 0.5, 0.5]], [[0, 1, 0]], [[0, 0, 1]]], [[1.0], [0.0], [0.0]], [1, 0, 0], [False, False, True]
    )
    np.testing.assert_array_equal(endless_states(trap), [1])
    with pytest.raises(ValueError, match="from state 1 no episode"):
        QLearning(TabularEnv(trap), 1.0)
    QLearning(TabularEnv(trap), 1.0, max_episode_steps=10).learn(1, progress=False)
    # What cannot be reached does not matter.
    elsewhere = TabularMDP.from_arrays([[[0, 1, 0]], [[0, 1, 0]], [[0, 0, 1]]], np.ones((3, 1)), [1, 0, 0], [0, 1, 0])
    assert endless_states(elsewhere).size == 0


def test_time_limits_are_found_in_all_wrappers():
    env = gymnasium.wrappers.TimeLimit(gymnasium.make("aligngym/GridWorld-v0", max_episode_steps=30), 50)
    assert time_limit(env) == 30
    assert time_limit(gymnasium.wrappers.TimeLimit(env, 20)) == 20
    assert time_limit(GridWorld()) == np.inf
