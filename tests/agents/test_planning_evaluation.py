"""Iterative policy evaluation against printed tables and the closed form."""

import math

import numpy as np
import pytest

from aligngym.agents.policy_evaluation import PolicyEvaluation
from aligngym.envs import GridWorld, TabularMDP

IN_PLACE = pytest.mark.parametrize("in_place", [False, True])

# R. Sutton and A. Barto, Reinforcement Learning, 2nd ed., figure 4.1: V after k sweeps under the random policy, printed
# to one digit, with −1.75 as −1.7.
FIGURE_4_1 = {
    0: [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
    1: [[0.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, 0.0]],
    2: [[0.0, -1.7, -2.0, -2.0], [-1.7, -2.0, -2.0, -2.0], [-2.0, -2.0, -2.0, -1.7], [-2.0, -2.0, -1.7, 0.0]],
    3: [[0.0, -2.4, -2.9, -3.0], [-2.4, -2.9, -3.0, -2.9], [-2.9, -3.0, -2.9, -2.4], [-3.0, -2.9, -2.4, 0.0]],
    10: [[0.0, -6.1, -8.4, -9.0], [-6.1, -7.7, -8.4, -8.4], [-8.4, -8.4, -7.7, -6.1], [-9.0, -8.4, -6.1, 0.0]],
    math.inf: [[0, -14, -20, -22], [-14, -18, -20, -20], [-20, -20, -18, -14], [-22, -20, -14, 0]],
}


def corners():
    return GridWorld("G...\n....\n....\n...G", step_reward=-1, boundary_reward=-1, target_reward=-1)


@pytest.mark.parametrize("sweeps", FIGURE_4_1)
@pytest.mark.filterwarnings("ignore:PolicyEvaluation has not converged")
def test_sutton_and_bartos_figure_4_1_sweep_by_sweep(sweeps):
    agent = PolicyEvaluation(corners(), np.full((16, 4), 0.25), 1.0, tolerance=1e-9)
    agent.learn(None if sweeps == math.inf else sweeps, progress=False)
    np.testing.assert_allclose(agent.values.reshape(4, 4), FIGURE_4_1[sweeps], atol=0.05 + 1e-9)
    if sweeps == math.inf:
        np.testing.assert_allclose(agent.values.reshape(4, 4), FIGURE_4_1[sweeps], rtol=0, atol=1e-9)
        assert agent.error_bound <= 1e-9


@IN_PLACE
def test_the_uniform_policy_of_example_3_5(in_place):
    # R. Sutton and A. Barto, 2nd ed., figure 3.2, right.
    grid = GridWorld("S....\n.....\n.....\n.....\n....G", boundary_reward=-1, target_reward=0, terminal_target=False)
    transitions = grid.mdp.transitions.toarray().reshape(25, 4, 25)
    rewards = grid.mdp.rewards.copy()
    for state, to, reward in [(1, 21, 10.0), (3, 13, 5.0)]:
        transitions[state], rewards[state] = np.eye(25)[to], reward
    mdp = TabularMDP.from_arrays(transitions, rewards)
    agent = PolicyEvaluation(mdp, np.full((25, 4), 0.25), 0.9, in_place=in_place).learn(progress=False)
    printed = [
        [3.3, 8.8, 4.4, 5.3, 1.5],
        [1.5, 3.0, 2.3, 1.9, 0.5],
        [0.1, 0.7, 0.7, 0.4, -0.4],
        [-1.0, -0.4, -0.4, -0.6, -1.2],
        [-1.9, -1.3, -1.2, -1.4, -2.0],
    ]
    np.testing.assert_allclose(agent.values.reshape(5, 5), printed, atol=0.05)
    assert agent.values[0] == pytest.approx(3.308996335634639, abs=1e-6)


@IN_PLACE
def test_a_good_policy_of_zhaos_figure_2_7(in_place):
    # S. Zhao, Mathematical Foundations of Reinforcement Learning, figure 2.7 (a), r_boundary = r_forbidden = −1.
    grid = GridWorld(stay=True, terminal_target=False)
    arrows = "RRRRD UURRD ULDRD UROLD URULL".replace(" ", "")
    policy = np.eye(5)[["URDLO".index(arrow) for arrow in arrows]]
    agent = PolicyEvaluation(grid, policy, 0.9, in_place=in_place).learn(progress=False)
    printed = [
        [3.5, 3.9, 4.3, 4.8, 5.3],
        [3.1, 3.5, 4.8, 5.3, 5.9],
        [2.8, 2.5, 10.0, 5.9, 6.6],
        [2.5, 10.0, 10.0, 10.0, 7.3],
        [2.3, 9.0, 10.0, 9.0, 8.1],
    ]
    np.testing.assert_allclose(agent.values.reshape(5, 5), printed, atol=0.05)
    np.testing.assert_array_equal(agent.policy, policy)
    assert agent.act([0, 12]).tolist() == [1, 2]


@IN_PLACE
@pytest.mark.parametrize("discount", [0.0, 0.9, 0.99, 1.0])
def test_it_is_the_closed_form_and_the_bound_holds_after_every_sweep(in_place, discount):
    for seed in range(3):
        generator = np.random.default_rng(seed)
        transitions = generator.dirichlet(np.full(12, 0.5), size=(12, 4))
        mdp = TabularMDP.from_arrays(transitions, generator.normal(size=(12, 4)), terminal=np.arange(12) == seed)
        policy = generator.dirichlet(np.ones(4), size=12)
        truth = mdp.evaluate(policy, discount)
        agent = PolicyEvaluation(mdp, policy, discount, tolerance=1e-8, in_place=in_place)
        while not agent.finished:
            agent.iterate()
            assert np.abs(agent.values - truth).max() <= agent.error_bound + 1e-11
        assert agent.converged
        # Without a discount too: rewards have both signs, so it is the steps in the mean that prove it.
        assert agent.error_bound <= 1e-8
        np.testing.assert_allclose(agent.action_values, mdp.action_values(agent.values, discount))


def test_the_bound_is_not_loose():
    # A state that keeps itself and pays 1: V = 1 after a sweep, and 9 are missing.
    loop = TabularMDP.from_arrays(np.ones((1, 2, 1)), [[1.0, 1.0]])
    agent = PolicyEvaluation(loop, [[0.5, 0.5]], 0.9)
    agent.iterate()
    assert agent.error_bound == pytest.approx(9, rel=1e-12)


def test_a_sweep_limit_is_loud_and_a_saved_evaluation_continues(tmp_path):
    uniform = np.full((16, 4), 0.25)
    through, halfway = (PolicyEvaluation(corners(), uniform, 1.0, in_place=True) for _ in range(2))
    for agent in (through, halfway):
        with pytest.warns(UserWarning, match="PolicyEvaluation has not converged .* stopped at iteration 5"):
            agent.learn(5, progress=False)
    halfway.save(tmp_path / "values.safetensors")
    resumed = PolicyEvaluation(corners(), uniform, 1.0, in_place=True).load(tmp_path / "values.safetensors")
    np.testing.assert_array_equal(resumed.learn(progress=False).values, through.learn(progress=False).values)
    jacobi = PolicyEvaluation(corners(), uniform, 1.0).learn(progress=False)
    assert through.iteration < 0.7 * jacobi.iteration


def test_a_policy_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"shape \(16, 5\)"):
        PolicyEvaluation(corners(), np.full((16, 5), 0.2), 0.9)
    policy = np.full((16, 4), 0.25)
    policy[7, 0] = 0.5
    with pytest.raises(ValueError, match="state 7"):
        PolicyEvaluation(corners(), policy, 0.9)
