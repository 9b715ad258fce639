"""Proximal policy optimisation: several gradient steps on one batch, none of which moves an action's odds far."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from aligngym.agents.actor_critic import A2C
from aligngym.agents.policy_gradient import PolicyGradient, standardised
from aligngym.core import objectives
from aligngym.core.callbacks import Metrics
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience


class ClippedSurrogate(PolicyGradient):
    """The part that PPO and GRPO have in common: the clipped objective, and when to stop going over a batch.

    Args:
        policy: what is trained.
        sampler: where experience comes from.
        clip: ε > 0; the objective ignores what moves π(a|s)/π_old(a|s) out of [1 − ε, 1 + ε'].
        clip_high: ε', ``clip`` by default; more is DAPO's "clip higher" (Q. Yu et al., 2025).
        target_kl: leave out the rest of a batch once the estimate of KL(π_old‖π) is above 1.5 times this, as OpenAI's
            Spinning Up does; ``None`` never does.
        options: of :class:`PolicyGradient`.

    Raises:
        ValueError: for a clip or a target that is not positive, or a clip of 1 or more.
    """

    headline = ("return", "entropy", "kl")

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        clip: float = 0.2,
        clip_high: float | None = None,
        target_kl: float | None = None,
        **options: Any,
    ) -> None:
        if not 0 < clip < 1:
            raise ValueError(f"clip is ε in (0, 1), not {clip}: at 0 nothing could change")
        for name, number in (("clip_high", clip_high), ("target_kl", target_kl)):
            if number is not None and not number > 0:
                raise ValueError(f"{name} is positive or None, not {number}")
        super().__init__(policy, sampler, **options)
        self.clip, self.clip_high, self.target_kl = clip, clip_high, target_kl

    def objective(self, log_probs: Tensor, batch: Experience) -> Tensor:
        return objectives.clipped_surrogate(log_probs, batch.log_probs, batch.advantages, self.clip, self.clip_high)

    def diagnose(self, log_probs: Tensor, batch: Experience) -> dict[str, Tensor]:
        """Return the k3 estimate of KL(π_old‖π), and which ratios are out of the clip range."""
        # Actions were drawn from π_old, so the roles are those of a KL from it.
        return {
            "kl": objectives.kl_estimate(batch.log_probs, log_probs),
            "clip_fraction": self.clipped((log_probs - batch.log_probs).exp()).float(),
        }

    def clipped(self, ratio: Tensor) -> Tensor:
        """Say which ratios are out of the clip range."""
        high = self.clip if self.clip_high is None else self.clip_high
        return (ratio < 1 - self.clip) | (ratio > 1 + high)

    def stop_early(self, metrics: Metrics) -> bool:
        return self.target_kl is not None and metrics["kl"] > 1.5 * self.target_kl


class PPO(ClippedSurrogate, A2C):
    """Proximal policy optimisation with generalised advantage estimates.

    J. Schulman et al., *Proximal policy optimization algorithms*, 2017. What the paper leaves open follows S. Huang et
    al., *The 37 implementation details of proximal policy optimization*, 2022: advantages are standardised in each
    minibatch (detail 7), gradients clipped to 0.5 (11), initialisation is orthogonal (2, in the policy), Adam's ε is
    1e-5 (3). Truncated episodes are bootstrapped, which is not among them and should be.

    Args:
        policy: what is trained; it needs a critic.
        sampler: of segments, 128 steps or more of each copy.
        trace: λ of the advantages.
        value_clip: ignore what moves the critic's value further than this from where it was (detail 9, which
            M. Andrychowicz et al., *What matters in on-policy reinforcement learning?*, 2021, found to hurt); ``None``
            does not.
        epochs: how often to go over a batch.
        minibatch_size: actions in a gradient step, or trajectories of a language model; ``None``: the whole batch.
        normalise_advantages: see :class:`PolicyGradient`.
        whiten_rewards: divide the rewards of a batch, the KL penalty included, by their standard deviation, without
            shifting their mean. S. Huang et al., *The N implementation details of RLHF with PPO*, 2023. A unit of
            reward, and so of value, then is another in every batch.
        options: of :class:`ClippedSurrogate` and :class:`PolicyGradient`.

    Raises:
        TypeError: if the policy has no critic.
        ValueError: for a number out of its range.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        trace: float = 0.95,
        value_clip: float | None = None,
        epochs: int = 4,
        minibatch_size: int | None = 256,
        normalise_advantages: str | None = "minibatch",
        whiten_rewards: bool = False,
        **options: Any,
    ) -> None:
        if value_clip is not None and not value_clip > 0:
            raise ValueError(f"value_clip is positive or None, not {value_clip}")
        super().__init__(
            policy,
            sampler,
            trace=trace,
            epochs=epochs,
            minibatch_size=minibatch_size,
            normalise_advantages=normalise_advantages,
            **options,
        )
        self.value_clip, self.whiten_rewards = value_clip, whiten_rewards

    def advantages(self, batch: Experience) -> Tensor:
        if self.whiten_rewards:
            # Only the deviations from the mean are divided, as in the code of RLHF's first authors.
            rewards = standardised(batch.rewards, batch.mask) + batch.rewards[batch.mask].mean() * batch.mask
            batch = dataclasses.replace(batch, rewards=rewards)
        return super().advantages(batch)

    def value_losses(self, values: Tensor, batch: Experience) -> Tensor:
        return objectives.value_regression(values, batch.targets, batch.values, self.value_clip)
