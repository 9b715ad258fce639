import numpy as np
import pytest
from scipy import stats

from aligngym.agents import off_policy_monte_carlo as module
from aligngym.agents.dynamic_programming import PolicyIteration
from aligngym.agents.episodes import Episodes
from aligngym.agents.monte_carlo import MCPrediction
from aligngym.agents.off_policy_monte_carlo import OffPolicyMCControl, OffPolicyMCPrediction, importance_ratios
from aligngym.core.compilation import interpreted
from aligngym.envs import GridWorld, TabularEnv, TabularMDP

SLIPPERY = {"map": "..F\n.#.\n..G", "slip": 0.2, "step_reward": -0.1}


def sutton_barto_figure_5_4():
    """One state: left stays with 0.9, and ends with a reward of 1 otherwise; right ends with nothing (example 5.5)."""
    transitions = [[[0.9, 0.1], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]
    rewards = np.zeros((2, 2, 2))
    rewards[0, 0, 1] = 1.0
    env = TabularEnv(TabularMDP.from_arrays(transitions, rewards, terminal=[False, True]))
    return env, np.array([[1.0, 0.0], [1.0, 0.0]]), np.full((2, 2), 0.5)


def short_task(seed=0, reward=0.0):
    """Three states in a row, two actions, random rewards around a mean; a target and a behaviour that differ."""
    generator = np.random.default_rng(seed)
    transitions = np.zeros((4, 2, 4))
    for state in range(3):
        transitions[state, :, state + 1 :] = generator.dirichlet(np.ones(3 - state), size=2)
    env = TabularEnv(
        TabularMDP.from_arrays(
            transitions, reward + generator.normal(size=(4, 2)), [1.0, 0, 0, 0], [False] * 3 + [True]
        )
    )
    return env, generator.dirichlet([1, 1], size=4), generator.dirichlet([3, 3], size=4)


def two_episodes():
    return Episodes(
        states=np.array([0, 1, 0, 2]),
        actions=np.array([0, 1, 1, 0]),
        rewards=np.array([1.0, 2.0, 4.0, 8.0]),
        offsets=np.array([0, 3, 4]),
        last_states=np.array([3, 3]),
        terminated=np.ones(2, dtype=bool),
    )


def test_ratios_by_hand():
    ratios = np.array([2.0, 3.0, 0.5, 7.0])
    offsets = np.array([0, 3, 4])
    np.testing.assert_allclose(importance_ratios(ratios, offsets), [3.0, 1.5, 0.5, 7.0])
    np.testing.assert_array_equal(importance_ratios(ratios, offsets), interpreted(importance_ratios)(ratios, offsets))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("first_visit", [True, False])
def test_estimates_by_hand(weighted, first_visit):
    env, _, _ = short_task()
    target = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.5, 0.5]])
    agent = OffPolicyMCPrediction(env, target, np.full((4, 2), 0.5), 1.0, weighted, first_visit)
    agent.learn_from(two_episodes())
    # Ratios of the steps are 1.8, 1.2, 0.2 and 1.4; returns of state 0 are 7 and 4.
    ratios, returns = np.array([1.8 * 1.2 * 0.2, 0.2]), np.array([7.0, 4.0])
    if first_visit:
        ratios, returns = ratios[:1], returns[:1]
    expected = ratios @ returns / (ratios.sum() if weighted else len(ratios))
    np.testing.assert_allclose(agent.values[:3], [expected, 6.0 if weighted else 1.44, 8.0 if weighted else 11.2][:3])


def estimates(weighted, episodes, runs, reward=0.0):
    """The estimate of the first state by each of so many runs."""
    env, target, behaviour = short_task(reward=reward)
    agent = OffPolicyMCPrediction(env, target, behaviour, 0.9, weighted, episodes_per_iteration=episodes)
    result = np.zeros(runs)
    for agent.iteration in range(runs):
        agent.table[:], agent.weights[:] = 0, 0
        agent.iterate()
        result[agent.iteration] = agent.values[0]
    return result, agent.exact_values[0], env.mdp.evaluate(behaviour, 0.9)[0]


def test_ordinary_is_unbiased_and_weighted_is_biased_towards_the_behaviour():
    ordinary, exact, of_behaviour = estimates(False, 1, 1500)
    weighted, _, _ = estimates(True, 1, 1500)
    bound = stats.norm.ppf(1 - 1e-5) / 1500**0.5
    assert abs(ordinary.mean() - exact) < bound * ordinary.std()
    # After one episode the weighted estimate is its return, whatever the ratio: the value of the behaviour.
    assert abs(weighted.mean() - of_behaviour) < bound * weighted.std()
    assert abs(exact - of_behaviour) > 2 * bound * weighted.std()


def test_the_bias_of_weighted_vanishes():
    biases = []
    for episodes in (4, 400):
        weighted, exact, of_behaviour = estimates(True, episodes, 300)
        biases.append((weighted.mean() - exact) / (of_behaviour - exact))
    assert 0.05 < biases[0] < 1
    assert abs(biases[1]) < 0.05


def test_weighted_has_the_lower_variance_where_returns_are_far_from_zero():
    # Not always; but the variance of ρ G grows with the mean of G, and that of the weighted mean does not.
    ordinary, weighted = (estimates(weighted, 50, 400, reward=3.0)[0].var(ddof=1) for weighted in (False, True))
    # 400 runs know a variance to 7 %, and the ratio to 10 %.
    assert ordinary > 1.5 * weighted


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("first_visit", [True, False])
def test_both_converge_to_the_exact_values(weighted, first_visit):
    env, target, behaviour = short_task(1)
    values = []
    for seed in range(6):
        agent = OffPolicyMCPrediction(
            env, target, behaviour, 0.9, weighted, first_visit, seed=seed, episodes_per_iteration=1000
        )
        values.append(agent.learn(10, progress=False).values[:3])
    errors = np.std(values, axis=0, ddof=1) / 6**0.5
    assert (np.abs(np.mean(values, axis=0) - agent.exact_values[:3]) < stats.t.ppf(1 - 1e-4, 5) * errors).all()
    assert errors.max() < 0.02


def test_on_the_same_policy_both_are_on_policy_monte_carlo():
    env, target, _ = short_task()
    on_policy = MCPrediction(env, target, 0.9).learn(200, progress=False)
    for weighted in (True, False):
        off_policy = OffPolicyMCPrediction(env, target, target, 0.9, weighted).learn(200, progress=False)
        np.testing.assert_allclose(off_policy.values, on_policy.values, atol=1e-12)


def test_the_variance_of_ordinary_importance_sampling_may_be_infinite():
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., example 5.5: V = 1, weighted importance sampling is 1
    # from the first episode that ends by going left, and the ordinary one has E[(ρ G)²] = 0.1 Σ_k 0.9^k 2^(k + 1) = ∞.
    env, target, behaviour = sutton_barto_figure_5_4()
    weighted = OffPolicyMCPrediction(env, target, behaviour, 1.0, weighted=True, episodes_per_iteration=500)
    assert weighted.learn(1, progress=False).values[0] == 1.0 == pytest.approx(weighted.exact_values[0])
    products, lengths = [], []
    ordinary = OffPolicyMCPrediction(env, target, behaviour, 1.0, weighted=False)
    for ordinary.iteration in range(4000):
        ordinary.table[:], ordinary.weights[:] = 0, 0
        lengths.append(ordinary.iterate()["length"])
        products.append(ordinary.values[0])
    products, lengths = np.array(products), np.array(lengths)
    assert set(products) <= {0.0} | {2.0**length for length in lengths}
    # What episodes of at most k steps contribute to the second moment is known, and grows by 1.8 with every step.
    for steps in (1, 2, 3, 4):
        squares = np.where(lengths <= steps, products, 0) ** 2
        expected = 0.2 * sum(1.8**k for k in range(steps))
        assert abs(squares.mean() - expected) < 4 * squares.std() / 4000**0.5
    # So the estimate goes on jumping: single episodes of the last half still move the mean of thousands.
    means = products.cumsum() / np.arange(1, 4001)
    assert np.abs(np.diff(means[2000:])).max() > 0.01
    assert (products**2).mean() > 3


def test_blackjack_has_the_published_value():
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., example 5.4 and figure 5.3: the value of 13 with a usable
    # ace beside a deuce is −0.27726 for the policy that sticks on 20 and 21 only, learned from random play.
    from aligngym.envs.blackjack import Blackjack

    model = Blackjack().mdp
    start = 22 * 13 + 2 * 2 + 1
    env = TabularEnv(TabularMDP(model.outcomes, np.eye(model.num_states)[start], model.terminal, 2))
    target = np.tile([0.0, 1.0], (model.num_states, 1))
    target[22 * 20 : 22 * 22] = target[704:] = [1.0, 0.0]
    for weighted in (True, False):
        agent = OffPolicyMCPrediction(
            env, target, np.full(target.shape, 0.5), 1.0, weighted, episodes_per_iteration=100_000
        ).learn(1, progress=False)
        assert agent.exact_values[start] == pytest.approx(-0.27726, abs=2e-4)
        # Returns have a standard deviation of about 0.95 and ratios of about 1.2, which costs (1 + 1.2²) in variance.
        assert agent.values[start] == pytest.approx(-0.27726, abs=4 * 0.95 * (2.4 / 100_000) ** 0.5)


def test_control_by_hand():
    env = GridWorld("...G", stay=True)
    agent = OffPolicyMCControl(env, 0.5, behaviour=np.full((4, 5), 0.2))
    # From the left: right with 0, up with 2, right with 4, and right again in the same state with 8.
    agent.learn_from(
        Episodes(
            states=np.array([0, 1, 2, 2]),
            actions=np.array([1, 0, 1, 1]),
            rewards=np.array([0.0, 2.0, 4.0, 8.0]),
            offsets=np.array([0, 4]),
            last_states=np.array([3]),
            terminated=np.array([True]),
        )
    )
    # Weights 1, then 1/0.2 each: Q(2, right) = (8 + 5 · (4 + 4)) / 6, Q(1, up) = 2 + 8/2 is greedy by then.
    expected = np.zeros((4, 5))
    expected[2, 1], expected[1, 0], expected[0, 1] = 8.0, 6.0, 3.0
    np.testing.assert_allclose(agent.action_values, expected)
    weights = np.zeros((4, 5))
    weights[2, 1], weights[1, 0], weights[0, 1] = 6.0, 25.0, 125.0
    np.testing.assert_allclose(agent.weights, weights)
    # Another action than the greedy one is learned from, and nothing before it.
    agent.learn_from(
        Episodes(
            np.array([0, 2]), np.array([1, 0]), np.array([9.0, -1.0]), np.array([0, 2]), np.array([3]), np.ones(1, bool)
        )
    )
    assert agent.action_values[2, 0] == -1
    assert agent.action_values[0, 1] == 3


def test_control_bootstraps_with_the_maximum_where_an_episode_is_cut():
    agent = OffPolicyMCControl(GridWorld("...G"), 0.5)
    agent.table[1] = [1.0, 6.0, 0.0, 0.0]
    agent.learn_from(
        Episodes(np.array([0]), np.array([1]), np.array([2.0]), np.array([0, 1]), np.array([1]), np.zeros(1, bool))
    )
    assert agent.action_values[0, 1] == 5


@pytest.mark.parametrize(
    ("grid", "behaviour", "bound"),
    [
        (SLIPPERY, None, 0.18),
        # Uniform behaviour is slow: only the tails of its episodes, from the last exploring action on, count.
        ({**SLIPPERY, "map": "...\n..G"}, np.full((6, 4), 0.25), 0.25),
    ],
)
def test_control_converges_to_the_exact_optimum(grid, behaviour, bound):
    env = GridWorld(**grid)
    exact = PolicyIteration(env, 0.8).learn(progress=False)
    errors, losses = [], []
    for seed in range(4):
        agent = OffPolicyMCControl(env, 0.8, behaviour, seed=seed, episodes_per_iteration=25)
        agent.learn(500, progress=False)
        errors.append(np.abs(agent.values - exact.values).max())
        losses.append((exact.values - env.mdp.evaluate(agent.policy, 0.8)).max())
    assert np.mean(errors) + stats.t.ppf(0.99, 3) * np.std(errors, ddof=1) / 2 < bound
    assert np.mean(losses) < 0.02


@pytest.mark.parametrize("control", [True, False])
def test_a_saved_learner_continues_bit_for_bit(control, tmp_path):
    def make(seed=3):
        env, policy = GridWorld(slip=0.2), np.full((25, 4), 0.25)
        if control:
            return OffPolicyMCControl(env, 0.9, seed=seed)
        return OffPolicyMCPrediction(env, np.tile([0.1, 0.4, 0.4, 0.1], (25, 1)), policy, 0.9, seed=seed)

    through, halfway = make().learn(20, progress=False), make().learn(8, progress=False)
    halfway.save(tmp_path / "table.safetensors")
    resumed = make().load(tmp_path / "table.safetensors").learn(12, progress=False)
    np.testing.assert_array_equal(resumed.table, through.table)
    np.testing.assert_array_equal(resumed.weights, through.weights)
    assert (make(4).learn(20, progress=False).table != through.table).any()


def test_compiled_loops_are_their_python_selves():
    generator = np.random.default_rng(0)
    states, actions = generator.integers(3, size=40), generator.integers(2, size=40)
    returns, ratios = generator.normal(size=40), generator.integers(3, size=40).astype(float)
    for weighted in (True, False):
        tables = []
        for function in (module._average, interpreted(module._average)):
            table, weights = np.zeros(3), np.zeros(3)
            function(table, weights, states, returns, ratios, weighted)
            tables.append((table, weights))
        np.testing.assert_array_equal(*tables)
    tables = []
    for function in (module._learn_from_tails, interpreted(module._learn_from_tails)):
        table, weights = np.zeros((3, 2)), np.zeros((3, 2))
        function(table, weights, states, actions, returns, np.full(40, 0.5), np.array([0, 20, 40]))
        tables.append((table, weights))
    np.testing.assert_array_equal(*tables)


def test_playing_draws_from_the_target():
    env, target, behaviour = short_task()
    agent = OffPolicyMCPrediction(env, target, behaviour, 1.0)
    result = agent.evaluate(env, episodes=500)
    assert abs(result["return"] - agent.exact_values[0]) < 4 * result["return_standard_error"]
    np.testing.assert_array_equal(agent.policy, target)
    np.testing.assert_array_equal(agent.behaviour, behaviour)


UNIFORM = np.full((25, 4), 0.25)
RIGHT, UP = np.tile([0.0, 1.0, 0.0, 0.0], (25, 1)), np.tile([1.0, 0.0, 0.0, 0.0], (25, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OffPolicyMCPrediction(GridWorld(), UNIFORM, RIGHT, 0.9), "state 0, action 0: .* probability 0.25"),
        (lambda: OffPolicyMCPrediction(GridWorld(), UNIFORM, UNIFORM[:3], 0.9), r"behaviour has shape \(3, 4\)"),
        (lambda: OffPolicyMCPrediction(GridWorld(), UP, UNIFORM, 1.0), "with this policy .* never end"),
        (lambda: OffPolicyMCControl(GridWorld(), 0.9, RIGHT), "state 0, action 0: the behaviour never takes it"),
        (lambda: OffPolicyMCControl(GridWorld(), 0.9, UNIFORM * 2), "is no distribution"),
        (lambda: OffPolicyMCControl(GridWorld(), 0.9, epsilon=0.0), "starts at 0"),
        (lambda: OffPolicyMCControl(GridWorld(), 0.9, epsilon=1.5), "starts at 1.5"),
        (lambda: OffPolicyMCControl(GridWorld(terminal_target=False), 1.0), "discount of 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
