"""Reinforcement learning: planners that know the model, and learners that do not."""

from aligngym.agents.dynamic_programming import DynamicProgramming, PolicyIteration, ValueIteration
from aligngym.agents.error_bounds import error_bound
from aligngym.agents.evaluation import evaluate_episodes
from aligngym.agents.soft_value_iteration import SoftValueIteration
from aligngym.agents.tabular_agent import TabularAgent
from aligngym.agents.temporal_difference import QLearning, TDControl

__all__ = [
    "DynamicProgramming",
    "PolicyIteration",
    "QLearning",
    "SoftValueIteration",
    "TDControl",
    "TabularAgent",
    "ValueIteration",
    "error_bound",
    "evaluate_episodes",
]
