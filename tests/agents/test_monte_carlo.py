import gymnasium
import numpy as np
import pytest
from scipy import stats

from aligngym.agents import episodes as module
from aligngym.agents.episodes import Episodes, play_episodes
from aligngym.agents.monte_carlo import MCPrediction
from aligngym.core.compilation import interpreted
from aligngym.core.schedules import Power
from aligngym.envs import GridWorld, TabularEnv, TabularMDP


def random_walk(states):
    """A walk of so many states between two ends, 1 for the right one. R. Sutton and A. Barto, example 6.2."""
    transitions, rewards = np.zeros((states + 2, 2, states + 2)), np.zeros((states + 2, 2))
    for state in range(1, states + 1):
        transitions[state, 0, state - 1] = transitions[state, 1, state + 1] = 1.0
    rewards[states, 1] = 1.0
    ends = np.isin(np.arange(states + 2), [0, states + 1])
    middle = np.eye(states + 2)[(states + 1) // 2]
    return TabularEnv(TabularMDP.from_arrays(transitions, rewards, middle, ends))


class Plain(gymnasium.Wrapper):
    """A wrapper that nobody can look through, which forces the plain loop."""


def test_an_episode_by_hand():
    # One episode of three steps that terminates, and one of two that is truncated in state 2.
    episodes = Episodes(
        states=np.array([0, 1, 0, 1, 1]),
        actions=np.array([1, 0, 1, 0, 0]),
        rewards=np.array([1.0, 2.0, 4.0, 8.0, 16.0]),
        offsets=np.array([0, 3, 5]),
        last_states=np.array([3, 2]),
        terminated=np.array([True, False]),
    )
    assert len(episodes) == 2
    last_values = np.array([100.0, 10.0])
    np.testing.assert_allclose(episodes.returns(0.5, last_values), [3.0, 4.0, 4.0, 18.5, 21.0])
    assert episodes.visits(episodes.states, first_only=True).tolist() == [1, 0, 3]
    assert episodes.visits(episodes.states, first_only=False).tolist() == [2, 1, 0, 4, 3]
    for first_visit, values, visits in [
        (True, [3.0, (4 + 21) / 2], [1, 2]),
        (False, [(3 + 4) / 2, (4 + 21 + 26) / 3], [2, 3]),
    ]:
        agent = MCPrediction(random_walk(2), np.full((4, 2), 0.5), 0.5, first_visit=first_visit)
        # The present estimate of the state of the truncation.
        agent.table[2] = 20.0
        agent.learn_from(episodes)
        np.testing.assert_allclose(agent.values[:2], values)
        assert agent.visits[:2].tolist() == visits


def test_a_constant_step_size_moves_from_the_end_of_an_episode():
    agent = MCPrediction(random_walk(2), np.full((4, 2), 0.5), 1.0, step_size=0.5, first_visit=False)
    agent.learn_from(
        Episodes(
            np.array([1, 1]), np.zeros(2, int), np.array([4.0, 2.0]), np.array([0, 2]), np.array([3]), np.ones(1, bool)
        )
    )
    # First towards 2, then towards 6.
    assert agent.values[1] == pytest.approx(3.5)


POLICY = np.random.default_rng(1).dirichlet(np.ones(4), size=25)


@pytest.mark.parametrize("limit", [7, 200])
@pytest.mark.parametrize("starts", [None, (np.array([3, 0, 7, 7]), np.array([0, 1, 2, 3]))])
def test_the_compiled_loop_plays_what_the_environment_plays(limit, starts):
    env = GridWorld(".....\n.FF..\n..F..\n.FGF.\n.F...", slip=0.3)
    # A deterministic row, and a policy that rounding leaves short of one.
    policy = POLICY.copy()
    policy[6] = [0, 0, 1, 0]
    policy[7] = [1 / 3 - 1e-10, 1 / 3, 1 / 3, 0]
    played = [
        play_episodes(world, policy, np.random.default_rng(5), limit, 4, starts)
        for world in (env, Plain(env), gymnasium.wrappers.TimeLimit(env, limit), env)
    ]
    for other in played[1:]:
        for name in ("states", "actions", "rewards", "offsets", "last_states", "terminated"):
            np.testing.assert_array_equal(getattr(played[0], name), getattr(other, name))
            assert getattr(played[0], name).dtype.kind == getattr(other, name).dtype.kind
    assert (np.diff(played[0].offsets) <= limit).all()
    if starts is not None:
        np.testing.assert_array_equal(played[0].states[played[0].offsets[:-1]], starts[0])
        np.testing.assert_array_equal(played[0].actions[played[0].offsets[:-1]], starts[1])


def test_a_wrapped_time_limit_truncates():
    env = gymnasium.wrappers.TimeLimit(GridWorld(), 3)
    for world in (env, Plain(env)):
        episodes = play_episodes(world, np.eye(4)[np.zeros(25, int)], np.random.default_rng(0), 100, 2)
        np.testing.assert_array_equal(np.diff(episodes.offsets), [3, 3])
        assert not episodes.terminated.any()


def test_compiled_functions_are_their_python_selves():
    generator = np.random.default_rng(0)
    entries, offsets = generator.integers(5, size=50), np.array([0, 7, 8, 30, 50])
    rewards, last = generator.normal(size=50), generator.normal(size=4)
    for name, arguments in [
        ("_returns", (rewards, offsets, 0.9, last)),
        ("_visits", (entries, offsets, True, 5)),
        ("_visits", (entries, offsets, False, 5)),
        ("draw", (np.array([0.2, 0.0, 0.8]), 0.2)),
    ]:
        function = getattr(module, name)
        np.testing.assert_array_equal(function(*arguments), interpreted(function)(*arguments))


def test_actions_are_drawn_by_their_probabilities():
    probabilities = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    draws = [module.draw(probabilities, uniform) for uniform in (0.0, 0.29, 0.3, 0.31, 0.999)]
    assert draws == [1, 1, 3, 3, 3]
    assert module.draw(np.array([0.5, 0.5 - 1e-10, 0.0]), 1 - 1e-12) == 1


@pytest.mark.parametrize("first_visit", [True, False])
def test_the_random_walk_has_its_published_values(first_visit):
    # R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., example 6.2: 1/6 … 5/6.
    truth = np.arange(1, 6) / 6
    values = []
    for seed in range(8):
        agent = MCPrediction(
            random_walk(5), np.full((7, 2), 0.5), 1.0, first_visit=first_visit, seed=seed, episodes_per_iteration=250
        )
        np.testing.assert_allclose(agent.exact_values[1:-1], truth)
        values.append(agent.learn(10, progress=False).values[1:-1])
    mean, error = np.mean(values, axis=0), np.std(values, axis=0, ddof=1) / np.sqrt(8)
    assert (np.abs(mean - truth) < stats.t.ppf(1 - 1e-4, 7) * error).all()
    # A first-visit return is 0 or 1: standard deviation √(p (1 − p)), at most 2,500 of them for the middle state.
    if first_visit:
        assert agent.visits[3] == 2500
        assert np.abs(np.array(values)[:, 2] - 0.5).max() < stats.norm.ppf(1 - 1e-6) * 0.5 / 50


def test_the_first_visit_is_unbiased_and_every_visit_is_biased_as_theory_says():
    # One state that repeats with probability p, with reward 1 a step: V = 1/(1 − p). Of one episode of T steps, the
    # first visit estimates T, every visit (T + 1)/2 in the mean: E[(T + 1)/2] = (V + 1)/2. S. Singh and R. Sutton,
    # Reinforcement learning with replacing eligibility traces, 1996, theorem 6.
    repeat = 0.75
    env = TabularEnv(
        TabularMDP.from_arrays([[[repeat, 1 - repeat]], [[0.0, 1.0]]], [[1.0], [0.0]], terminal=[False, True])
    )
    for first_visit, mean in [(True, 4.0), (False, 2.5)]:
        agent = MCPrediction(env, np.ones((2, 1)), 1.0, first_visit=first_visit)
        sample = np.zeros(1200)
        for agent.iteration in range(len(sample)):
            agent.table[:], agent.weights[:] = 0, 0
            agent.iterate()
            sample[agent.iteration] = agent.values[0]
        assert abs(sample.mean() - mean) < stats.norm.ppf(1 - 1e-5) * sample.std() / np.sqrt(len(sample))


def test_values_of_a_grid_with_slips():
    env = GridWorld("..F\n.#.\n..G", slip=0.2, step_reward=-0.1)
    policy = np.full((8, 4), 0.25)
    agents = [MCPrediction(env, policy, 0.9, seed=seed, episodes_per_iteration=2000) for seed in range(10)]
    values = np.array([agent.learn(1, progress=False).values for agent in agents])[:, ~env.mdp.terminal]
    misses = np.abs(values.mean(axis=0) - agents[0].exact_values[~env.mdp.terminal])
    errors = values.std(axis=0, ddof=1) / np.sqrt(10)
    assert (misses < stats.t.ppf(1 - 1e-4, 9) * errors).all()
    assert errors.max() < 0.05


def test_truncation_bootstraps_and_so_even_one_step_finds_the_values():
    # Every episode is cut after one step: its return is r + γ V(s'), TD(0), whose fixed point is still V.
    generator = np.random.default_rng(0)
    env = TabularEnv(
        TabularMDP.from_arrays(generator.dirichlet(np.ones(6), size=(6, 2)), generator.normal(size=(6, 2)))
    )
    agent = MCPrediction(
        env, np.full((6, 2), 0.5), 0.6, Power(exponent=0.8), max_episode_steps=1, episodes_per_iteration=1000
    )
    agent.learn(60, progress=False)
    assert agent.iterate()["truncated"] == 1.0
    assert np.abs(agent.values - agent.exact_values).max() < 0.05 < 0.5 < np.abs(agent.exact_values).max()


def test_batches_of_episodes_average_to_the_same():
    def make(count):
        return MCPrediction(random_walk(5), np.full((7, 2), 0.5), 1.0, episodes_per_iteration=count)

    assert make(300).learn(2, progress=False).visits[3] == make(1).learn(600, progress=False).visits[3] == 600
    metrics = make(1000).iterate()
    # The walk from the middle takes 9 steps in the mean, and pays 1 with probability 1/2.
    assert metrics["length"] == pytest.approx(9, abs=1)
    assert metrics["return"] == pytest.approx(0.5, abs=0.08)
    assert metrics["truncated"] == 0


def test_a_saved_predictor_continues_bit_for_bit(tmp_path):
    def make(seed=7):
        return MCPrediction(GridWorld(slip=0.2), POLICY, 0.9, Power(exponent=0.8), seed=seed, max_episode_steps=50)

    through, halfway = make().learn(40, progress=False), make().learn(15, progress=False)
    halfway.save(tmp_path / "table.safetensors")
    resumed = make().load(tmp_path / "table.safetensors").learn(25, progress=False)
    np.testing.assert_array_equal(resumed.values, through.values)
    np.testing.assert_array_equal(resumed.visits, through.visits)
    assert (make(8).learn(40, progress=False).values != through.values).any()
    with pytest.raises(ValueError, match=r"saved table of \(25,\), and this is \(7,\)"):
        MCPrediction(random_walk(5), np.full((7, 2), 0.5), 1.0).load(tmp_path / "table.safetensors")


def test_playing_draws_from_the_policy_that_is_evaluated():
    env = random_walk(5)
    agent = MCPrediction(env, np.full((7, 2), 0.5), 1.0)
    result = agent.evaluate(env, episodes=400)
    # Greedy would always go left, and get 0.
    assert result["return"] == pytest.approx(0.5, abs=4 * result["return_standard_error"])
    np.testing.assert_array_equal(agent.policy, agent.behaviour)


def test_without_a_model_there_are_no_exact_values():
    class Short(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return 1, 3.0, True, False, {}

    agent = MCPrediction(Short(), np.full((2, 2), 0.5), 1.0).learn(5, progress=False)
    assert agent.exact_values is None
    assert agent.values.tolist() == [3.0, 0.0]


def test_a_model_with_an_extra_terminal_state_is_no_obstacle():
    env = gymnasium.make("Taxi-v4")
    agent = MCPrediction(env, np.full((500, 6), 1 / 6), 0.9)
    assert agent.exact_values.shape == (500,)
    np.testing.assert_allclose(
        agent.exact_values, TabularMDP.from_env(env).evaluate(np.full((501, 6), 1 / 6), 0.9)[:500]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MCPrediction(GridWorld(), np.full((25, 3), 1 / 3), 0.9), r"policy has shape \(25, 3\)"),
        (lambda: MCPrediction(GridWorld(), np.full((25, 4), 0.3), 0.9), "state 0: .* is no distribution"),
        (lambda: MCPrediction(GridWorld(), POLICY, 1.1), "between 0 and 1, not 1.1"),
        (lambda: MCPrediction(GridWorld(), POLICY, 0.9, max_episode_steps=0), "max_episode_steps=0"),
        (lambda: MCPrediction(GridWorld(), POLICY, 0.9, episodes_per_iteration=0), "episodes_per_iteration=0"),
        (lambda: MCPrediction(GridWorld(terminal_target=False), POLICY, 1.0), "never ends .* discount of 1"),
        # The task can end, and this policy walks into the wall for ever.
        (lambda: MCPrediction(GridWorld(), np.eye(4)[np.zeros(25, int)], 1.0), "with this policy .* never end"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_spaces_must_be_discrete():
    with pytest.raises(TypeError, match="discrete observations"):
        MCPrediction(gymnasium.make("CartPole-v1"), np.ones((1, 2)), 0.9)
