"""Reinforcement learning: planners that know the model, and learners that do not."""

from typing import TYPE_CHECKING

from aligngym.agents.double_q_learning import DoubleQLearning
from aligngym.agents.dyna import DynaQ, DynaQPlus, PrioritizedDyna
from aligngym.agents.dynamic_programming import DynamicProgramming, PolicyIteration, ValueIteration
from aligngym.agents.eligibility_traces import SarsaLambda
from aligngym.agents.error_bounds import error_bound
from aligngym.agents.evaluation import evaluate_episodes
from aligngym.agents.features import (
    Aggregation,
    Coordinates,
    Features,
    FeatureTable,
    Fourier,
    OneHot,
    Polynomial,
    TileCoding,
)
from aligngym.agents.gauss_seidel import GaussSeidelValueIteration
from aligngym.agents.gradient_descent import GradientDescent, LeastSquares, MeanLoss
from aligngym.agents.gradient_td import GTD2, TDC
from aligngym.agents.learning_curves import draw_comparison, draw_learning_curves
from aligngym.agents.least_squares_td import LSTD
from aligngym.agents.linear_control import SemiGradientExpectedSarsa, SemiGradientQLearning, SemiGradientSarsa
from aligngym.agents.linear_prediction import SemiGradientTD, TrueOnlineTD
from aligngym.agents.modified_policy_iteration import ModifiedPolicyIteration
from aligngym.agents.monte_carlo import MCPrediction
from aligngym.agents.monte_carlo_control import MCBasic, MCEpsilonGreedy, MCExploringStarts
from aligngym.agents.n_step import NStepExpectedSarsa, NStepSarsa, TreeBackup
from aligngym.agents.noise import GaussianNoise, Noise, StateDependentNoise, StudentNoise, UniformNoise
from aligngym.agents.off_policy_monte_carlo import OffPolicyMCControl, OffPolicyMCPrediction
from aligngym.agents.policy_evaluation import PolicyEvaluation
from aligngym.agents.prioritized_sweeping import PrioritizedSweeping
from aligngym.agents.projected_bellman import ProjectedBellman
from aligngym.agents.soft_value_iteration import SoftValueIteration
from aligngym.agents.stochastic_approximation import IncrementalMean, RobbinsMonro, StochasticApproximation
from aligngym.agents.tabular_agent import TabularAgent
from aligngym.agents.td_lambda import OfflineLambdaReturn, TDLambda
from aligngym.agents.td_prediction import TD0, NStepTD, TDPrediction
from aligngym.agents.temporal_difference import ExpectedSarsa, QLearning, Sarsa, TDControl
from aligngym.core.lazy import lazy_names

if TYPE_CHECKING:
    from aligngym.agents.actor_critic import A2C
    from aligngym.agents.behaviour_cloning import BehaviourCloning
    from aligngym.agents.deterministic_policy_gradient import DPG
    from aligngym.agents.dqn import DQN
    from aligngym.agents.environment_sampler import EnvironmentSampler, EpisodeSampler
    from aligngym.agents.gradient_estimators import (
        CategoricalProblem,
        GaussianProblem,
        GumbelSoftmax,
        LeaveOneOut,
        Pathwise,
        ScoreFunction,
    )
    from aligngym.agents.group_fixed_point import GroupAdvantages, group_fixed_point
    from aligngym.agents.group_relative import CISPO, DAPO, GRPO, GSPO, RLOO
    from aligngym.agents.kl_control import AdaptiveKL
    from aligngym.agents.metric_training import MetricTraining, SurrogateTraining
    from aligngym.agents.model_sampler import ModelSampler
    from aligngym.agents.natural_policy_gradient import NaturalPolicyGradient
    from aligngym.agents.off_policy_actor_critic import BehaviourSampler, OffPolicyActorCritic
    from aligngym.agents.policy_gradient import PolicyGradient
    from aligngym.agents.ppo import PPO
    from aligngym.agents.q_actor_critic import QActorCritic
    from aligngym.agents.reinforce import REINFORCE
    from aligngym.agents.reinforce_plus_plus import ReinforcePlusPlus
    from aligngym.agents.rejection_sampling import RejectionSampling
    from aligngym.agents.replay import PrioritizedReplay, ReplayBuffer
    from aligngym.agents.trpo import TRPO

__all__ = [
    "A2C",
    "CISPO",
    "DAPO",
    "DPG",
    "DQN",
    "GRPO",
    "GSPO",
    "GTD2",
    "LSTD",
    "PPO",
    "REINFORCE",
    "RLOO",
    "TD0",
    "TDC",
    "TRPO",
    "AdaptiveKL",
    "Aggregation",
    "BehaviourCloning",
    "BehaviourSampler",
    "CategoricalProblem",
    "Coordinates",
    "DoubleQLearning",
    "DynaQ",
    "DynaQPlus",
    "DynamicProgramming",
    "EnvironmentSampler",
    "EpisodeSampler",
    "ExpectedSarsa",
    "FeatureTable",
    "Features",
    "Fourier",
    "GaussSeidelValueIteration",
    "GaussianNoise",
    "GaussianProblem",
    "GradientDescent",
    "GroupAdvantages",
    "GumbelSoftmax",
    "IncrementalMean",
    "LeastSquares",
    "LeaveOneOut",
    "MCBasic",
    "MCEpsilonGreedy",
    "MCExploringStarts",
    "MCPrediction",
    "MeanLoss",
    "MetricTraining",
    "ModelSampler",
    "ModifiedPolicyIteration",
    "NStepExpectedSarsa",
    "NStepSarsa",
    "NStepTD",
    "NaturalPolicyGradient",
    "Noise",
    "OffPolicyActorCritic",
    "OffPolicyMCControl",
    "OffPolicyMCPrediction",
    "OfflineLambdaReturn",
    "OneHot",
    "Pathwise",
    "PolicyEvaluation",
    "PolicyGradient",
    "PolicyIteration",
    "Polynomial",
    "PrioritizedDyna",
    "PrioritizedReplay",
    "PrioritizedSweeping",
    "ProjectedBellman",
    "QActorCritic",
    "QLearning",
    "ReinforcePlusPlus",
    "RejectionSampling",
    "ReplayBuffer",
    "RobbinsMonro",
    "Sarsa",
    "SarsaLambda",
    "ScoreFunction",
    "SemiGradientExpectedSarsa",
    "SemiGradientQLearning",
    "SemiGradientSarsa",
    "SemiGradientTD",
    "SoftValueIteration",
    "StateDependentNoise",
    "StochasticApproximation",
    "StudentNoise",
    "SurrogateTraining",
    "TDControl",
    "TDLambda",
    "TDPrediction",
    "TabularAgent",
    "TileCoding",
    "TreeBackup",
    "TrueOnlineTD",
    "UniformNoise",
    "ValueIteration",
    "draw_comparison",
    "draw_learning_curves",
    "error_bound",
    "evaluate_episodes",
    "group_fixed_point",
]

#: Imported when they are first asked for: they need torch, and a planner or a table does not.
_NEED_TORCH = {
    "A2C": "actor_critic",
    "AdaptiveKL": "kl_control",
    "BehaviourCloning": "behaviour_cloning",
    "BehaviourSampler": "off_policy_actor_critic",
    "CISPO": "group_relative",
    "CategoricalProblem": "gradient_estimators",
    "DAPO": "group_relative",
    "DPG": "deterministic_policy_gradient",
    "DQN": "dqn",
    "EnvironmentSampler": "environment_sampler",
    "EpisodeSampler": "environment_sampler",
    "GRPO": "group_relative",
    "GSPO": "group_relative",
    "GaussianProblem": "gradient_estimators",
    "GroupAdvantages": "group_fixed_point",
    "GumbelSoftmax": "gradient_estimators",
    "LeaveOneOut": "gradient_estimators",
    "MetricTraining": "metric_training",
    "ModelSampler": "model_sampler",
    "NaturalPolicyGradient": "natural_policy_gradient",
    "OffPolicyActorCritic": "off_policy_actor_critic",
    "PPO": "ppo",
    "Pathwise": "gradient_estimators",
    "PolicyGradient": "policy_gradient",
    "PrioritizedReplay": "replay",
    "QActorCritic": "q_actor_critic",
    "REINFORCE": "reinforce",
    "RLOO": "group_relative",
    "ReinforcePlusPlus": "reinforce_plus_plus",
    "RejectionSampling": "rejection_sampling",
    "ReplayBuffer": "replay",
    "ScoreFunction": "gradient_estimators",
    "SurrogateTraining": "metric_training",
    "TRPO": "trpo",
    "group_fixed_point": "group_fixed_point",
}

__getattr__ = lazy_names(__name__, _NEED_TORCH)
