"""The faster planners against exact solutions, printed tables, and each other."""

import math

import gymnasium
import numpy as np
import pytest

from aligngym.agents.dynamic_programming import PolicyIteration, ValueIteration
from aligngym.agents.error_bounds import endless, expected_steps, lowest_values
from aligngym.agents.gauss_seidel import GaussSeidelValueIteration
from aligngym.agents.modified_policy_iteration import ModifiedPolicyIteration
from aligngym.agents.prioritized_sweeping import PrioritizedSweeping
from aligngym.envs import GridWorld, TabularMDP


def modified(sweeps, in_place):
    def make(mdp, discount, tolerance=1e-6):
        return ModifiedPolicyIteration(mdp, discount, tolerance, sweeps, in_place)

    return make


FAST = {
    "Gauss-Seidel": GaussSeidelValueIteration,
    "modified in place": ModifiedPolicyIteration,
    "modified": modified(5, in_place=False),
    "to the end": modified(math.inf, in_place=True),
    "prioritized": PrioritizedSweeping,
}
PLANNERS = pytest.mark.parametrize("planner", [pytest.param(planner, id=name) for name, planner in FAST.items()])


def random_mdp(seed, states=12, actions=4):
    generator = np.random.default_rng(seed)
    transitions = generator.dirichlet(np.full(states, 0.3), size=(states, actions))
    transitions[transitions < 0.05] = 0
    transitions /= transitions.sum(axis=2, keepdims=True)
    terminal = np.arange(states) == 3 if seed % 2 else None
    return TabularMDP.from_arrays(transitions, generator.normal(size=(states, actions)), terminal=terminal)


def slip_grid(size, seed=0):
    walls = np.random.default_rng(seed).random((size, size)) < 0.1
    letters = np.where(walls, "#", ".")
    letters[0, 0], letters[-1, -1] = "S", "G"
    map = "\n".join("".join(row) for row in letters)
    return GridWorld(map, slip=0.2, step_reward=-1, boundary_reward=-1, target_reward=-1)


# S. Zhao, Mathematical Foundations of Reinforcement Learning, figures 3.4 (a) to (d): γ, r_forbidden, printed values.
ZHAO = {
    "3.4a": (0.9, -1, [
        [5.8, 5.6, 6.2, 6.5, 5.8], [6.5, 7.2, 8.0, 7.2, 6.5], [7.2, 8.0, 10.0, 8.0, 7.2],
        [8.0, 10.0, 10.0, 10.0, 8.0], [7.2, 9.0, 10.0, 9.0, 8.1]]),
    "3.4b": (0.5, -1, [
        [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.1], [0.0, 0.0, 2.0, 0.1, 0.1],
        [0.0, 2.0, 2.0, 2.0, 0.2], [0.0, 1.0, 2.0, 1.0, 0.5]]),
    "3.4c": (0.0, -1, [
        [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]),
    "3.4d": (0.9, -10, [
        [3.5, 3.9, 4.3, 4.8, 5.3], [3.1, 3.5, 4.8, 5.3, 5.9], [2.8, 2.5, 10.0, 5.9, 6.6],
        [2.5, 10.0, 10.0, 10.0, 7.3], [2.3, 9.0, 10.0, 9.0, 8.1]]),
}  # fmt: skip


@PLANNERS
@pytest.mark.parametrize("figure", ZHAO)
def test_zhaos_figures_are_reproduced(planner, figure):
    discount, forbidden, printed = ZHAO[figure]
    grid = GridWorld(stay=True, forbidden_reward=forbidden, terminal_target=False)
    agent = planner(grid, discount, tolerance=1e-9).learn(progress=False)
    # Figure (b) prints 0.25 as 0.2 and 0.0625 as 0.1: half a unit of the last digit, either way.
    np.testing.assert_allclose(agent.values.reshape(5, 5), printed, atol=0.05 + 1e-9)
    exact = PolicyIteration(grid, discount).learn(progress=False).values
    assert np.abs(agent.values - exact).max() <= agent.error_bound + 1e-12 <= 1e-9 + 1e-12


@PLANNERS
@pytest.mark.parametrize("discount", [0.0, 0.5, 0.95])
def test_the_optimum_is_the_exact_one_and_the_bound_holds_after_every_iteration(planner, discount):
    for seed in range(4):
        mdp = random_mdp(seed)
        truth = PolicyIteration(mdp, discount, tolerance=1e-11).learn(progress=False).values
        agent = planner(mdp, discount, tolerance=1e-8)
        assert agent.error_bound == math.inf
        while not agent.finished:
            agent.iterate()
            assert np.abs(agent.values - truth).max() <= agent.error_bound + 1e-12
        assert agent.converged
        assert agent.error_bound <= 1e-8


@PLANNERS
def test_a_slip_grid_is_solved_as_policy_iteration_solves_it(planner):
    grid = slip_grid(20)
    truth = PolicyIteration(grid, 0.99).learn(progress=False)
    agent = planner(grid, 0.99).learn(progress=False)
    assert np.abs(agent.values - truth.values).max() <= agent.error_bound + 1e-12 <= 1e-6 + 1e-12
    np.testing.assert_array_equal(agent.policy > 0, truth.policy > 0)


@PLANNERS
def test_values_only_rise_from_the_lower_bound(planner):
    for seed in range(4):
        agent = planner(random_mdp(seed), 0.9)
        truth = PolicyIteration(agent.mdp, 0.9).learn(progress=False).values
        for _ in range(10):
            before = agent.values
            agent.iterate()
            assert (agent.values >= before - 1e-12).all()
            assert (agent.values <= truth + 1e-12).all()


def test_the_lower_bound_is_one_that_a_sweep_raises():
    for seed in range(6):
        mdp = random_mdp(seed)
        low = lowest_values(mdp, 0.9)
        assert (mdp.action_values(low, 0.9).max(axis=1) >= low - 1e-12).all()
        # Attained where one state pays the least of all for ever.
    loop = TabularMDP.from_arrays(np.ones((1, 2, 1)), [[3.0, 2.0]])
    assert lowest_values(loop, 0.9)[0] == pytest.approx(30)
    np.testing.assert_array_equal(lowest_values(loop, 1.0), 0)


def test_modified_policy_iteration_is_the_formula_of_the_textbook():
    mdp = random_mdp(2)
    agent = ModifiedPolicyIteration(mdp, 0.9, sweeps=3, in_place=False)
    values = agent.values
    for _ in range(5):
        agent.iterate()
        improved = mdp.action_values(values, 0.9)
        np.testing.assert_allclose(agent.values, improved.max(axis=1), atol=1e-12)
        np.testing.assert_array_equal(agent.actions, improved.argmax(axis=1))
        values = agent.values
        policy = np.eye(4)[agent.actions]
        for _ in range(3):
            values = (policy * mdp.action_values(values, 0.9)).sum(axis=1)


def test_its_ends_are_value_iteration_and_policy_iteration():
    mdp = random_mdp(4)
    none = ModifiedPolicyIteration(mdp, 0.9, sweeps=0, in_place=False)
    plain = ValueIteration(mdp, 0.9)
    plain.values = none.values
    for _ in range(20):
        none.iterate()
        plain.iterate()
        np.testing.assert_array_equal(none.values, plain.values)
        assert none.residual == plain.residual
    in_place, seidel = ModifiedPolicyIteration(mdp, 0.9, sweeps=0), GaussSeidelValueIteration(mdp, 0.9)
    for _ in range(5):
        in_place.iterate()
        seidel.iterate()
        np.testing.assert_array_equal(in_place.values, seidel.values)
    # The values that are improved are those of the policy, exactly.
    for in_place in (False, True):
        endless_sweeps = ModifiedPolicyIteration(mdp, 0.9, sweeps=math.inf, in_place=in_place)
        endless_sweeps.iterate()
        exact = mdp.evaluate(np.eye(4)[endless_sweeps.actions], 0.9)
        if not in_place:
            endless_sweeps.iterate()
            np.testing.assert_allclose(endless_sweeps.values, mdp.action_values(exact, 0.9).max(axis=1), atol=1e-10)
        assert len(endless_sweeps.learn(progress=False).values) == 12
        assert endless_sweeps.iteration <= 6


def test_gauss_and_seidels_sweep_is_the_loop_over_states_nearest_to_the_end_first():
    grid = GridWorld("S...\n.##.\n...G", slip=0.3, step_reward=-1)
    agent = GaussSeidelValueIteration(grid, 0.9)
    values, mdp = agent.values.copy(), grid.mdp
    row, column = grid.map.cells.T
    # In this map nothing has to turn back, so the steps to the target are rows and columns.
    order = np.argsort((2 - row) + (3 - column), kind="stable")
    agent.iterate()
    for state in order:
        values[state] = mdp.action_values(values, 0.9)[state].max()
    # States that are equally far may come in any order; here they are no neighbours, so it makes no difference.
    np.testing.assert_allclose(agent.values, values, atol=1e-12)


def test_the_order_carries_values_through_a_corridor_in_one_sweep():
    corridor = "S" + "." * 30 + "G"
    agent = GaussSeidelValueIteration(GridWorld(corridor), 0.9).learn(2, progress=False)
    np.testing.assert_allclose(agent.values, [*(0.9 ** np.arange(30, -1, -1)), 0], atol=1e-12)
    assert ModifiedPolicyIteration(GridWorld(corridor), 0.9).learn(progress=False).iteration == 2


def test_few_sweeps_are_needed_where_value_iteration_needs_thousands():
    letters = [list(row) for row in str(slip_grid(30).map).split("\n")]
    # An enclosed cell, worth −100, takes value iteration ln(1e-8) / ln(0.99) = 1833 sweeps.
    letters[0][27:], letters[1][27:] = "#.#", "##."
    map = "\n".join("".join(row) for row in letters)
    grid = GridWorld(map, slip=0.2, step_reward=-1, boundary_reward=-1, target_reward=-1)
    sweeps = [
        planner(grid, 0.99).learn(progress=False).iteration
        for planner in (ValueIteration, GaussSeidelValueIteration, ModifiedPolicyIteration)
    ]
    assert sweeps[0] == pytest.approx(1833, abs=2)
    assert sweeps[1] < 60
    assert sweeps[2] < 12


def test_prioritized_sweeping_follows_a_change_to_those_who_lead_there():
    # The step to the target is the only error at first, and each backup makes the state before it urgent, and the one
    # behind it, in vain: 16 backups make 8 steps, where the sweep at the end of the iteration makes one.
    agent = PrioritizedSweeping(GridWorld("S" + "." * 14 + "G", boundary_reward=0), 0.9)
    agent.iterate()
    np.testing.assert_allclose(agent.values[7:], [*(0.9 ** np.arange(7, -1, -1)), 0], atol=1e-15)
    assert agent.backups == 16


def test_prioritized_sweeping_looks_at_few_states_where_few_are_wrong():
    mdp = slip_grid(30).mdp
    agent = PrioritizedSweeping(mdp, 0.99, tolerance=1e-9).learn(progress=False)
    changed = TabularMDP(mdp.outcomes, mdp.initial, mdp.terminal, mdp.num_actions)
    changed.rewards[0] = -2.0
    again = PrioritizedSweeping(changed, 0.99, tolerance=1e-6)
    again.values = agent.values.copy()
    again.learn(progress=False)
    truth = PolicyIteration(changed, 0.99).learn(progress=False).values
    assert np.abs(again.values - truth).max() <= again.error_bound + 1e-12 <= 1e-6 + 1e-12
    # A sweep has as many backups as there are states.
    assert 0 < again.backups < mdp.num_states


@PLANNERS
def test_undiscounted_toy_text_has_its_known_values_with_a_proof(planner):
    frozen_lake = planner(gymnasium.make("FrozenLake-v1"), 1.0, 1e-8).learn(progress=False)
    assert frozen_lake.converged
    assert frozen_lake.values[0] == pytest.approx(14 / 17, abs=1e-8)
    cliff_walking = planner(gymnasium.make("CliffWalking-v1"), 1.0).learn(progress=False)
    assert cliff_walking.values[36] == -13
    assert cliff_walking.error_bound < 1e-9


@PLANNERS
def test_free_loops_do_not_hold_an_undiscounted_planner(planner):
    # To stay costs nothing, but going right, which ties with staying once V = 1, is worth 1.
    grid = GridWorld("S...G", stay=True, boundary_reward=0)
    agent = planner(grid, 1.0).learn(1000, progress=False)
    np.testing.assert_array_equal(agent.values, [1, 1, 1, 1, 0])
    # Walking into the wall ties too, and comes first: a policy that would never end keeps what is known all the same.
    for _ in range(3):
        agent.iterate()
        np.testing.assert_array_equal(agent.values, [1, 1, 1, 1, 0])
        assert agent.finished
    # Nothing is better than walking for ever where the only end costs 5.
    grid = GridWorld("S.G", target_reward=-5, boundary_reward=-1)
    agent = planner(grid, 1.0).learn(1000, progress=False)
    np.testing.assert_array_equal(agent.values, 0)


def test_the_bound_of_steps_in_the_mean():
    # An episode ends with probability 1/4 a step: 4 steps in the mean, and the bound is nearly attained.
    lingering = TabularMDP.from_arrays([[[0.75, 0.25]], [[0, 1]]], [[1.0], [0.0]], terminal=[False, True])
    assert not endless(lingering).any()
    assert 4 <= expected_steps(lingering, 1.0) < 4.001
    # The better of two actions, for whoever wants the episode to last.
    two = TabularMDP.from_arrays(
        [[[0.75, 0.25], [0.5, 0.5]], [[0, 1], [0, 1]]], [[1.0, 5.0], [0.0, 0.0]], terminal=[False, True]
    )
    assert 4 <= expected_steps(two, 1.0) < 4.001
    stays = GridWorld("S.G", boundary_reward=0).mdp
    np.testing.assert_array_equal(endless(stays), [True, True, False])
    assert expected_steps(stays, 1.0) == math.inf
    assert expected_steps(lingering, 1.0, limit=1) == math.inf


@PLANNERS
@pytest.mark.parametrize("discount", [0.9, 0.999])
def test_ties_do_not_make_them_run_in_circles(planner, discount):
    nothing = TabularMDP.from_arrays(np.random.default_rng(0).dirichlet(np.ones(50), (50, 6)), np.zeros((50, 6)))
    agent = planner(nothing, discount).learn(100, progress=False)
    assert agent.converged
    np.testing.assert_array_equal(agent.policy, 1 / 6)
    grid = GridWorld(".....\n.....\n..G..\n.....\n.....", slip=1 / 3, step_reward=1 / 3, boundary_reward=1 / 3)
    agent = planner(grid, discount, tolerance=1e-7).learn(40_000, progress=False)
    assert agent.converged
    values = agent.values.reshape(5, 5)
    for symmetric in (values.T, values[::-1], values[:, ::-1]):
        np.testing.assert_allclose(values, symmetric, atol=2e-7)


@PLANNERS
def test_stopping_early_and_asking_too_much_are_loud(planner):
    agent = planner(slip_grid(8), 0.99)
    with pytest.warns(UserWarning, match="has not converged to 1e-06: its error is at most .* stopped at iteration 1"):
        agent.learn(1, progress=False)
    assert not agent.converged
    assert 1e-6 < agent.error_bound < math.inf
    assert agent.learn(progress=False).converged
    agent = planner(GridWorld(slip=0.2, target_reward=1e6), 0.99, 1e-14)
    with pytest.warns(UserWarning, match="double precision allows no more"):
        agent.learn(50_000, progress=False)
    assert agent.finished


@PLANNERS
def test_a_saved_planner_continues_bit_for_bit(planner, tmp_path):
    mdp = random_mdp(8)
    through, halfway = planner(mdp, 0.9, 1e-9), planner(mdp, 0.9, 1e-9)
    for agent in (through, halfway):
        with pytest.warns(UserWarning, match="not converged"):
            agent.learn(2, progress=False)
    halfway.save(tmp_path / "planner.safetensors")
    resumed = planner(mdp, 0.9, 1e-9).load(tmp_path / "planner.safetensors")
    for agent in (through, resumed):
        agent.learn(progress=False)
    np.testing.assert_array_equal(resumed.values, through.values)
    assert (resumed.iteration, resumed.error_bound) == (through.iteration, through.error_bound)
    assert resumed.state_dict().keys() == through.state_dict().keys()
    if isinstance(through, PrioritizedSweeping):
        assert resumed.backups == through.backups


def test_bad_arguments_are_refused():
    for sweeps in (-1, 2.5, math.nan):
        with pytest.raises(ValueError, match=f"sweeps is a whole number .* not {sweeps}"):
            ModifiedPolicyIteration(GridWorld(), 0.9, sweeps=sweeps)
    for planner in FAST.values():
        with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.1"):
            planner(GridWorld(), 1.1)
        with pytest.raises(TypeError, match="shows no exact model"):
            planner(gymnasium.make("CartPole-v1"), 0.9)
