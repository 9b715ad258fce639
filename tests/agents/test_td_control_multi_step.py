"""n-step methods and traces against their definitions, computed the slow way from recorded episodes."""

import gymnasium
import numpy as np
import pytest
from scipy import stats

from aligngym.agents.eligibility_traces import SarsaLambda
from aligngym.agents.n_step import NStepExpectedSarsa, NStepSarsa, TreeBackup
from aligngym.agents.temporal_difference import ExpectedSarsa, Sarsa
from aligngym.core.schedules import Power
from aligngym.envs import GridWorld

DISCOUNT = 0.9


class Path(gymnasium.Env):
    """A given sequence of states and rewards, whatever the actions; it remembers those."""

    observation_space = gymnasium.spaces.Discrete(4)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, states, rewards, truncates):
        self.states, self.rewards, self.truncates, self.actions = states, rewards, truncates, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.states[0], {}

    def step(self, action):
        self.actions.append(action)
        self.time += 1
        over = self.time == len(self.rewards)
        return self.states[self.time], self.rewards[self.time - 1], over and not self.truncates, over, {}


def random_path(seed, truncates, length=12):
    generator = np.random.default_rng(seed)
    states, rewards = generator.integers(4, size=length + 1).tolist(), generator.normal(size=length).tolist()
    return Path(states, rewards, truncates), generator.normal(size=(4, 3))


def one_episode(kind, path, start, **options):
    """Learn from a path, beginning with given values; return the agent and the actions, one more than steps."""
    agent = kind(path, DISCOUNT, **options)
    drawn, explore = [], agent.explore

    def remember(*arguments):
        drawn.append(explore(*arguments))
        return drawn[-1]

    agent.explore = remember
    agent.action_values[:] = start
    agent.iterate()
    assert drawn[:-1] == path.actions
    return agent, drawn


def soft_policy(values, epsilon):
    greedy = values == values.max()
    return epsilon / len(values) + (1 - epsilon) * greedy / greedy.sum()


def n_step_return(values, path, actions, first, last, kind, epsilon):
    """G of the step at ``first`` when everything up to state ``last`` is known: Sutton and Barto, chapter 7."""
    length = len(path.rewards)
    ended = last == length and not path.truncates
    state, action = path.states[last], actions[last]
    expected = soft_policy(values[state], epsilon) @ values[state]
    if kind is TreeBackup:
        # Equation 7.16, from the end: the leaves of the tree keep their values.
        result = path.rewards[last - 1] + DISCOUNT * (0.0 if ended else expected)
        for t in range(last - 1, first, -1):
            policy, taken = soft_policy(values[path.states[t]], epsilon), actions[t]
            others = sum(policy[a] * values[path.states[t], a] for a in range(3) if a != taken)
            result = path.rewards[t - 1] + DISCOUNT * (others + policy[taken] * result)
        return result
    result = sum(DISCOUNT ** (t - first) * path.rewards[t] for t in range(first, last))
    bootstrap = values[state, action] if kind is NStepSarsa else expected
    return result + (0.0 if ended else DISCOUNT ** (last - first) * bootstrap)


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 12, 50])
@pytest.mark.parametrize("kind", [NStepSarsa, NStepExpectedSarsa, TreeBackup])
def test_an_episode_is_learned_from_as_defined(kind, n, truncates):
    path, start = random_path(n, truncates)
    agent, actions = one_episode(kind, path, start, n=n, step_size=Power(0.5, exponent=0.5), epsilon=0.4, seed=n)
    values, visits, length = start.copy(), np.zeros((4, 3), int), len(path.rewards)
    for first in range(length):
        pair, last = (path.states[first], actions[first]), min(first + n, length)
        target = n_step_return(values, path, actions, first, last, kind, 0.4)
        values[pair] += 0.5 * (1 + visits[pair]) ** -0.5 * (target - values[pair])
        visits[pair] += 1
    np.testing.assert_allclose(agent.action_values, values, atol=1e-12)
    np.testing.assert_array_equal(agent.visits, visits)


@pytest.mark.parametrize(
    ("kind", "one_step", "options"),
    [
        (NStepSarsa, Sarsa, {"n": 1}),
        (NStepExpectedSarsa, ExpectedSarsa, {"n": 1}),
        (TreeBackup, ExpectedSarsa, {"n": 1}),
        (SarsaLambda, Sarsa, {"trace": 0.0}),
        (SarsaLambda, Sarsa, {"trace": 0.0, "traces": "replacing"}),
    ],
)
def test_one_step_is_the_one_step_method_bit_for_bit(kind, one_step, options):
    env = GridWorld("S..\n.#F\n..G", slip=0.2)
    common = {"epsilon": 0.3, "seed": 3, "max_episode_steps": 30}
    ours = kind(env, DISCOUNT, **options, **common).learn(20, progress=False)
    theirs = one_step(env, DISCOUNT, **common).learn(20, progress=False)
    np.testing.assert_array_equal(ours.action_values, theirs.action_values)
    np.testing.assert_array_equal(ours.visits, theirs.visits)


def lambda_return(values, path, actions, first, horizon, trace):
    """G^λ of the step at ``first`` with the data up to ``horizon``; ``values[t]`` is the table at time t (12.18)."""
    total, weight = 0.0, 1.0
    for last in range(first + 1, horizon + 1):
        share = weight * (1 - trace) if last < horizon else weight
        total += share * n_step_return(values[last - 1], path, actions, first, last, NStepSarsa, 0.0)
        weight *= trace
    return total


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("trace", [0.0, 0.3, 0.8, 1.0])
def test_dutch_traces_are_exactly_the_online_lambda_return_method(trace, truncates):
    path, start = random_path(3, truncates)
    agent, actions = one_episode(
        SarsaLambda, path, start, trace=trace, traces="dutch", step_size=Power(0.5, exponent=0.5), epsilon=0.4
    )
    # Section 12.3: at every horizon all updates are done again from the start, with the returns known by then.
    tables = [start.copy()]
    for horizon in range(1, len(path.rewards) + 1):
        values, visits = start.copy(), np.zeros((4, 3), int)
        for first in range(horizon):
            pair = path.states[first], actions[first]
            target = lambda_return(tables, path, actions, first, horizon, trace)
            values[pair] += 0.5 * (1 + visits[pair]) ** -0.5 * (target - values[pair])
            visits[pair] += 1
        tables.append(values)
    np.testing.assert_allclose(agent.action_values, tables[-1], atol=1e-12)
    np.testing.assert_array_equal(agent.visits, visits)


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("trace", [0.0, 0.5, 1.0])
def test_accumulating_traces_are_the_forward_view_for_small_steps(trace, truncates):
    path, start = random_path(5, truncates)
    agent, actions = one_episode(SarsaLambda, path, start, trace=trace, step_size=1e-7, epsilon=0.4)
    change, tables = np.zeros((4, 3)), [start] * len(path.rewards)
    for first in range(len(path.rewards)):
        pair = path.states[first], actions[first]
        change[pair] += lambda_return(tables, path, actions, first, len(path.rewards), trace) - start[pair]
    np.testing.assert_allclose((agent.action_values - start) / 1e-7, change, atol=1e-4)
    assert (change != 0).sum() >= 5


@pytest.mark.parametrize(
    ("kind", "options"),
    [(NStepSarsa, {"n": 5}), (SarsaLambda, {}), (SarsaLambda, {"traces": "dutch"})],
)
@pytest.mark.parametrize("interrupted", [True, False])
def test_nothing_but_the_table_is_left_of_an_episode(kind, options, interrupted):
    path, start = random_path(8, truncates=True)
    agent = kind(path, DISCOUNT, step_size=0.3, epsilon=0.4, **options)
    agent.action_values[:] = start
    rewards, path.rewards = path.rewards, [*path.rewards[:7], None, 0.0] if interrupted else path.rewards
    try:
        agent.iterate()
    except TypeError:
        assert interrupted
    path.rewards, path.actions = rewards, []
    table = agent.action_values.copy()
    fresh, _ = one_episode(kind, path, table, step_size=0.3, epsilon=0.4, **options)
    agent.iterate()
    assert (table != start).any()
    np.testing.assert_array_equal(agent.action_values, fresh.action_values)


def test_replacing_traces_by_hand():
    # State 0 twice, then 1; one action only matters, so ε = 0 and its values are the largest.
    path = Path([0, 0, 1, 2], [1.0, 2.0, 4.0], truncates=False)
    start = np.array([[1.0, 0, 0], [2.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    results = {}
    for traces in ("replacing", "accumulating"):
        path.actions.clear()
        agent, _ = one_episode(SarsaLambda, path, start, trace=0.5, traces=traces, step_size=0.1, epsilon=0.0)
        results[traces] = agent.action_values[:2, 0]
    decay = DISCOUNT * 0.5
    for traces, second in (("replacing", 0.1), ("accumulating", 0.1 + 0.1 * decay)):
        v0, v1 = 1.0, 2.0
        v0 += 0.1 * (1.0 + DISCOUNT * v0 - v0)
        v0 += second * (2.0 + DISCOUNT * v1 - v0)
        error = 4.0 - v1
        np.testing.assert_allclose(results[traces], [v0 + second * decay * error, v1 + 0.1 * error], atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "options", "bound"),
    [
        (NStepSarsa, {"n": 3}, 0.5),
        (SarsaLambda, {"trace": 0.6}, 0.5),
        (SarsaLambda, {"trace": 0.6, "traces": "replacing"}, 0.5),
        (SarsaLambda, {"trace": 0.6, "traces": "dutch"}, 0.5),
        (TreeBackup, {"n": 3, "epsilon": 0.0}, 0.25),
    ],
)
def test_they_converge_to_the_exact_values(kind, options, bound):
    env = GridWorld("..F\n.#.\n..G", slip=0.2, step_reward=-0.1)
    behaviour = np.full((8, 4), 0.25)
    exact = env.mdp.action_values(env.mdp.evaluate(behaviour, 0.8), 0.8)
    if kind is TreeBackup:
        # Off-policy: it learns the optimal values from random actions.
        for _ in range(200):
            exact = env.mdp.action_values(exact.max(axis=1), 0.8)
    errors = []
    for seed in range(4):
        agent = kind(
            env,
            0.8,
            step_size=Power(exponent=0.7),
            seed=seed,
            behaviour=behaviour,
            episodes_per_iteration=600,
            **options,
        ).learn(1, progress=False)
        errors.append(np.abs(agent.action_values - exact)[:7].max())
    # 600 episodes, about 12,000 steps; values span 3. The upper 99 % bound of the mean error over seeds.
    assert np.mean(errors) + stats.t.ppf(0.99, 3) * stats.sem(errors) < bound


def test_bad_arguments_are_refused():
    env = GridWorld("S.G")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        NStepSarsa(env, 0.9, n=0)
    with pytest.raises(ValueError, match="take TreeBackup instead"):
        NStepExpectedSarsa(env, 0.9, n=2, behaviour=np.full((3, 4), 0.25))
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        SarsaLambda(env, 0.9, trace=1.5)
    with pytest.raises(ValueError, match="not 'slow'"):
        SarsaLambda(env, 0.9, traces="slow")
