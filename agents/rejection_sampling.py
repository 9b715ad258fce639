"""Imitating one's own best."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aligngym.agents.group_relative import episode_returns
from aligngym.agents.policy_gradient import PolicyGradient
from aligngym.core.advantages import best_of_groups
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience


class RejectionSampling(PolicyGradient):
    """Raise the likelihood of the best trajectory of every group, and of no other: A = 1 for it, and 0 elsewhere.

    H. Dong et al., *RAFT: reward ranked finetuning for generative foundation model alignment*, 2023. In expectation the
    gradient is that of the likelihood of best-of-G samples, 1/G Σ_y P(y is best of G) ∇log π(y). The policy follows a
    distribution that moves away before it, and without a penalty ends up certain.

    Args:
        policy: what is trained; it needs no critic.
        sampler: of whole episodes in groups of two or more: ``EpisodeSampler(env, group_size=…)``.
        threshold: a group whose best return is not above this teaches nothing; with rewards of 0 and 1 it should be 0.
        discount: of an episode's return, 1 by default.
        normalise: by default ``"trajectories"``.
        options: of :class:`PolicyGradient`.

    Raises:
        ValueError: if the threshold is no number.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        threshold: float = -math.inf,
        discount: float = 1.0,
        normalise: str = "trajectories",
        **options: Any,
    ) -> None:
        if math.isnan(threshold):
            raise ValueError("threshold is a return to be exceeded, not nan")
        super().__init__(policy, sampler, discount=discount, normalise=normalise, **options)
        self.threshold = threshold

    def advantages(self, batch: Experience) -> Tensor:
        returns = episode_returns(batch, self.discount)
        chosen = torch.zeros_like(returns)
        # Of several that are equally good it is the first, which is as random as any.
        best = best_of_groups(returns, batch.group)
        chosen[best] = (returns[best] > self.threshold).to(chosen.dtype)
        return chosen
