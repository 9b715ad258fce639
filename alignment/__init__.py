"""Language models as policies: rollouts, rewards, and trainers that are the agents of grids or run on grids too."""

from typing import TYPE_CHECKING

from aligngym.core.lazy import lazy_names

if TYPE_CHECKING:
    from aligngym.alignment.completions_log import CompletionsLog
    from aligngym.alignment.data import load_labelled, load_preferences
    from aligngym.alignment.demonstrations import Demonstrations, load_demonstrations
    from aligngym.alignment.dpo import DPO
    from aligngym.alignment.evaluation import CompletionEvaluation, evaluate_completions
    from aligngym.alignment.generation import Decoding
    from aligngym.alignment.kto import KTO
    from aligngym.alignment.language_policy import LanguagePolicy, default_lora
    from aligngym.alignment.multiple_choice import ChoiceEvaluation, evaluate_choices, load_questions
    from aligngym.alignment.online_dpo import OnlineDPO
    from aligngym.alignment.process_reward_model import ProcessRewardModel, ProcessRewardTraining
    from aligngym.alignment.prompt_sampler import Completions, PromptSampler
    from aligngym.alignment.prompts import load_prompts
    from aligngym.alignment.report import completions_side_by_side, kl_to_reference
    from aligngym.alignment.reward_model import RewardModel
    from aligngym.alignment.reward_training import RewardTraining
    from aligngym.alignment.rewards import RewardError, Rewards
    from aligngym.alignment.step_labels import StepLabels, load_step_labels
    from aligngym.alignment.supervised import SupervisedFineTuning, evaluate_demonstrations, supervised_fine_tuning
    from aligngym.alignment.text_actor import TextActor
    from aligngym.alignment.text_environment import TextEnvironmentSampler
    from aligngym.alignment.text_metrics import BLEU, ROUGE, ExactMatch, TokenF1
    from aligngym.alignment.token_rows import Labelled, TokenLabelled, TokenPreferences
    from aligngym.alignment.verifiers import LengthPenalty, final_answer, think_format
    from aligngym.alignment.vllm import VLLMWriter

__all__ = [
    "BLEU",
    "DPO",
    "KTO",
    "ROUGE",
    "ChoiceEvaluation",
    "CompletionEvaluation",
    "Completions",
    "CompletionsLog",
    "Decoding",
    "Demonstrations",
    "ExactMatch",
    "Labelled",
    "LanguagePolicy",
    "LengthPenalty",
    "OnlineDPO",
    "ProcessRewardModel",
    "ProcessRewardTraining",
    "PromptSampler",
    "RewardError",
    "RewardModel",
    "RewardTraining",
    "Rewards",
    "StepLabels",
    "SupervisedFineTuning",
    "TextActor",
    "TextEnvironmentSampler",
    "TokenF1",
    "TokenLabelled",
    "TokenPreferences",
    "VLLMWriter",
    "completions_side_by_side",
    "default_lora",
    "evaluate_choices",
    "evaluate_completions",
    "evaluate_demonstrations",
    "final_answer",
    "kl_to_reference",
    "load_demonstrations",
    "load_labelled",
    "load_preferences",
    "load_prompts",
    "load_questions",
    "load_step_labels",
    "supervised_fine_tuning",
    "think_format",
]

#: Imported when they are first asked for: trl's trainers alone take seconds.
_WHERE = {
    "BLEU": "text_metrics",
    "ChoiceEvaluation": "multiple_choice",
    "CompletionEvaluation": "evaluation",
    "Completions": "prompt_sampler",
    "CompletionsLog": "completions_log",
    "DPO": "dpo",
    "Decoding": "generation",
    "Demonstrations": "demonstrations",
    "ExactMatch": "text_metrics",
    "KTO": "kto",
    "Labelled": "token_rows",
    "LanguagePolicy": "language_policy",
    "LengthPenalty": "verifiers",
    "OnlineDPO": "online_dpo",
    "ProcessRewardModel": "process_reward_model",
    "ProcessRewardTraining": "process_reward_model",
    "PromptSampler": "prompt_sampler",
    "ROUGE": "text_metrics",
    "RewardError": "rewards",
    "RewardModel": "reward_model",
    "RewardTraining": "reward_training",
    "Rewards": "rewards",
    "StepLabels": "step_labels",
    "SupervisedFineTuning": "supervised",
    "TextActor": "text_actor",
    "TextEnvironmentSampler": "text_environment",
    "TokenF1": "text_metrics",
    "TokenLabelled": "token_rows",
    "TokenPreferences": "token_rows",
    "VLLMWriter": "vllm",
    "completions_side_by_side": "report",
    "default_lora": "language_policy",
    "evaluate_choices": "multiple_choice",
    "evaluate_completions": "evaluation",
    "evaluate_demonstrations": "supervised",
    "final_answer": "verifiers",
    "kl_to_reference": "report",
    "load_demonstrations": "demonstrations",
    "load_labelled": "data",
    "load_preferences": "data",
    "load_prompts": "prompts",
    "load_questions": "multiple_choice",
    "load_step_labels": "step_labels",
    "supervised_fine_tuning": "supervised",
    "think_format": "verifiers",
}

__getattr__ = lazy_names(__name__, _WHERE)
