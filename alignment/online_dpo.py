"""Online direct preference optimisation: the policy writes the pairs, and rewards say which side is better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aligngym.agents.environment_agent import EnvironmentAgent
from aligngym.alignment.preference_objective import PreferenceBatch, PreferenceObjective
from aligngym.core.advantages import best_of_groups
from aligngym.core.callbacks import Metrics
from aligngym.core.policy import Policy
from aligngym.core.randomness import derived_seed
from aligngym.core.sampler import Sampler
from aligngym.core.schedules import Schedule
from aligngym.core.trajectories import Preferences, Trajectories


class OnlineDPO(PreferenceObjective, EnvironmentAgent[PreferenceBatch]):
    """DPO on pairs that the policy itself has just drawn: the best and the worst trajectory of each group.

    S. Guo et al., *Direct language model alignment from online AI feedback*, 2024; with larger groups, best against
    worst, it is the pairing of RSO and of iterative DPO (W. Xiong et al., 2024). A group whose returns are all alike
    says nothing, and has weight 0. Pairs from π instead of a fixed dataset change which pairs are looked at, and not
    what each of them says; with preferences that follow Bradley and Terry's model the optimum is DPO's.

    Args:
        policy: what is trained; it names its own reference.
        sampler: of whole trajectories in groups of two or more.
        learning_rate: see :class:`GradientAgent`.
        **options: of :class:`PreferenceObjective` and :class:`GradientAgent`; ``micro_batch_size`` counts pairs.

    Raises:
        ValueError: as DPO does.
    """

    unit = "iteration"
    headline = ("return", "loss", "rewards/accuracy")

    def __init__(
        self, policy: Policy, sampler: Sampler, *, learning_rate: float | Schedule = 2e-4, **options: Any
    ) -> None:
        super().__init__(policy, sampler, learning_rate=learning_rate, **options)

    def iterate(self) -> Metrics:
        """Sample, and take one step on the pairs."""
        return {**super().iterate(), **self.sampler.metrics}

    def next_batch(self) -> PreferenceBatch:
        """Let the policy act, and pair what it did."""
        seed = derived_seed(self.seed, self.iteration, self.accelerator.process_index)
        pairs = best_and_worst(self.sampler.sample(self.policy, seed))
        return PreferenceBatch(pairs, torch.arange(len(pairs), device=pairs.chosen.mask.device))

    def weight(self, batch: PreferenceBatch) -> float:
        """Return the number of pairs, at least 1: in a batch without any, nothing is learned."""
        return max(1.0, super().weight(batch))

    def reference_of(self, batch: PreferenceBatch) -> Tensor:
        return self.reference_log_probs(batch.preferences)


def best_and_worst(trajectories: Trajectories) -> Preferences:
    """Return one pair for each group: its trajectory of the largest return, and that of the smallest.

    Raises:
        ValueError: without groups, or for a group of one.
    """
    if trajectories.group is None:
        raise ValueError("pairs are made within groups: sample with a group_size of at least 2")
    groups, sizes = trajectories.group.unique(return_counts=True)
    if (sizes < 2).any():
        alone = int(groups[sizes < 2][0])
        raise ValueError(f"group {alone} has a single trajectory: sample with a group_size of at least 2")
    returns = trajectories.returns
    better, worse = (best_of_groups(sign * returns, trajectories.group) for sign in (1, -1))
    return Preferences(trajectories[better], trajectories[worse], (returns[better] > returns[worse]).float())
