"""What every learner shares: trajectories, policies, advantages, objectives and the agents' loop."""

from typing import TYPE_CHECKING

from aligngym.core.agent import Agent
from aligngym.core.callbacks import Callback, History
from aligngym.core.lazy import lazy_names
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

if TYPE_CHECKING:
    from aligngym.core.deterministic_policy import DeterministicPolicy
    from aligngym.core.gradient_agent import EpochOrder, GradientAgent
    from aligngym.core.markov_policy import MarkovPolicy
    from aligngym.core.network_policy import NetworkPolicy
    from aligngym.core.policy import Evaluation, Policy
    from aligngym.core.q_network import CategoricalQNetwork, QNetwork
    from aligngym.core.sampler import Sampler
    from aligngym.core.tabular_policy import TabularPolicy
    from aligngym.core.trajectories import PADDING, Experience, Preferences, Trajectories

__all__ = [
    "PADDING",
    "Agent",
    "Callback",
    "CategoricalQNetwork",
    "Conditions",
    "Constant",
    "Decay",
    "DeterministicPolicy",
    "EpochOrder",
    "Evaluation",
    "Experience",
    "Geometric",
    "GradientAgent",
    "History",
    "MarkovPolicy",
    "NetworkPolicy",
    "Policy",
    "Power",
    "Preferences",
    "QNetwork",
    "Sampler",
    "Schedule",
    "TabularPolicy",
    "Trajectories",
    "dvoretzky_conditions",
    "robbins_monro_conditions",
]

#: Imported when they are first asked for: they need torch, and a planner in a grid does not.
_NEED_TORCH = {
    "CategoricalQNetwork": "q_network",
    "DeterministicPolicy": "deterministic_policy",
    "EpochOrder": "gradient_agent",
    "Evaluation": "policy",
    "Experience": "trajectories",
    "GradientAgent": "gradient_agent",
    "MarkovPolicy": "markov_policy",
    "NetworkPolicy": "network_policy",
    "PADDING": "trajectories",
    "Policy": "policy",
    "Preferences": "trajectories",
    "QNetwork": "q_network",
    "Sampler": "sampler",
    "TabularPolicy": "tabular_policy",
    "Trajectories": "trajectories",
}

__getattr__ = lazy_names(__name__, _NEED_TORCH)
