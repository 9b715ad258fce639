import warnings
from collections import deque

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import aligngym.envs  # noqa: F401 (registers)
from aligngym.agents import PolicyIteration
from aligngym.envs import TabularMDP
from aligngym.envs.bairds_counterexample import BairdsCounterexample
from aligngym.envs.blackjack import Blackjack
from aligngym.envs.changing_maze import BlockingMaze, ShortcutMaze
from aligngym.envs.gamblers_problem import GamblersProblem
from aligngym.envs.jacks_car_rental import JacksCarRental
from aligngym.envs.linear_quadratic import LinearQuadratic
from aligngym.envs.random_walk import RandomWalk
from aligngym.envs.short_corridor import ShortCorridor
from aligngym.envs.tabular_env import model_of
from aligngym.envs.textbook_grids import CliffWalking, CornerGrid, DynaMaze, TwoSpecialStates, ZhaoGrid
from aligngym.envs.windy_grid import WindyGrid

IDS = sorted(name for name in gymnasium.registry if name.startswith("aligngym/"))

ENVIRONMENTS = {
    "zhao": ZhaoGrid,
    "zhao, other bounce": lambda: ZhaoGrid(bounce="boundary+forbidden", slip=0.2),
    "corners": CornerGrid,
    "two special states": TwoSpecialStates,
    "cliff": CliffWalking,
    "slippery cliff": lambda: CliffWalking(slip=0.5),
    "windy": WindyGrid,
    "windy, kings, stochastic": lambda: WindyGrid(kings_moves=True, stay=True, stochastic=True),
    "dyna maze": DynaMaze,
    "blocking maze": BlockingMaze,
    "shortcut maze": ShortcutMaze,
    "walk": RandomWalk,
    "walk with jumps": lambda: RandomWalk(30, reach=7, left_reward=-1.0),
    "gambler": lambda: GamblersProblem(goal=12),
    "baird": BairdsCounterexample,
    "corridor": ShortCorridor,
    "blackjack": Blackjack,
    "jack": lambda: JacksCarRental(4, max_moved=2),
}

#: Environments whose steps are more than draws from their model, so that loops over the model must not replace them.
STORIES = ("blocking maze", "shortcut maze", "blackjack", "jack")


@pytest.mark.parametrize("name", IDS)
def test_every_registered_environment_passes_gymnasiums_checker(name):
    env = gymnasium.make(name)
    assert env.spec.max_episode_steps is not None
    if env.has_wrapper_attr("mdp"):
        TabularMDP.from_env(env).check_model()
    else:
        assert isinstance(env.unwrapped, LinearQuadratic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_passes_gymnasiums_checker(name):
    env = ENVIRONMENTS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not having a spec.*")
        check_env(env)
    env.mdp.check_model()
    assert (model_of(env) is None) == (name in STORIES)


@pytest.mark.parametrize("name", [name for name in ENVIRONMENTS if name not in ("jack", "blackjack")])
def test_every_simulator_does_what_its_model_says(name):
    env = ENVIRONMENTS[name]()
    # Short of the number of steps after which the mazes change.
    env.mdp.check_model(env, samples=900)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_seed_repeats_an_episode(name):
    def play(seed):
        env = ENVIRONMENTS[name]()
        generator = np.random.default_rng(seed)
        steps = [env.reset(seed=seed)]
        for _ in range(60):
            steps.append(env.step(int(generator.integers(env.action_space.n)))[:4])
            if steps[-1][2]:
                steps.append(env.reset())
        return steps

    assert play(3) == play(3) != play(4)


# Gymnasium's own, through their P


def test_frozen_lakes_value_is_14_of_17():
    # The 4 × 4 slippery lake, undiscounted and without a time limit: solved exactly.
    mdp = TabularMDP.from_env(gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=True))
    agent = PolicyIteration(mdp, 1.0, tolerance=1e-10).learn(progress=False)
    assert agent.values @ mdp.initial == pytest.approx(14 / 17, abs=1e-10)


def test_cliff_walkings_value_is_minus_13():
    mdp = TabularMDP.from_env(gymnasium.make("CliffWalking-v1"))
    assert PolicyIteration(mdp, 1.0).learn(progress=False).values @ mdp.initial == pytest.approx(-13)


def test_taxis_values_are_shortest_paths():
    """A step costs 1 and the last one pays 20, so a ride of n steps is worth 21 − n: n by breadth-first search in P."""
    table = gymnasium.make("Taxi-v4").unwrapped.P
    before = {}
    distance, queue = {}, deque()
    for state, actions in table.items():
        for ((_, next_state, reward, ended),) in actions.values():
            if ended:
                assert reward == 20
                distance.setdefault(state, 1)
            elif reward == -1:
                before.setdefault(next_state, set()).add(state)
    queue.extend(distance)
    while queue:
        state = queue.popleft()
        for previous in before.get(state, set()) - distance.keys():
            distance[previous] = distance[state] + 1
            queue.append(previous)
    mdp = TabularMDP.from_env(gymnasium.make("Taxi-v4"))
    starts = np.flatnonzero(mdp.initial)
    assert len(starts) == 300
    agent = PolicyIteration(mdp, 1.0).learn(progress=False)
    np.testing.assert_allclose(agent.values[starts], [21 - distance[state] for state in starts], atol=1e-9)
