"""Without a discount: which tasks are refused, and which must not be."""

import gymnasium
import numpy as np
import pytest

from aligngym.agents.dynamic_programming import PolicyIteration, ValueIteration
from aligngym.agents.gauss_seidel import GaussSeidelValueIteration
from aligngym.agents.modified_policy_iteration import ModifiedPolicyIteration
from aligngym.agents.policy_evaluation import PolicyEvaluation
from aligngym.agents.prioritized_sweeping import PrioritizedSweeping
from aligngym.agents.unbounded_values import refuse_unbounded_values
from aligngym.envs import GridWorld, TabularMDP

PLANNERS = (
    ValueIteration,
    PolicyIteration,
    GaussSeidelValueIteration,
    ModifiedPolicyIteration,
    PrioritizedSweeping,
)


def two_special_states():
    # R. Sutton and A. Barto, 2nd ed., example 3.5: a move off the grid costs 1, from A one gets 10, and from B 5.
    grid = GridWorld("S....\n.....\n.....\n.....\n....G", boundary_reward=-1, target_reward=0, terminal_target=False)
    transitions = grid.mdp.transitions.toarray().reshape(25, 4, 25)
    rewards = grid.mdp.rewards.copy()
    for state, to, reward in [(1, 21, 10.0), (3, 13, 5.0)]:
        transitions[state], rewards[state] = np.eye(25)[to], reward
    return TabularMDP.from_arrays(transitions, rewards)


@pytest.mark.parametrize("planner", PLANNERS)
def test_what_is_earned_again_and_again_is_refused(planner):
    staying = GridWorld(stay=True, terminal_target=False)
    with pytest.raises(ValueError, match=r"from state 1[27] .* earn 1\.0 again and again: .* discount of 1"):
        planner(staying, 1.0)
    # The rewards on the way back from A are 0, so no action earns for ever, but a cycle does.
    with pytest.raises(ValueError, match=r"from state 1 .* earn 10\.0 again and again"):
        planner(two_special_states(), 1.0)
    planner(staying, 0.999)


@pytest.mark.parametrize("planner", PLANNERS)
def test_what_costs_for_ever_is_refused(planner):
    enclosed = GridWorld("S.#.\n..#G\n###.", step_reward=-1, target_reward=-1)
    with pytest.raises(
        ValueError, match="from state 0 no terminal state can be reached, and every way on has its cost"
    ):
        planner(enclosed, 1.0)


def test_a_way_to_the_end_or_a_place_to_rest_is_enough():
    for env in (
        GridWorld("S..G", step_reward=-1),
        GridWorld(slip=0.2),
        # Enclosed, but staying is free.
        GridWorld("S.#.\n..#G", stay=True, step_reward=0, boundary_reward=-1),
        # A reward that is earned for ever only by paying for it.
        TabularMDP.from_arrays([[[0, 1.0]], [[1.0, 0]]], [[1.0], [-1.0]]),
        gymnasium.make("FrozenLake-v1"),
        gymnasium.make("CliffWalking-v1"),
        gymnasium.make("Taxi-v4"),
    ):
        refuse_unbounded_values(env if isinstance(env, TabularMDP) else TabularMDP.from_env(env))


def test_a_cycle_that_chance_leaves_is_no_cycle():
    # State 0 pays 1, and leads back through state 1 with probability 0.9: 1 / 0.1 = 10.
    transitions = [[[0, 1.0, 0]], [[0.9, 0, 0.1]], [[0, 0, 1.0]]]
    mdp = TabularMDP.from_arrays(transitions, [[1.0], [0.0], [0.0]], terminal=[False, False, True])
    for planner in PLANNERS:
        agent = planner(mdp, 1.0).learn(progress=False)
        assert agent.values[0] == pytest.approx(10, abs=1e-5)
    closed = TabularMDP.from_arrays([[[0, 1.0]], [[1.0, 0]]], [[1.0], [0.0]])
    with pytest.raises(ValueError, match="again and again"):
        refuse_unbounded_values(closed)


def test_a_policy_that_never_ends_and_pays_is_refused():
    grid = GridWorld("S.G", step_reward=-1, boundary_reward=-1, target_reward=-1)
    leftwards = np.tile([0.0, 0, 0, 1], (3, 1))
    with pytest.raises(ValueError, match=r"from state 0 this policy never reaches .* -1\.0 a step"):
        PolicyEvaluation(grid, leftwards, 1.0)
    free = PolicyEvaluation(GridWorld("S.G", boundary_reward=0), leftwards, 1.0).learn(progress=False)
    np.testing.assert_array_equal(free.values, 0)
