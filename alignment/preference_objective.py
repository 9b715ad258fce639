"""What all learning from preferences has in common, whether the pairs are given or being sampled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aligngym.alignment.preference_losses import LOSSES, PairScores, loss_weights
from aligngym.core.gradient_agent import GradientAgent
from aligngym.core.policy import Policy
from aligngym.core.trajectories import Preferences, Rows


@dataclass
class PreferenceBatch(Rows):
    """Preferences, and which rows of the dataset they are: ``[B]`` integers."""

    preferences: Preferences
    rows: Tensor


class PreferenceObjective(GradientAgent[PreferenceBatch]):
    """A sum of preference losses, with or without a reference.

    Args:
        policy: what is trained; it names its own reference.
        source: where the pairs come from, for the class beside which this one is inherited.
        beta: strength of the regularisation towards the reference, in units of reward per nat; ORPO's λ.
        loss: a name, or a mix; see :class:`~aligngym.alignment.DPO`.
        label_smoothing: ε, the share of labels believed to be wrong, in [0, 1/2).
        target_margin: SimPO's γ.
        **options: of the class beside.

    Raises:
        ValueError: for an unknown loss, an option the loss would ignore, or a number out of its range.
    """

    headline = ("loss", "rewards/accuracy", "rewards/margin")

    def __init__(
        self,
        policy: Policy,
        source: Any,
        *,
        beta: float = 0.1,
        loss: str | Mapping[str, float] = "sigmoid",
        label_smoothing: float = 0.0,
        target_margin: float = 0.0,
        **options: Any,
    ) -> None:
        self.mix = loss_weights(loss)
        kinds = [LOSSES[name] for name in self.mix]
        if not beta > 0:
            raise ValueError(f"beta must be positive, not {beta}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is a share of flipped labels, in [0, 0.5), not {label_smoothing}")
        self.loss_options = {"label_smoothing": label_smoothing, "target_margin": target_margin}
        for name, value in self.loss_options.items():
            if value and not any(name in kind.options for kind in kinds):
                raise ValueError(f"{name}={value} would be ignored: the loss {loss!r} has no such option")
        super().__init__(policy, source, **options)  # type: ignore[call-arg]
        self.beta = beta
        self.uses_reference = any(kind.uses_reference for kind in kinds)
        # Implicit rewards are made of what the loss compares; in a mix, of log-ratios if one of its losses does.
        self.compares = "log_ratios" if self.uses_reference else kinds[0].compares

    @abstractmethod
    def reference_of(self, batch: PreferenceBatch) -> Tensor:
        """Return ``[2, B]`` log π_ref of the chosen and the rejected trajectories of a batch."""

    def weight(self, batch: PreferenceBatch) -> float:
        """Return the sum of the pairs' weights."""
        return float(batch.preferences.pair_weights.sum())

    def losses(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[B]`` weighted losses, and the implicit rewards of both sides."""
        pairs = batch.preferences
        reference = self.reference_of(batch) if self.uses_reference else None
        scores = self.scores(pairs, reference)
        chosen, rejected = self.beta * scores.compared.detach()
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": chosen - rejected,
            "rewards/accuracy": (chosen > rejected).float(),
        }
        weights = pairs.pair_weights
        weighted = {name: values * weights for name, values in metrics.items()}
        return self.preference_losses(scores) * weights, weighted

    def preference_losses(self, scores: PairScores) -> Tensor:
        """Return ``[B]`` losses of B pairs; what a new preference algorithm overrides.

        Args:
            scores: ``chosen, rejected = scores`` are what the loss compares: log-ratios to the reference, unless
                another loss was asked for.
        """
        losses = [w * LOSSES[name](scores, beta=self.beta, **self.loss_options) for name, w in self.mix.items()]
        return torch.stack(losses).sum(dim=0)

    def scores(self, pairs: Preferences, reference: Tensor | None) -> PairScores:
        """Return what the policy says of some pairs, beside ``[2, B]`` log π_ref."""
        rows = pairs.both()
        # The wrapped model speaks to other devices, which may have no part in an evaluation.
        model = self.model if torch.is_grad_enabled() else self.policy
        log_probs = model(rows).log_probs.sum(dim=1).view(2, -1)
        return PairScores(log_probs, rows.lengths.view(2, -1), reference, self.compares)

    def reference_log_probs(self, data: Preferences) -> Tensor:
        """Return ``[2, B]`` log π_ref of the chosen and the rejected trajectories."""
        return self.policy.reference_log_probs(data.both()).sum(dim=1).view(2, -1)
