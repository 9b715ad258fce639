import gymnasium
import numpy as np
import pytest
import torch

from aligngym.agents import MCPrediction, PolicyEvaluation
from aligngym.agents.prediction import Episode
from aligngym.agents.td_lambda import (
    OfflineLambdaReturn,
    TDLambda,
    lambda_returns,
    sweep_targets,
    sweep_traces,
)
from aligngym.agents.td_prediction import TD0, NStepTD, TDPrediction, sweep_n_step, sweep_td0
from aligngym.core.advantages import gae
from aligngym.core.compilation import interpreted
from aligngym.core.schedules import Constant, Power
from aligngym.envs.grid_world import GridWorld
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP

ALGORITHMS = [
    (TD0, {}),
    (NStepTD, {"steps": 3}),
    (OfflineLambdaReturn, {"trace_decay": 0.7}),
    (TDLambda, {"trace_decay": 0.7}),
    (TDLambda, {"trace_decay": 0.7, "traces": "replacing"}),
    (TDLambda, {"trace_decay": 0.7, "online": False}),
]


def random_walk(size, left, right):
    """``size`` states in a row between two terminal ones; S&B, examples 6.2 and 7.1."""
    transitions, rewards = np.zeros((size + 2, 2, size + 2)), np.zeros((size + 2, 2, size + 2))
    for state in range(1, size + 1):
        transitions[state, 0, state - 1] = transitions[state, 1, state + 1] = 1
    transitions[0, :, 0] = transitions[-1, :, -1] = 1
    rewards[1, 0, 0], rewards[size, 1, size + 1] = left, right
    ends = np.isin(np.arange(size + 2), (0, size + 1))
    initial = np.arange(size + 2) == (size + 1) // 2
    return TabularEnv(TabularMDP.from_arrays(transitions, rewards, initial, ends))


def random_task(states=6, actions=2, seed=0):
    """A task without end, and a policy."""
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(states, 0.5), size=(states, actions))
    mdp = TabularMDP.from_arrays(transitions, generator.normal(size=(states, actions)))
    return TabularEnv(mdp), generator.dirichlet(np.ones(actions), size=states)


def uniform(env):
    return np.full(env.mdp.rewards.shape, 1 / env.mdp.num_actions)


def upper_limit(samples):
    """The upper end of a 99.9 % confidence interval of the mean."""
    return np.mean(samples) + 3.3 * np.std(samples, ddof=1) / np.sqrt(len(samples))


class Scripted(gymnasium.Env):
    """Two steps with given rewards through states 0, 1, 2, and then an end of the given kind."""

    observation_space = gymnasium.spaces.Discrete(3)
    action_space = gymnasium.spaces.Discrete(1)

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


class Hidden(gymnasium.Wrapper):
    """A wrapper that changes nothing, but that the model is not sampled through."""


# One episode, by hand: V = (1, 3, 8), rewards 1 and 2, γ = 1/2, α = 1/10.
@pytest.mark.parametrize("truncates", [True, False])
def test_one_episode_by_hand_truncation_bootstraps_and_termination_does_not(truncates):
    end = 8.0 if truncates else 0.0

    def learned(algorithm, **options):
        agent = algorithm(Scripted(truncates), np.ones((3, 1)), 0.5, 0.1, **options)
        agent.values[:] = [1.0, 3.0, 8.0]
        agent.learn(1, progress=False)
        np.testing.assert_array_equal(agent.visits, [1, 1, 0])
        return agent.values

    second = 3 + 0.1 * (2 + 0.5 * end - 3)
    long = 1 + 0.1 * (1 + 0.5 * (2 + 0.5 * end) - 1)
    np.testing.assert_allclose(learned(TD0), [1 + 0.1 * (1 + 0.5 * 3 - 1), second, 8])
    np.testing.assert_allclose(learned(NStepTD, steps=2), [long, second, 8])
    np.testing.assert_allclose(learned(NStepTD, steps=9), [long, second, 8])
    np.testing.assert_allclose(learned(OfflineLambdaReturn, trace_decay=1), [long, second, 8])
    mixed = 1 + 0.1 * (1 + 0.5 * (0.6 * 3 + 0.4 * (2 + 0.5 * end)) - 1)
    np.testing.assert_allclose(learned(OfflineLambdaReturn, trace_decay=0.4), [mixed, second, 8])
    np.testing.assert_allclose(learned(TDLambda, trace_decay=0.4), [mixed, second, 8])


def test_the_exact_values_of_the_five_state_walk_are_sixths():
    # R. Sutton and A. Barto, 2nd ed., example 6.2.
    env = random_walk(5, 0.0, 1.0)
    agent = TD0(env, uniform(env), 1.0)
    np.testing.assert_allclose(agent.exact_values, np.array([0, 1, 2, 3, 4, 5, 0]) / 6, atol=1e-12)
    assert agent.rms_error() == pytest.approx(np.sqrt(np.mean((np.arange(1, 6) / 6) ** 2)))
    assert agent.rms_error([0, 0, 0, 1, 0, 0, 0]) == pytest.approx(0.5)
    assert TD0(Scripted(False), np.ones((3, 1)), 1.0).rms_error() is None


@pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS)
def test_every_algorithm_converges_to_the_exact_values(algorithm, options):
    env = random_walk(5, 0.0, 1.0)
    agents = [algorithm(env, uniform(env), 1.0, Power(exponent=0.7), seed=seed, **options) for seed in range(6)]
    assert agents[0].step_size.is_robbins_monro
    errors = [agent.learn(200, progress=False).rms_error() for agent in agents]
    # The exact values span 2/3. Six runs, in standard errors of their mean.
    assert upper_limit(errors) < 0.12


@pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS[:-1])
def test_without_an_end_values_come_from_bootstrapping(algorithm, options):
    env, policy = random_task()
    agents = [algorithm(env, policy, 0.7, seed=seed, max_episode_steps=4000, **options) for seed in range(6)]
    starts = [agent.learn(1, progress=False).rms_error() for agent in agents]
    ends = [agent.learn(9, progress=False).rms_error() for agent in agents]
    assert agents[0].visits.sum() == 40_000
    assert upper_limit(ends) < 0.1
    assert np.mean(ends) < np.mean(starts) / 2


def test_a_constant_step_size_hovers():
    # The noise of the targets keeps coming in: ten times the data does not reduce the error, a smaller α does.
    env, policy = random_task()

    def error(step_size, episodes):
        agents = [TD0(env, policy, 0.7, step_size, seed=seed, max_episode_steps=4000) for seed in range(8)]
        return np.mean([agent.learn(episodes, progress=False).rms_error() for agent in agents])

    early, late, small, vanishing = error(0.2, 1), error(0.2, 10), error(0.02, 10), error(Power(exponent=0.8), 10)
    assert abs(late / early - 1) < 0.4
    assert late > 2 * small
    assert small > 1.5 * vanishing


def test_the_errors_of_figure_7_2():
    # R. Sutton and A. Barto, 2nd ed., figure 7.2: 19 states, mean error of the first 10 episodes, 100 repetitions. The
    # flat line of no learning is √0.3; the best curves touch about 0.34 (n = 1, α = 0.8) and 0.26 (n = 4, α = 0.4).
    env = random_walk(19, -1.0, 1.0)
    player = NStepTD(env, uniform(env), 1.0)
    runs = [[player.play(np.random.default_rng([seed, number])) for number in range(10)] for seed in range(100)]

    def errors(steps, step_size):
        means = []
        for episodes in runs:
            agent, after = NStepTD(env, uniform(env), 1.0, step_size, steps=steps), []
            for episode in episodes:
                agent.update(episode)
                after.append(np.sqrt(np.mean((agent.values - player.exact_values)[1:-1] ** 2)))
            means.append(np.mean(after))
        return np.mean(means), np.std(means, ddof=1) / 10

    assert player.rms_error() == pytest.approx(np.sqrt(0.3))
    for steps, step_size, expected in ((1, 0.8, 0.344), (4, 0.4, 0.262)):
        mean, standard_error = errors(steps, step_size)
        assert abs(mean - expected) < 3.3 * standard_error + 0.001
        assert standard_error < 0.01


def test_n_step_td_is_the_pseudocode_of_the_book():
    # R. Sutton and A. Barto, 2nd ed., section 7.1, the box "n-step TD for estimating V".
    env = random_walk(9, -1.0, 1.0)
    steps, step_size, discount = 3, 0.3, 0.9
    agent = NStepTD(env, uniform(env), discount, step_size, steps=steps)
    values = np.zeros(11)
    for episode in range(20):
        played = agent.play(np.random.default_rng([0, episode]))
        agent.learn(1, progress=False)
        end = len(played.rewards)
        for time in range(end + steps):
            tau = time - steps + 1
            if 0 <= tau < end:
                span = range(tau + 1, min(tau + steps, end) + 1)
                target = sum(discount ** (i - tau - 1) * played.rewards[i - 1] for i in span)
                if tau + steps < end:
                    target += discount**steps * values[played.states[tau + steps]]
                values[played.states[tau]] += step_size * (target - values[played.states[tau]])
    np.testing.assert_allclose(agent.values, values, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("step_size", [0.3, Power(exponent=0.6)])
def test_the_ends_of_the_range_are_td_and_monte_carlo(step_size):
    env = GridWorld("S.F\n.#.\n..G", slip=0.3)

    def learned(algorithm, **options):
        return algorithm(env, uniform(env), 0.9, step_size, seed=3, **options).learn(50, progress=False).values

    td0 = learned(TD0)
    np.testing.assert_array_equal(learned(NStepTD, steps=1), td0)
    np.testing.assert_array_equal(learned(TDLambda, trace_decay=0.0), td0)
    # Every-visit Monte Carlo.
    agent, values, visits = TD0(env, uniform(env), 0.9, seed=3), np.zeros(8), np.zeros(8, int)
    schedule = step_size if isinstance(step_size, Power) else Constant(step_size)
    for number in range(50):
        episode = agent.play(np.random.default_rng([3, number]))
        assert episode.terminated
        for time, state in enumerate(episode.states[:-1]):
            result = sum(0.9**k * reward for k, reward in enumerate(episode.rewards[time:]))
            values[state] += schedule(visits[state]) * (result - values[state])
            visits[state] += 1
    np.testing.assert_allclose(learned(OfflineLambdaReturn, trace_decay=1.0), values, rtol=1e-12)
    np.testing.assert_allclose(learned(NStepTD, steps=10_000), values, rtol=1e-12)


@pytest.mark.parametrize("trace_decay", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("terminated", [True, False])
def test_forward_and_backward_view_make_the_same_offline_updates(trace_decay, terminated):
    # R. Sutton and A. Barto, 1st ed., section 7.4, with a step size of its own for every visit.
    generator = np.random.default_rng(5)
    env, policy = random_task(states=5)
    states = generator.integers(5, size=41)
    episode = Episode(states, np.zeros(40, int), generator.normal(size=40), terminated)
    agent = TDLambda(env, policy, 0.9, Power(0.5, 0.7), trace_decay=trace_decay, online=False, max_episode_steps=99)
    before = generator.normal(size=5)
    agent.values[:] = before
    agent.update(episode)
    returns = lambda_returns(before[states], episode.rewards, episode.discounts(0.9), trace_decay)
    changes, seen = np.zeros(5), np.zeros(5, int)
    for time, state in enumerate(states[:-1]):
        changes[state] += Power(0.5, 0.7)(seen[state]) * (returns[time] - before[state])
        seen[state] += 1
    np.testing.assert_allclose(agent.values, before + changes, rtol=1e-12)


def test_the_lambda_return_is_the_mean_of_n_step_returns_and_gae_plus_value():
    generator = np.random.default_rng(0)
    values, rewards = generator.normal(size=9), generator.normal(size=8)
    discounts, trace_decay = np.full(8, 0.9), 0.6
    returns = lambda_returns(values, rewards, discounts, trace_decay)
    for time in range(8):
        by_length = [
            sum(0.9**k * rewards[time + k] for k in range(n)) + 0.9**n * values[time + n] for n in range(1, 9 - time)
        ]
        weights = (1 - trace_decay) * trace_decay ** np.arange(8 - time)
        weights[-1] = trace_decay ** (7 - time)
        assert returns[time] == pytest.approx(weights @ by_length)
    rows = [torch.tensor(row)[None] for row in (rewards, values[:-1], values[1:])]
    advantages = gae(*rows, torch.zeros(1, 8, dtype=bool), torch.zeros(1, 8, dtype=bool), 0.9, trace_decay)
    np.testing.assert_allclose(returns, advantages[0].numpy() + values[:-1])


def test_replacing_traces_by_hand():
    # State 0 is visited twice, then the end pays 1. With γλ = 1/2: traces α + α/2 = 0.15, or α = 0.1 if replaced.
    env = GridWorld("SG")
    episode = Episode(np.array([0, 0, 1]), np.zeros(2, int), np.array([0.0, 1.0]), True)
    for traces, expected in (("accumulating", 0.15), ("replacing", 0.1)):
        agent = TDLambda(env, uniform(env), 1.0, 0.1, trace_decay=0.5, traces=traces)
        agent.update(episode)
        assert agent.values[0] == pytest.approx(expected)


def test_batches_of_example_6_4():
    # R. Sutton and A. Barto, 2nd ed., example 6.4: A,0,B,0; six times B,1; B,0. Batch TD(0) says V(A) = V(B) = 3/4,
    # batch Monte Carlo V(A) = 0. Over and over again with a small step size, that is where they go.
    def batch(*rewards):
        return Episode(np.arange(3)[2 - len(rewards) :], np.zeros(len(rewards), int), np.array(rewards), True)

    episodes = [batch(0.0, 0.0), *[batch(1.0)] * 6, batch(0.0)]
    for algorithm, options, expected in ((TD0, {}, 0.75), (OfflineLambdaReturn, {"trace_decay": 1.0}, 0.0)):
        agent = algorithm(Scripted(False), np.ones((3, 1)), 1.0, 0.01, **options)
        for _ in range(500):
            for episode in episodes:
                agent.update(episode)
        np.testing.assert_allclose(agent.values[:2], [expected, 0.75], atol=0.02)


@pytest.mark.parametrize("limit", [None, 7])
def test_the_compiled_path_plays_what_the_environment_plays(limit):
    env = GridWorld("S.F\n.#S\nS.G", slip=0.2, step_reward=-0.1)
    if limit:
        env = gymnasium.wrappers.TimeLimit(env, limit)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), size=8)
    policy[3] = [0, 0.5, 0, 0.5]
    fast, slow = TD0(env, policy, 0.9, seed=4), TD0(Hidden(env), policy, 0.9, seed=4)
    for number in range(60):
        one, other = (agent.play(np.random.default_rng([4, number])) for agent in (fast, slow))
        for name in ("states", "actions", "rewards", "terminated"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert len(one.rewards) <= (limit or 10**9)
        assert one.terminated == (one.states[-1] == 7)
        assert not np.isin(one.actions[one.states[:-1] == 3], [0, 2]).any()
    assert fast.learn(30, progress=False).values.tolist() == slow.learn(30, progress=False).values.tolist()


def test_the_policy_is_played_as_it_is_written():
    env, policy = random_task(states=4, actions=3, seed=2)
    episode = TD0(env, policy, 0.9, max_episode_steps=60_000).play(np.random.default_rng(0))
    for state in range(4):
        taken = episode.actions[episode.states[:-1] == state]
        # Hoeffding for three frequencies, wrong with probability 1e-6.
        bound = np.sqrt(np.log(6 / 1e-6) / (2 * len(taken)))
        np.testing.assert_allclose(np.bincount(taken, minlength=3) / len(taken), policy[state], atol=bound)


def test_compiled_sweeps_are_the_python_ones():
    generator = np.random.default_rng(1)
    states, rewards, step_sizes = generator.integers(4, size=31), generator.normal(size=30), generator.random(30)
    discounts, start = np.full(30, 0.9), generator.normal(size=4)

    def both(function, *rest, copies=1):
        results = []
        for run in (function, interpreted(function)):
            values = start.copy()
            run(*[values] * copies, states, *rest)
            results.append(values)
        np.testing.assert_array_equal(*results)
        assert (results[0] != start).all()

    both(sweep_td0, rewards, discounts, step_sizes)
    both(sweep_n_step, rewards, discounts, step_sizes, 4)
    both(sweep_targets, rewards, step_sizes)
    both(sweep_traces, rewards, discounts, step_sizes, 0.5, False, copies=2)
    both(sweep_traces, rewards, discounts, step_sizes, 0.5, True, copies=2)
    rest = (start[states], rewards, discounts, 0.3)
    np.testing.assert_array_equal(lambda_returns(*rest), interpreted(lambda_returns)(*rest))


@pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS)
def test_a_saved_learner_continues_bit_for_bit(tmp_path, algorithm, options):
    env = GridWorld("S.F\n.#.\n..G", slip=0.2)

    def make(seed=7):
        return algorithm(env, uniform(env), 0.9, seed=seed, **options)

    through, halfway = make().learn(30, progress=False), make().learn(12, progress=False)
    halfway.save(tmp_path / "table.safetensors")
    resumed = make().load(tmp_path / "table.safetensors").learn(18, progress=False)
    np.testing.assert_array_equal(resumed.values, through.values)
    np.testing.assert_array_equal(resumed.visits, through.visits)
    assert resumed.iteration == 30
    assert (make(seed=8).learn(30, progress=False).values != through.values).any()
    with pytest.raises(ValueError, match="values of 8 states, and this table has 2"):
        algorithm(GridWorld("SG"), np.full((2, 4), 0.25), 0.9, **options).load(tmp_path / "table.safetensors")


def test_the_agent_acts_by_the_policy_and_is_judged_by_it():
    env = random_walk(5, 0.0, 1.0)
    agent = TD0(env, np.tile([0.25, 0.75], (7, 1)), 1.0)
    np.testing.assert_array_equal(agent.policy, np.tile([0.25, 0.75], (7, 1)))
    assert agent.act([1, 2]).tolist() == [1, 1]
    judged = agent.evaluate(env, episodes=2000, greedy=False)
    assert abs(judged["return"] - agent.exact_values[3]) < 4 * judged["return_standard_error"]


def test_a_state_that_the_model_has_and_the_environment_does_not_show():
    # Taxi's model has a terminal state of its own, state 500.
    env = gymnasium.make("Taxi-v4")
    agent = TD0(env, np.full((500, 6), 1 / 6), 0.9)
    assert agent.model.num_states == 501
    assert agent.exact_values.shape == (500,)
    assert agent.rms_error() == pytest.approx(np.sqrt(np.mean(agent.exact_values**2)))


def test_a_new_algorithm_is_one_method():
    class EveryVisitMean(TDPrediction):
        """The target is the return; Monte Carlo with α = 1 / n is the mean of all returns."""

        def sweep(self, values, states, rewards, discounts, step_sizes):
            result = 0.0
            for t in reversed(range(len(rewards))):
                result = rewards[t] + discounts[t] * result
                values[states[t]] += step_sizes[t] * (result - values[states[t]])

    env = random_walk(5, 0.0, 1.0)
    agent = EveryVisitMean(env, uniform(env), 1.0, Power(), seed=1).learn(1500, progress=False)
    # A return is 0 or 1, but visits of one episode share it.
    np.testing.assert_allclose(agent.values[1:-1], np.arange(1, 6) / 6, atol=0.06)


def test_bad_arguments_are_refused():
    env = GridWorld("SG")
    good = uniform(env)
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*\(2, 4\)"):
        TD0(env, np.ones((2, 3)) / 3, 0.9)
    with pytest.raises(ValueError, match=r"policy, state 1: .* no distribution"):
        TD0(env, [[0.25] * 4, [0.5, 0.5, 0.5, -0.5]], 0.9)
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        TD0(env, good, 1.5)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        TD0(env, good, 0.9, max_episode_steps=0)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        NStepTD(env, good, 0.9, steps=0)
    for algorithm in (TDLambda, OfflineLambdaReturn):
        with pytest.raises(ValueError, match=r"λ of TD\(λ\), between 0 and 1, not 1\.1"):
            algorithm(env, good, 0.9, trace_decay=1.1)
    with pytest.raises(ValueError, match="'accumulating' or 'replacing', not 'dutch'"):
        TDLambda(env, good, 0.9, traces="dutch")
    with pytest.raises(TypeError, match="discrete observations"):
        TD0(gymnasium.make("CartPole-v1"), good, 0.9)


def test_a_task_that_never_ends_is_refused_or_cut():
    env, policy = random_task()
    with pytest.raises(ValueError, match="never end from there: a discount of 1 gives no finite value"):
        TD0(env, policy, 1.0, max_episode_steps=100)
    with pytest.raises(ValueError, match="cut them, with max_episode_steps"):
        TD0(env, policy, 0.9)
    assert TD0(env, policy, 0.9, max_episode_steps=100).iterate()["length"] == 100
    assert TD0(gymnasium.wrappers.TimeLimit(env, 50), policy, 0.9, max_episode_steps=100).iterate()["length"] == 50
    # It is the policy that decides: always up, this grid never ends.
    with pytest.raises(ValueError, match="state 0 and never end"):
        TD0(GridWorld("S\nG"), np.tile([1.0, 0, 0, 0], (2, 1)), 1.0)
    TD0(GridWorld("S\nG"), np.tile([0.5, 0, 0.5, 0], (2, 1)), 1.0)


@pytest.mark.parametrize("kind", [TD0, MCPrediction, PolicyEvaluation])
def test_a_given_policy_is_played_as_it_is_and_not_greedily(kind):
    # Right with probability 0.6: greedily it would take one step, and it takes 1 / 0.6 of them in the mean.
    corridor = TabularEnv(
        TabularMDP.from_arrays([[[1, 0], [0, 1]], [[0, 1], [0, 1]]], -np.ones((2, 2)), [1, 0], [0, 1])
    )
    agent = kind(corridor, [[0.4, 0.6], [0.5, 0.5]], 1.0)
    played = agent.evaluate(corridor, episodes=2000)
    assert played["return"] == pytest.approx(-1 / 0.6, abs=5 * played["return_standard_error"])
    assert played["return_standard_error"] < 0.05
