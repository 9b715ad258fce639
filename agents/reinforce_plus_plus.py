"""REINFORCE++: PPO's objective without its critic, with the whole batch for a baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aligngym.agents.group_relative import episode_returns
from aligngym.agents.ppo import ClippedSurrogate
from aligngym.core.advantages import discounted_returns, group_normalised
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience


class ReinforcePlusPlus(ClippedSurrogate):
    """A_t = return from step t on, standardised over all actions of the batch.

    J. Hu, *REINFORCE++: a simple and efficient approach for aligning large language models*, 2025. A mean and a
    deviation of the whole batch, unlike a group's, say next to nothing about a single trajectory, so starts are not
    weighed by how uncertain their outcome is, and with the KL penalty in the reward the optimum is that of
    :class:`SoftValueIteration` as batches grow.

    Args:
        policy: what is trained; it needs no critic.
        sampler: of whole episodes.
        group_baseline: subtract the mean return of the group first, as the paper's variant for hard reasoning tasks
            does, beside ``kl="k2"``: groups in which all fare alike then teach nothing.
        discount: γ, 1 by default.
        normalise_advantages: by default over the ``"batch"``.
        options: of :class:`ClippedSurrogate` and :class:`PolicyGradient`.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        group_baseline: bool = False,
        discount: float = 1.0,
        normalise_advantages: str | None = "batch",
        **options: Any,
    ) -> None:
        super().__init__(policy, sampler, discount=discount, normalise_advantages=normalise_advantages, **options)
        self.group_baseline = group_baseline

    def advantages(self, batch: Experience) -> Tensor:
        to_go = discounted_returns(batch.rewards, batch.terminated, batch.truncated, self.discount)
        if not self.group_baseline:
            return to_go
        returns = episode_returns(batch, self.discount)
        return to_go - (returns - group_normalised(returns, batch.group, scale=False))[:, None]
