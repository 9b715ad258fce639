"""Advantages without a critic: an episode against the others of its group."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aligngym.agents.policy_gradient import PolicyGradient
from aligngym.agents.ppo import ClippedSurrogate
from aligngym.core.advantages import discounted_returns, group_normalised, leave_one_out
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience


def episode_returns(batch: Experience, discount: float) -> Tensor:
    """Return ``[B]``, Σ_t γ^t r_t of each row.

    Raises:
        ValueError: if there are no groups to compare in.
    """
    if batch.group is None:
        raise ValueError("episodes are compared within groups: sample with a group_size")
    return discounted_returns(batch.rewards, batch.terminated, batch.truncated, discount)[:, 0]


class RLOO(PolicyGradient):
    """REINFORCE, leave one out: A = G − mean of the other returns of the group, for every action of an episode.

    W. Kool et al., *Buy 4 REINFORCE samples, get a baseline for free!*, 2019; A. Ahmadian et al., *Back to basics*,
    2024, for language models. The estimate of ∇J is unbiased.

    Args:
        policy: what is trained; it needs no critic.
        sampler: of whole episodes in groups of two or more: ``EpisodeSampler(env, group_size=…)``.
        discount: of an episode's return, 1 by default.
        normalise: by default ``"trajectories"``, for the gradient of J itself.
        options: of :class:`PolicyGradient`.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        discount: float = 1.0,
        normalise: str = "trajectories",
        **options: Any,
    ) -> None:
        super().__init__(policy, sampler, discount=discount, normalise=normalise, **options)

    def advantages(self, batch: Experience) -> Tensor:
        return leave_one_out(episode_returns(batch, self.discount), batch.group)


class GRPO(ClippedSurrogate):
    """Group relative policy optimisation: A = (G − mean of the group) / its standard deviation, in PPO's objective.

    Z. Shao et al., *DeepSeekMath*, 2024, section 4.1. Without ``scale`` and with ``normalise="trajectories"`` it is
    Dr. GRPO (Z. Liu et al., *Understanding R1-Zero-like training*, 2025), whose optimum is that of the return; dividing
    by the standard deviation weighs starts by how uncertain their outcome is, and has another one where the policy
    cannot be optimal everywhere.

    Args:
        policy: what is trained; it needs no critic.
        sampler: of whole episodes in groups of two or more: ``EpisodeSampler(env, group_size=…)``.
        discount: of an episode's return, 1 by default.
        scale: whether to divide by the group's standard deviation.
        normalise: ``"lengths"`` as published; see :class:`PolicyGradient`.
        options: of :class:`ClippedSurrogate` and :class:`PolicyGradient`.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        discount: float = 1.0,
        scale: bool = True,
        normalise: str = "lengths",
        **options: Any,
    ) -> None:
        super().__init__(policy, sampler, discount=discount, normalise=normalise, **options)
        self.scale = scale

    def advantages(self, batch: Experience) -> Tensor:
        return group_normalised(episode_returns(batch, self.discount), batch.group, self.scale)
