"""Behaviour cloning: make what an expert did probable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aligngym.core.callbacks import Metrics
from aligngym.core.gradient_agent import EpochOrder, GradientAgent
from aligngym.core.policy import Policy
from aligngym.core.schedules import Schedule
from aligngym.core.trajectories import Experience, Trajectories


class BehaviourCloning(GradientAgent[Trajectories]):
    """Maximum likelihood of the demonstrated actions, −Σ_t w_t log π(a_t|s_t) / Σ_t w_t.

    D. Pomerleau, *ALVINN: an autonomous land vehicle in a neural network*, 1989; for a language model it is supervised
    fine-tuning. No reward is seen. The optimum of a table is the share of each action among those demonstrated in a
    state; where nothing was demonstrated the table stays as it is, which is how errors add up over an episode (S. Ross
    and D. Bagnell, *Efficient reductions for imitation learning*, 2010). A :class:`DeterministicPolicy` regresses.

    Args:
        policy: what is trained.
        demonstrations: trajectories; of an :class:`Experience` with ``weights``, every action counts that much.
        batch_size: trajectories of a gradient step, on all devices together; ``None``: all of them.
        learning_rate: see :class:`GradientAgent`, as for the remaining arguments.
        options: further arguments of :class:`GradientAgent`.

    Raises:
        ValueError: if nothing was demonstrated, a weight is negative or not finite, or a batch is more than there is.
    """

    def __init__(
        self,
        policy: Policy,
        demonstrations: Trajectories,
        *,
        batch_size: int | None = None,
        learning_rate: float | Schedule = 1e-3,
        **options: Any,
    ) -> None:
        weights = action_weights(demonstrations)
        if not (torch.isfinite(weights) & (weights >= 0)).all():
            wrong = float(weights[~(torch.isfinite(weights) & (weights >= 0))][0])
            raise ValueError(f"weights of demonstrations are finite and not negative, and one is {wrong}")
        self.demonstrations = demonstrations[weights.any(dim=1)]
        count = len(self.demonstrations)
        if not count:
            raise ValueError(f"{len(demonstrations)} demonstrations hold no action that counts: nothing to imitate")
        if batch_size is not None and batch_size > count:
            raise ValueError(
                f"batch_size={batch_size} is more than the {count} demonstrations with an action: lower it"
            )
        super().__init__(policy, learning_rate=learning_rate, **options)
        self.order = EpochOrder(count, count if batch_size is None else batch_size, self.seed)

    def next_batch(self) -> Trajectories:
        """Return the demonstrations of the current step."""
        return self.demonstrations[self.order(self.iteration)]

    def weight(self, batch: Trajectories) -> float:
        return float(action_weights(batch).sum())

    def losses(self, batch: Trajectories) -> tuple[Tensor, dict[str, Tensor]]:
        return -self.model(batch).log_probs * action_weights(batch), {}

    def act(self, observations: Any, *, greedy: bool = True) -> Any:
        """Let the policy act."""
        return self.policy.act(observations, greedy=greedy)[0]

    @torch.no_grad()
    def evaluate(self, demonstrations: Trajectories) -> Metrics:
        """Return the weighted mean of −log π(a|s) over ``demonstrations`` that it was not trained on, as ``loss``."""
        self.model.eval()
        pieces = demonstrations.to(self.accelerator.device).split(self.micro_batch_size or self.order.batch_size)
        total = sum(float(self.losses(piece)[0].sum()) for piece in pieces)
        return {"loss": total / self.weight(demonstrations)}


def action_weights(trajectories: Trajectories) -> Tensor:
    """Return ``[B, T]``, how much every action counts: 1 unless something else is said, 0 where none was taken."""
    weights = trajectories.weights if isinstance(trajectories, Experience) else None
    return trajectories.mask.float() if weights is None else weights * trajectories.mask
