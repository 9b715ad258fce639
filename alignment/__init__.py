"""Language models as policies, preference data, and alignment trainers that also run on grids."""

from aligngym.alignment.data import TokenPreferences, load_preferences
from aligngym.alignment.dpo import DPO
from aligngym.alignment.language_policy import LanguagePolicy, default_lora
from aligngym.alignment.report import completions_side_by_side, kl_to_reference

__all__ = [
    "DPO",
    "LanguagePolicy",
    "TokenPreferences",
    "completions_side_by_side",
    "default_lora",
    "kl_to_reference",
    "load_preferences",
]
