"""How strongly a policy is held to its reference: a coefficient that follows how far it has gone."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: The most by which the error of one batch counts.
LARGEST_ERROR = 0.2


@dataclass(frozen=True)
class AdaptiveKL:
    """A strength β of the KL penalty that grows while the policy is further from its reference than it should be.

    After every batch of n trajectories whose mean KL to the reference was KL,

        e = clip(KL / target − 1, −0.2, 0.2),  β ← β (1 + e n / horizon),

    a proportional controller in log-space. D. Ziegler et al., *Fine-tuning language models from human preferences*,
    2019, section 2.2, where n / horizon is K_β. There is no optimum to speak of while β moves; where it comes to rest,
    the optimum is that of its last value.

    Attributes:
        initial: β of the first batch, positive, in units of reward per nat.
        target: KL(π‖π_ref) of whole trajectories to hold, positive, in nats.
        horizon: trajectories in which an error of 1 would double β.

    Raises:
        ValueError: for a number that is not positive and finite.
    """

    initial: float = 0.2
    target: float = 6.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if not (number > 0 and math.isfinite(number)):
                raise ValueError(f"{name} of AdaptiveKL is positive and finite, not {number}")

    def adapted(self, beta: float, kl: float, trajectories: int) -> float:
        """Return β for the next batch.

        Args:
            beta: β of this batch.
            kl: the mean KL(π‖π_ref) of its trajectories, estimated, in nats.
            trajectories: n, how many there were.

        Raises:
            ValueError: if a single batch could change the sign of β.
        """
        if LARGEST_ERROR * trajectories >= self.horizon:
            raise ValueError(
                f"horizon={self.horizon} is too short for batches of {trajectories} trajectories: make it more than "
                f"{LARGEST_ERROR * trajectories:g}, or β could become 0"
            )
        error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
        return beta * (1 + error * trajectories / self.horizon)
