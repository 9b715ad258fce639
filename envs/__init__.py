"""Environments for Gymnasium, and the exact models behind them.

Importing this package registers every environment below with Gymnasium, as ``aligngym/GridWorld-v0`` and so on.
"""

from typing import TYPE_CHECKING

import gymnasium

from aligngym.core.lazy import lazy_names
from aligngym.envs.bairds_counterexample import BairdsCounterexample
from aligngym.envs.blackjack import Blackjack
from aligngym.envs.changing_maze import BlockingMaze, ChangingMaze, ShortcutMaze
from aligngym.envs.finite_horizon import FiniteHorizon
from aligngym.envs.gamblers_problem import GamblersProblem
from aligngym.envs.grid_map import GridMap
from aligngym.envs.grid_world import GridWorld
from aligngym.envs.jacks_car_rental import JacksCarRental
from aligngym.envs.linear_quadratic import LinearQuadratic
from aligngym.envs.numbered_states import NumberedStates
from aligngym.envs.outcomes import Outcomes
from aligngym.envs.prompt_env import PromptEnv
from aligngym.envs.random_walk import RandomWalk
from aligngym.envs.short_corridor import AliasedStates, ShortCorridor
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP
from aligngym.envs.text_grid_world import NumberedText, TextGridWorld, text_player
from aligngym.envs.textbook_grids import CliffWalking, CornerGrid, DynaMaze, TwoSpecialStates, ZhaoGrid
from aligngym.envs.vector_grid_world import VectorGridWorld
from aligngym.envs.vector_tabular_env import VectorTabularEnv
from aligngym.envs.vectorize import vectorize
from aligngym.envs.windy_grid import WindyGrid

if TYPE_CHECKING:
    from aligngym.envs.enumeration import bradley_terry_preferences, enumerate_trajectories
    from aligngym.envs.tensor_tabular_env import TensorTabularEnv
    from aligngym.envs.token_mdp import TokenMDP

__all__ = [
    "AliasedStates",
    "BairdsCounterexample",
    "Blackjack",
    "BlockingMaze",
    "ChangingMaze",
    "CliffWalking",
    "CornerGrid",
    "DynaMaze",
    "FiniteHorizon",
    "GamblersProblem",
    "GridMap",
    "GridWorld",
    "JacksCarRental",
    "LinearQuadratic",
    "NumberedStates",
    "NumberedText",
    "Outcomes",
    "PromptEnv",
    "RandomWalk",
    "ShortCorridor",
    "ShortcutMaze",
    "TabularEnv",
    "TabularMDP",
    "TensorTabularEnv",
    "TextGridWorld",
    "TokenMDP",
    "TwoSpecialStates",
    "VectorGridWorld",
    "VectorTabularEnv",
    "WindyGrid",
    "ZhaoGrid",
    "bradley_terry_preferences",
    "enumerate_trajectories",
    "text_player",
    "vectorize",
]

#: Steps after which ``gymnasium.make`` truncates an episode, where it has not been told otherwise.
TIME_LIMITS: dict[type[gymnasium.Env], int] = {
    Blackjack: 100,
    JacksCarRental: 100,
    LinearQuadratic: 200,
    BairdsCounterexample: 1000,
    CliffWalking: 1000,
    CornerGrid: 1000,
    GridWorld: 1000,
    ShortCorridor: 1000,
    TextGridWorld: 1000,
    TwoSpecialStates: 1000,
    WindyGrid: 1000,
    ZhaoGrid: 1000,
    BlockingMaze: 2000,
    DynaMaze: 2000,
    ShortcutMaze: 2000,
    GamblersProblem: 100_000,
    RandomWalk: 100_000,
}

for _environment, _limit in TIME_LIMITS.items():
    gymnasium.register(
        id=f"aligngym/{_environment.__name__}-v0",
        entry_point=f"{_environment.__module__}:{_environment.__name__}",
        # Thousands of copies at once: gymnasium.make_vec("aligngym/GridWorld-v0", 4096).
        vector_entry_point=VectorGridWorld if _environment is GridWorld else None,
        max_episode_steps=_limit,
    )

#: Imported when they are first asked for: they need torch, and a grid does not.
_NEED_TORCH = {
    "TensorTabularEnv": "tensor_tabular_env",
    "TokenMDP": "token_mdp",
    "bradley_terry_preferences": "enumeration",
    "enumerate_trajectories": "enumeration",
}

__getattr__ = lazy_names(__name__, _NEED_TORCH)
