"""REINFORCE: the score function times the return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aligngym.agents.policy_gradient import PolicyGradient
from aligngym.core.advantages import discounted_returns, leave_one_out
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience


class REINFORCE(PolicyGradient):
    """Monte Carlo policy gradient, A_t = G_t − b(s_t), from whole episodes.

    R. Williams, *Simple statistical gradient-following algorithms*, 1992; R. Sutton and A. Barto, *Reinforcement
    Learning*, 2nd ed., section 13.3, and 13.4 for the baseline. With a critic, b is V(s_t), learnt from the returns;
    without one it is 0, or what ``baseline`` says.

    Args:
        policy: what is trained, with a critic or not.
        sampler: of whole episodes (:class:`EpisodeSampler`); a segment's end is bootstrapped by the critic.
        baseline: without a critic, ``"none"``, or ``"leave_one_out"``: the mean return-to-go at the same step of the
            sample's other episodes.
        discount_states: multiply A_t by γ^t, without which the estimate is not the gradient of any function
            (C. Nota and P. Thomas, *Is the policy gradient a gradient?*, 2020), and which nearly everyone leaves out,
            because late steps then teach little.
        normalise: by default ``"trajectories"``, for the gradient of J itself.
        options: of :class:`PolicyGradient`.

    Raises:
        ValueError: for an unknown baseline, or one beside a critic.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        baseline: str = "none",
        discount_states: bool = False,
        normalise: str = "trajectories",
        **options: Any,
    ) -> None:
        if baseline not in ("none", "leave_one_out"):
            raise ValueError(f"baseline is 'none' or 'leave_one_out', not {baseline!r}")
        if baseline != "none" and policy.has_critic:
            raise ValueError(f"the policy has a critic, which is a baseline already: leave out baseline={baseline!r}")
        super().__init__(policy, sampler, normalise=normalise, **options)
        self.baseline, self.discount_states = baseline, discount_states

    def advantages(self, batch: Experience) -> Tensor:
        returns = discounted_returns(batch.rewards, batch.terminated, batch.truncated, self.discount, batch.next_values)
        if batch.values is not None:
            returns = returns - batch.values
        elif self.baseline == "leave_one_out":
            together = torch.zeros(len(batch), dtype=torch.long, device=returns.device)
            returns = torch.stack([leave_one_out(column, together) for column in returns.T], dim=1)
        if self.discount_states:
            returns = returns * self.discount ** torch.arange(returns.shape[1], device=returns.device)
        return returns
