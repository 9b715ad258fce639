"""Trust region policy optimisation: a natural step, shortened until it keeps what it promises."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aligngym.agents.natural_policy_gradient import NaturalPolicyGradient
from aligngym.core import objectives
from aligngym.core.callbacks import Metrics
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience


class TRPO(NaturalPolicyGradient):
    """A natural step after which the mean KL(π_old‖π) is at most δ and the surrogate E[π/π_old · A] is better.

    The natural step satisfies both to second and first order only, so it is shortened by a constant factor until it
    satisfies them exactly on the batch; if it never does, nothing moves. J. Schulman et al., *Trust region policy
    optimization*, 2015, eq. 14 and appendix C.

    Args:
        policy: see :class:`NaturalPolicyGradient`.
        sampler: likewise.
        shrink: in (0, 1), by how much the step is shortened each time.
        tries: lengths to try, the full one included.
        options: of :class:`NaturalPolicyGradient`; ``max_kl`` is δ.

    Raises:
        TypeError: as there.
        ValueError: as there, or for a number out of its range.
    """

    def __init__(
        self, policy: Policy, sampler: Sampler, *, shrink: float = 0.8, tries: int = 10, **options: Any
    ) -> None:
        if not 0 < shrink < 1:
            raise ValueError(f"shrink is a factor between 0 and 1, not {shrink}")
        if tries < 1:
            raise ValueError(f"tries is how many lengths of a step to try, at least 1, not {tries}")
        super().__init__(policy, sampler, **options)
        self.shrink, self.tries = shrink, tries

    def objective(self, log_probs: Tensor, batch: Experience) -> Tensor:
        # The line search bounds the ratio; a clip of infinity is none.
        return objectives.clipped_surrogate(log_probs, batch.log_probs, batch.advantages, clip=math.inf)

    @torch.no_grad()
    def move(self, batch: Experience, step: Tensor) -> Metrics:
        """Add the longest of the shortened steps that keeps both promises, or none."""
        start, old = self._flat(self.actor), self.policy.distribution(batch)
        before, _ = self.actor_losses(batch)
        for attempt in range(self.tries):
            self._set(start + self.shrink**attempt * step)
            divergence = float(self._mean_divergence(old, self.policy.distribution(batch), batch))
            improvement = float((before - self.actor_losses(batch)[0]).sum()) / self.weight(batch)
            if divergence <= self.max_kl and improvement > 0:
                return {"kl": divergence, "improvement": improvement, "tries": attempt + 1}
        self._set(start)
        return {"kl": 0.0, "improvement": 0.0, "tries": self.tries}
