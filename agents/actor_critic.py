"""Advantage actor–critic: the critic says how much better an action was than usual."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aligngym.agents.policy_gradient import PolicyGradient
from aligngym.core.advantages import gae
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience


class A2C(PolicyGradient):
    """Actor and critic, one gradient step for each sample, with generalised advantage estimates.

    V. Mnih et al., *Asynchronous methods for deep reinforcement learning*, 2016, in its synchronous form; the advantage
    is J. Schulman et al.'s (2016) with λ = ``trace``: 1 is the paper's n-step return, 0 the one-step TD error of
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., section 13.5.

    Args:
        policy: what is trained; it needs a critic.
        sampler: of short segments, 5 steps in the paper.
        trace: λ in [0, 1].
        options: of :class:`PolicyGradient`.

    Raises:
        TypeError: if the policy has no critic.
        ValueError: for a trace out of [0, 1].
    """

    def __init__(self, policy: Policy, sampler: Sampler, *, trace: float = 1.0, **options: Any) -> None:
        if not policy.has_critic:
            raise TypeError(f"{type(self).__name__} needs a critic: make the policy with one")
        if not 0 <= trace <= 1:
            raise ValueError(f"trace is λ in [0, 1], not {trace}")
        super().__init__(policy, sampler, **options)
        self.trace = trace

    def advantages(self, batch: Experience) -> Tensor:
        return gae(
            batch.rewards,
            batch.values,
            batch.next_values,
            batch.terminated,
            batch.truncated,
            self.discount,
            self.trace,
            batch.mask,
        )
