"""Advantages without a critic: an episode against the others of its group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aligngym.agents.policy_gradient import PolicyGradient
from aligngym.agents.ppo import ClippedSurrogate
from aligngym.core import objectives
from aligngym.core.advantages import discounted_returns, group_normalised, leave_one_out
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience


def episode_returns(batch: Experience, discount: float) -> Tensor:
    """Return ``[B]``, Σ_t γ^t r_t of each row.

    Raises:
        ValueError: if there are no groups to compare in, or one with a single member.
    """
    if batch.group is None:
        raise ValueError("episodes are compared within groups: sample with a group_size")
    groups, sizes = batch.group.unique(return_counts=True)
    if (sizes < 2).any():
        raise ValueError(
            f"group {int(groups[sizes.argmin()])} is a single episode, with nothing to be compared with: groups need "
            "at least two members, so sample with a group_size of 2 or more"
        )
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
    Dr. GRPO (Z. Liu et al., *Understanding R1-Zero-like training*, 2025), whose optimum is that of the return, and with
    the KL penalty in the reward that of :class:`SoftValueIteration`.

    With ``scale`` the optimum is another one. Let A_π(y) be the mean of the standardised return of a trajectory y among
    others that π draws. In expectation a first step follows Σ_y π(y) A_π(y) ∇log π(y), where Σ_y π(y) A_π(y) = 0, and
    rests, for a softmax over y,

    - with ``kl="reward"`` where A_π = 0 for returns R − β log π/π_ref, so where those are all the same:
      π ∝ π_ref exp(R/β), the regularised optimum. (A single policy for many starts weighs them by how uncertain their
      outcome is, and comes to rest elsewhere if it cannot be optimal in all of them.)
    - with ``kl="k3"``, as published, where A_π(y) − β (1 − π_ref(y)/π(y)) = 0: π(y) = π_ref(y) / (1 − A_π(y)/β).
    - with ``kl="k2"`` where A_π − β log π/π_ref is constant: π ∝ π_ref exp(A_π/β).

    M. Vojnovic and S. Yun, *What is the alignment objective of GRPO?*, 2025. :mod:`aligngym.agents.group_fixed_point`
    computes these policies. A group's mean includes the return itself, which scales all advantages by 1 − 1/G, so
    without ``scale`` a KL loss weighs as β G / (G − 1) would.

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


class DAPO(GRPO):
    """GRPO that lets improbable actions grow, and counts every action alike, however long its trajectory.

    Q. Yu et al., *DAPO: an open-source LLM reinforcement learning system at scale*, 2025, sections 3.1 and 3.3. Its
    dynamic sampling (3.2) is the sampler's to do, and its penalty for length (3.4) a reward's.

    Args:
        policy: see :class:`GRPO`.
        sampler: likewise.
        clip_high: ε' of the upper bound 1 + ε'.
        normalise: by default ``"actions"``.
        options: of :class:`GRPO`.
    """

    def __init__(
        self, policy: Policy, sampler: Sampler, *, clip_high: float = 0.28, normalise: str = "actions", **options: Any
    ) -> None:
        super().__init__(policy, sampler, clip_high=clip_high, normalise=normalise, **options)


class CISPO(GRPO):
    """GRPO whose bound is on the weight of an action and not on its gradient: −sg(min(ρ, ρ̄)) A log π(a|s).

    MiniMax, *MiniMax-M1*, 2025, section 3.1. Actions whose odds have moved far, the rare ones first, go on learning.

    Args:
        policy: see :class:`GRPO`.
        sampler: likewise.
        max_ratio: ρ̄. The paper gives none; 5 is D. Khatri et al.'s, *The art of scaling reinforcement learning compute
            for LLMs*, 2025.
        normalise: by default ``"actions"``.
        options: of :class:`GRPO`, without those of its clip.

    Raises:
        ValueError: for a ratio below 1.
    """

    def __init__(
        self, policy: Policy, sampler: Sampler, *, max_ratio: float = 5.0, normalise: str = "actions", **options: Any
    ) -> None:
        if not max_ratio >= 1:
            raise ValueError(f"max_ratio is the largest weight of an action, at least 1, not {max_ratio}")
        super().__init__(policy, sampler, normalise=normalise, **options)
        self.max_ratio = max_ratio

    def objective(self, log_probs: Tensor, batch: Experience) -> Tensor:
        return objectives.clipped_weight(log_probs, batch.log_probs, batch.advantages, self.max_ratio)

    def clipped(self, ratio: Tensor) -> Tensor:
        return ratio > self.max_ratio


class GSPO(GRPO):
    """GRPO with one ratio for a whole trajectory y, the geometric mean of its actions': (π(y)/π_old(y))^(1/|y|).

    C. Zheng et al., *Group sequence policy optimization*, 2025, eq. 5 to 7. A reward is of a trajectory, and so is what
    is clipped; ratios are close to 1, and so are the bounds.

    Args:
        policy: see :class:`GRPO`. Steps stay in their trajectories, so ``minibatch_size`` counts those of a table, too.
        sampler: likewise.
        clip: ε of the lower bound.
        clip_high: ε' of the upper bound.
        options: of :class:`GRPO`.
    """

    whole_trajectories = True

    def __init__(
        self, policy: Policy, sampler: Sampler, *, clip: float = 3e-4, clip_high: float | None = 4e-4, **options: Any
    ) -> None:
        super().__init__(policy, sampler, clip=clip, clip_high=clip_high, **options)

    def objective(self, log_probs: Tensor, batch: Experience) -> Tensor:
        log_ratio = mean_log_ratio(log_probs, batch.log_probs, batch.mask)
        return objectives.clipped_surrogate(
            log_ratio, torch.zeros_like(log_ratio), batch.advantages, self.clip, self.clip_high
        )

    def diagnose(self, log_probs: Tensor, batch: Experience) -> dict[str, Tensor]:
        """Return the KL per action, and which trajectories are out of the clip range."""
        ratio = mean_log_ratio(log_probs, batch.log_probs, batch.mask).exp()
        return {**super().diagnose(log_probs, batch), "clip_fraction": self.clipped(ratio).float()}

    def importance(self, batch: Experience) -> Tensor:
        assert self.importance_cap is not None
        return mean_log_ratio(batch.log_probs, batch.sampler_log_probs, batch.mask).exp().clamp(max=self.importance_cap)


def mean_log_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return ``[B, T]``, at every step of a row the mean of log π/π_old over the row's actions."""
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (((log_probs - old_log_probs) * mask).sum(dim=1, keepdim=True) / lengths).expand_as(mask)
