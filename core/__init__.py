"""What every learner shares: trajectories, policies, advantages, objectives and the agents' loop."""

from aligngym.core.agent import Agent
from aligngym.core.callbacks import Callback, History
from aligngym.core.gradient_agent import EpochOrder, GradientAgent
from aligngym.core.policy import Evaluation, Policy, TabularPolicy
from aligngym.core.schedules import (
    Conditions,
    Constant,
    Decay,
    Geometric,
    Power,
    Schedule,
    dvoretzky_conditions,
    robbins_monro_conditions,
)
from aligngym.core.trajectories import PADDING, Preferences, Trajectories

__all__ = [
    "PADDING",
    "Agent",
    "Callback",
    "Conditions",
    "Constant",
    "Decay",
    "EpochOrder",
    "Evaluation",
    "Geometric",
    "GradientAgent",
    "History",
    "Policy",
    "Power",
    "Preferences",
    "Schedule",
    "TabularPolicy",
    "Trajectories",
    "dvoretzky_conditions",
    "robbins_monro_conditions",
]
