import math

import gymnasium
import numpy as np
import pytest
from scipy.optimize import linprog

from aligngym.agents import PolicyIteration, ValueIteration, error_bound
from aligngym.agents.error_bounds import longest_episode
from aligngym.envs import GridWorld, TabularMDP

PLANNERS = pytest.mark.parametrize("planner", [ValueIteration, PolicyIteration])


def random_mdp(seed, states=12, actions=4):
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(states, 0.3), size=(states, actions))
    return TabularMDP.from_arrays(
        transitions, generator.normal(size=(states, actions)), terminal=np.arange(states) == 3
    )


def optimum_by_linear_programming(mdp, discount):
    """Minimise Σ V subject to V ≥ r + γ P V and V = 0 in terminal states: the textbook's other definition of V*."""
    own = np.repeat(np.eye(mdp.num_states), mdp.num_actions, axis=0)
    bounds = [(0, 0) if end else (None, None) for end in mdp.terminal]
    solution = linprog(
        np.ones(mdp.num_states),
        A_ub=discount * mdp.transitions.toarray() - own,
        b_ub=-mdp.rewards.ravel(),
        bounds=bounds,
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert solution.success
    return solution.x


@PLANNERS
@pytest.mark.parametrize("discount", [0.0, 0.5, 0.95])
def test_the_optimum_is_that_of_linear_programming_and_the_bound_holds(planner, discount):
    for seed in range(3):
        mdp = random_mdp(seed)
        truth = optimum_by_linear_programming(mdp, discount)
        agent = planner(mdp, discount, tolerance=1e-7).learn(progress=False)
        assert agent.converged
        assert agent.error_bound <= 1e-7
        assert np.abs(agent.values - truth).max() <= agent.error_bound + 1e-8


@PLANNERS
@pytest.mark.parametrize("name", ["FrozenLake-v1", "FrozenLake-v1 8x8", "CliffWalking-v1", "Taxi-v4"])
def test_toy_text_optima_are_those_of_linear_programming(planner, name):
    env = gymnasium.make(name.split()[0], **({"map_name": "8x8"} if "8x8" in name else {}))
    agent = planner(env, 0.97, tolerance=1e-8).learn(progress=False)
    np.testing.assert_allclose(agent.values, optimum_by_linear_programming(agent.mdp, 0.97), atol=1e-6)


@PLANNERS
def test_undiscounted_toy_text_has_its_known_values(planner):
    frozen_lake = planner(gymnasium.make("FrozenLake-v1"), 1.0).learn(5000, progress=False)
    assert frozen_lake.values[0] == pytest.approx(14 / 17, abs=1e-10)
    assert frozen_lake.error_bound == math.inf
    assert frozen_lake.converged
    cliff_walking = planner(gymnasium.make("CliffWalking-v1"), 1.0).learn(progress=False)
    assert cliff_walking.values[36] == -13
    assert cliff_walking.error_bound < 1e-9


def test_the_bound_holds_after_every_sweep():
    for mdp, discount in [(random_mdp(5), 0.9), (GridWorld(slip=0.2).mdp, 0.99), (random_mdp(6).unrolled(7), 1.0)]:
        truth = PolicyIteration(mdp, discount, tolerance=1e-10).learn(progress=False).values
        agent = ValueIteration(mdp, discount, tolerance=1e-9)
        assert agent.error_bound == math.inf
        while not agent.finished:
            agent.iterate()
            assert np.abs(agent.values - truth).max() <= agent.error_bound + 1e-10
        assert agent.converged


def test_the_bound_of_costly_steps_holds_without_discount():
    grid = GridWorld("S...\n.##.\n...G", slip=0.3, step_reward=-1, boundary_reward=-2, target_reward=-0.5)
    truth = PolicyIteration(grid, 1.0).learn(progress=False)
    assert truth.error_bound < 1e-9
    agent = ValueIteration(grid, 1.0, tolerance=1e-8)
    finite = 0
    while not agent.finished:
        agent.iterate()
        finite += math.isfinite(agent.error_bound)
        assert np.abs(agent.values - truth.values).max() <= agent.error_bound
    assert finite > 5


def test_the_bound_of_costly_steps_is_attained():
    # Each step costs 1 and is the last one with probability 1/4, so V* = −4. With V = −3.6 the residual is 0.1.
    mdp = TabularMDP.from_arrays([[[0.75, 0.25]], [[0, 1]]], [[-1.0], [0.0]], terminal=[False, True])
    assert error_bound(mdp, np.array([-3.6, 0.0]), 0.1, discount=1.0) == pytest.approx(0.4)
    assert error_bound(mdp, np.array([0.0, 0.0]), 1.0, discount=1.0) == math.inf


def test_the_longest_episode():
    assert longest_episode(random_mdp(0).unrolled(9)) == 9
    assert longest_episode(random_mdp(0)) == math.inf
    chain = TabularMDP.from_arrays(np.eye(5, k=1)[:, None] + np.eye(5)[:, None] * (np.arange(5) == 4)[:, None, None],
                                   np.ones((5, 1)), terminal=np.arange(5) == 4)  # fmt: skip
    assert longest_episode(chain) == 4
    # Four rewards of 1 are ahead, V = 0 has residual 1, and the bound is exact.
    assert error_bound(chain, np.zeros(5), 1.0, discount=1.0, longest=4) == 4


def test_the_bound_of_discounting_is_attained():
    loop = TabularMDP.from_arrays(np.ones((1, 1, 1)), np.ones((1, 1)))
    agent = ValueIteration(loop, 0.9, tolerance=1e-3)
    agent.iterate()
    # V = 1, V* = 10.
    assert agent.error_bound == pytest.approx(9, rel=1e-12)
    assert agent.learn(progress=False).values[0] == pytest.approx(10, abs=1e-3)


@PLANNERS
@pytest.mark.parametrize("discount", [0.9, 0.999])
def test_ties_do_not_make_planners_run_in_circles(planner, discount):
    nothing = TabularMDP.from_arrays(np.random.default_rng(0).dirichlet(np.ones(50), (50, 6)), np.zeros((50, 6)))
    agent = planner(nothing, discount).learn(100, progress=False)
    assert agent.converged
    np.testing.assert_array_equal(agent.policy, 1 / 6)
    # Every state of a symmetrical grid has ties, and thirds make them inexact.
    grid = GridWorld(".....\n.....\n..G..\n.....\n.....", slip=1 / 3, step_reward=1 / 3, boundary_reward=1 / 3)
    agent = planner(grid, discount, tolerance=1e-7).learn(40_000, progress=False)
    assert agent.converged
    values, policy = agent.values.reshape(5, 5), agent.policy.reshape(5, 5, 4)
    for symmetric in (values.T, values[::-1], values[:, ::-1]):
        np.testing.assert_allclose(values, symmetric, atol=2e-7)
    np.testing.assert_array_equal(policy, policy[:, ::-1][..., [0, 3, 2, 1]])
    np.testing.assert_array_equal(policy, policy[::-1][..., [2, 1, 0, 3]])


def test_equal_actions_share_the_policy():
    grid = GridWorld("S.\n.G")
    agent = ValueIteration(grid, 0.9).learn(progress=False)
    np.testing.assert_allclose(agent.policy[:3], [[0, 0.5, 0.5, 0], [0, 0, 1, 0], [0, 1, 0, 0]])
    assert agent.act([0, 1, 2]).tolist() == [1, 2, 1]
    drawn = agent.act(np.zeros(10_000, dtype=int), greedy=False, generator=np.random.default_rng(0))
    # Hoeffding, wrong with probability 1e-6.
    assert abs((drawn == 1).mean() - 0.5) < math.sqrt(math.log(2 / 1e-6) / 20_000)
    assert set(drawn.tolist()) == {1, 2}
    with pytest.raises(ValueError, match="needs a generator"):
        agent.act(0, greedy=False)


def test_stopping_early_is_loud():
    agent = ValueIteration(GridWorld(), 0.99)
    with pytest.warns(UserWarning, match="has not converged to 1e-06: its error is at most .* stopped at iteration 3"):
        agent.learn(3, progress=False)
    assert not agent.converged
    assert agent.error_bound > 1e-6
    assert agent.learn(progress=False).converged


@PLANNERS
def test_a_tolerance_beyond_double_precision_ends_and_is_loud(planner):
    grid = GridWorld(slip=0.2, target_reward=1e6)
    agent = planner(grid, 0.99, tolerance=1e-14)
    with pytest.warns(UserWarning, match="double precision allows no more"):
        agent.learn(50_000, progress=False)
    assert agent.finished
    assert not agent.converged


@PLANNERS
def test_a_saved_planner_continues_bit_for_bit(planner, tmp_path):
    mdp = random_mdp(8)
    through = planner(mdp, 0.9, tolerance=1e-9)
    halfway = planner(mdp, 0.9, tolerance=1e-9)
    for agent in (through, halfway):
        with pytest.warns(UserWarning, match="not converged"):
            agent.learn(2, progress=False)
    halfway.save(tmp_path / "planner.safetensors")
    resumed = planner(mdp, 0.9, tolerance=1e-9).load(tmp_path / "planner.safetensors")
    for agent in (through, resumed):
        agent.learn(progress=False)
    np.testing.assert_array_equal(resumed.values, through.values)
    np.testing.assert_array_equal(resumed.policy, through.policy)
    assert (resumed.iteration, resumed.error_bound) == (through.iteration, through.error_bound)
    with pytest.raises(ValueError, match="saved values of 12 states, and this model has 25"):
        planner(GridWorld(), 0.9).load(tmp_path / "planner.safetensors")


@PLANNERS
def test_playing_earns_the_value_of_the_start(planner):
    env = GridWorld("S..\n.F.\n..G", slip=0.3, step_reward=-0.1)
    agent = planner(env, 0.9).learn(progress=False)
    played = agent.evaluate(env, episodes=4000, seed=1)
    # Five standard errors: a normal mean is further off with probability 6e-7.
    assert abs(played["return"] - agent.values[0]) < 5 * played["return_standard_error"]
    assert played["truncated"] == 0
    assert played == agent.evaluate(env, episodes=4000, seed=1) != agent.evaluate(env, episodes=4000, seed=2)
    with pytest.raises(ValueError, match="the agent knows the states 0 … 8"):
        agent.evaluate(GridWorld(), episodes=1)


def test_bad_arguments_are_refused():
    for arguments, message in [((1.1,), "between 0 and 1, not 1.1"), ((0.9, 0.0), "positive error")]:
        with pytest.raises(ValueError, match=message):
            ValueIteration(GridWorld(), *arguments)
    with pytest.raises(TypeError, match="shows no exact model"):
        PolicyIteration(gymnasium.make("CartPole-v1"), 0.9)
