"""Environments for Gymnasium, and the exact models behind them.

Importing this package registers ``aligngym/GridWorld-v0`` with Gymnasium.
"""

import gymnasium

from aligngym.envs.enumeration import bradley_terry_preferences, enumerate_trajectories
from aligngym.envs.finite_horizon import FiniteHorizon
from aligngym.envs.grid_map import GridMap
from aligngym.envs.grid_world import GridWorld
from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP
from aligngym.envs.token_mdp import TokenMDP

__all__ = [
    "FiniteHorizon",
    "GridMap",
    "GridWorld",
    "Outcomes",
    "TabularEnv",
    "TabularMDP",
    "TokenMDP",
    "bradley_terry_preferences",
    "enumerate_trajectories",
]

gymnasium.register(
    id="aligngym/GridWorld-v0",
    entry_point="aligngym.envs.grid_world:GridWorld",
    max_episode_steps=1000,
)
