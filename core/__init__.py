"""What every learner shares: trajectories, policies, advantages, objectives and the agents' loop."""

from aligngym.core.agent import Agent
from aligngym.core.callbacks import Callback
from aligngym.core.gradient_agent import EpochOrder, GradientAgent
from aligngym.core.policy import Evaluation, Policy, TabularPolicy
from aligngym.core.schedules import Constant, Decay, Power, Schedule
from aligngym.core.trajectories import PADDING, Preferences, Trajectories

__all__ = [
    "PADDING",
    "Agent",
    "Callback",
    "Constant",
    "Decay",
    "EpochOrder",
    "Evaluation",
    "GradientAgent",
    "Policy",
    "Power",
    "Preferences",
    "Schedule",
    "TabularPolicy",
    "Trajectories",
]
