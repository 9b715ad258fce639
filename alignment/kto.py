"""Learning from thumbs up and thumbs down: single trajectories, each labelled desirable or not, for any policy.

KTO's optimum is not that of KL-regularised reinforcement learning. Its losses saturate on both sides: a trajectory that
is labelled desirable with probability p, and drawn with probability q, pulls with q(2p − 1)σ'(β(r − z₀)), whose sign
only asks what the majority says. The policy settles where π ∝ w, with w these pulls (with a large β there are several
such points), and what the majority dislikes dies out, while DPO keeps it in proportion (K. Ethayarajh et al., *KTO:
model alignment as prospect theoretic optimization*, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aligngym.alignment.dataset_agent import DatasetAgent, Source
from aligngym.alignment.token_rows import Labelled
from aligngym.core import objectives
from aligngym.core.policy import Policy
from aligngym.core.schedules import Schedule
from aligngym.core.statistics import wilson_interval
from aligngym.core.trajectories import PADDING, Rows, Trajectories


@dataclass
class LabelledBatch(Rows):
    """Labelled trajectories, and what must be known of the whole batch before it is computed in pieces.

    Attributes:
        labelled: B trajectories.
        rows: ``[B]``, which rows of the dataset they are.
        kl: ``[B]``, the reference point z₀, the same everywhere.
        shares: ``[B]``, how much of the batch has the label that the row has, by weight.
    """

    labelled: Labelled
    rows: Tensor
    kl: Tensor
    shares: Tensor


class KTO(DatasetAgent[LabelledBatch]):
    """Train a policy on trajectories that are each desirable or undesirable, which need not come in pairs.

    With r = log π(y|x)/π_ref(y|x), the loss of a desirable trajectory is λ_D σ(−β(r − z₀)), and that of an undesirable
    one λ_U σ(β(r − z₀)). The reference point z₀ is an estimate of KL(π‖π_ref) that has no gradient: r of mismatched
    pairs, each prompt with the completion of another row, averaged over the batch, and 0 if that is negative. It is
    the same for all pieces and devices that a batch is computed in. Where observations are states, an action belongs to
    its own state, and z₀ is the average of r over the batch itself.

    Against trl 1.16: the same loss; trl goes over the rows in their order, since it mismatches them beforehand.

    Args:
        policy: what is trained; it names its own reference.
        labelled: trajectories to learn from.
        beta: how fast gains and losses saturate, in units of reward per nat.
        desirable_weight: λ_D. The paper keeps λ_D·n_D/(λ_U·n_U) in [1, 3/2], n being how many there are of each.
        undesirable_weight: λ_U.
        batch_size: rows per optimiser step, on all devices together, at least two on each.
        tokens_per_batch: take as many rows as have this many tokens at most instead; see :class:`DatasetAgent`. The
            fewer rows a step has, the noisier is its z₀.
        learning_rate: see :class:`GradientAgent`, as for the remaining arguments.
        micro_batch_size: rows computed at once on one device.
        max_grad_norm: see :class:`GradientAgent`.
        seed: of the order of the rows, too.
        **options: further arguments of :class:`GradientAgent`.

    Raises:
        ValueError: for a number out of its range, or fewer than two rows.
    """

    headline = ("loss", "rewards/margin", "kl")
    noun = "labelled rows"

    def __init__(
        self,
        policy: Policy,
        labelled: Source[Labelled],
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        batch_size: int = 16,
        tokens_per_batch: int | None = None,
        learning_rate: float | Schedule = 2e-4,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        given = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, value in given.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        super().__init__(
            policy,
            labelled,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            learning_rate=learning_rate,
            micro_batch_size=micro_batch_size,
            max_grad_norm=max_grad_norm,
            seed=seed,
            **options,
        )
        processes = self.accelerator.num_processes
        if min(len(labelled), batch_size if tokens_per_batch is None else len(labelled)) < 2 * processes:
            raise ValueError(
                "KTO pairs each prompt with the completion of another row, so a batch needs at least two rows on each "
                f"device: batch_size is {batch_size}, with {len(labelled)} rows and {processes} devices"
            )
        self.beta, self.loss_options = beta, given

    def next_batch(self) -> LabelledBatch:
        """Return this process's rows of the current step, with z₀ of the whole batch."""
        rows = self.next_rows()
        labelled = self.data[rows]
        # A batch may have one row, such as the last of an epoch, which borrows the prompt of the dataset's next.
        others = self.data[rows.roll(-1) if len(rows) > 1 else (rows + 1) % len(self.data)]
        log_ratios = self._log_ratios(self.mismatched(labelled, others))
        weights = labelled.row_weights.to(log_ratios.device)
        desirable = labelled.desirable.to(log_ratios.device)
        sums = torch.stack([(log_ratios * weights).sum(), (weights * desirable).sum(), weights.sum()])
        log_ratio, good, total = self.accelerator.reduce(sums, "sum").cpu()
        kl = (log_ratio / total).clamp(min=0).expand(len(rows))
        return LabelledBatch(labelled, rows, kl, torch.where(labelled.desirable, good / total, 1 - good / total))

    def mismatched(self, labelled: Labelled, others: Labelled) -> Trajectories:
        """Return the completions of ``labelled``, each after the prompt of the same row of ``others``.

        A completion is cut off where it would be longer, prompt included, than both rows were by themselves.
        """
        own, other = labelled.trajectories, others.trajectories
        if self.policy.markov:
            return own
        prompts = [(rows.observations != PADDING).sum(dim=1) for rows in (own, other)]
        completions = [(rows.actions != PADDING).sum(dim=1) for rows in (own, other)]
        room = torch.maximum(prompts[0] + completions[0], prompts[1] + completions[1]) - prompts[1]
        fits = torch.arange(own.mask.shape[1], device=room.device) < room[:, None]
        return Trajectories(other.observations, own.actions.where(fits, PADDING), own.mask & fits)

    def weight(self, batch: LabelledBatch) -> float:
        """Return the sum of the rows' weights."""
        return float(batch.labelled.row_weights.sum())

    def losses(self, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[B]`` weighted losses, and implicit rewards as metrics.

        ``rewards/margin`` is the mean reward βr of the batch's desirable rows less that of the others.
        """
        labelled = batch.labelled
        reference = self.cached_reference(batch, labelled)[0]
        log_ratios = self.model(labelled.trajectories).log_probs.sum(dim=1) - reference
        losses = objectives.kto(log_ratios, labelled.desirable, batch.kl, **self.loss_options)
        rewards = self.beta * log_ratios.detach()
        signs = labelled.signs
        metrics = {
            "rewards/margin": signs * rewards / batch.shares,
            "rewards/accuracy": ((signs * (log_ratios.detach() - batch.kl)).sign() + 1) / 2,
            "kl": batch.kl,
        }
        weights = labelled.row_weights
        return losses * weights, {name: values * weights for name, values in metrics.items()}

    def reference_log_probs(self, data: Labelled) -> Tensor:
        """Return ``[1, B]`` log π_ref of the trajectories."""
        return self.policy.reference_log_probs(data.trajectories).sum(dim=1)[None]

    @torch.no_grad()
    def _log_ratios(self, trajectories: Trajectories) -> Tensor:
        """Return ``[B]`` log π(y|x)/π_ref(y|x) without dropout."""
        self.model.eval()
        pieces = [piece.to(self.accelerator.device) for piece in self.pieces(trajectories)]
        # One after the other, because what is made of a piece's rows serves both; and not by the wrapped model, which
        # speaks to other devices, because they may have no part in an evaluation.
        log_ratios = [self.policy(piece).log_probs - self.policy.reference_log_probs(piece) for piece in pieces]
        return torch.cat(log_ratios).sum(dim=1)

    @torch.no_grad()
    def evaluate(self, labelled: Source[Labelled]) -> dict[str, float]:
        """Judge the policy's implicit rewards on labelled rows it was not trained on, and its reference's beside them.

        Returns:
            Means over rows with their weights: ``loss``; ``accuracy`` (the share of rows whose r − z₀ has the sign that
            the label says; ties count half) with its 95 % Wilson interval ``accuracy_low`` … ``accuracy_high``;
            ``desirable`` and ``undesirable``, the mean log π of each kind; ``margin``, the difference of their mean
            implicit rewards; ``kl``, the reference point z₀ of all rows. NaN for a kind of which there are none. All of
            these for the reference, as ``reference_loss`` and so on: its rewards are 0, so all rows tie.
        """
        self.model.eval()
        collected, kl, count = [], 0.0, len(labelled)
        for own in self.all_pieces(labelled):
            log_probs = self.policy(own.trajectories).log_probs.sum(dim=1)
            reference = self.reference_log_probs(own)[0]
            collected.append(torch.stack([log_probs, reference, own.desirable.float(), own.row_weights]))
        for rows in torch.arange(count).split(self.rows_at_once):
            own, others = labelled[rows], labelled[(rows + 1) % count]
            log_ratios = self._log_ratios(self.mismatched(own, others))
            kl += float((log_ratios * own.row_weights.to(log_ratios.device)).sum())
        policy, reference, desirable, weights = torch.cat(collected, dim=1)
        point = max(0.0, kl / float(weights.sum()))
        judged = self._judge(reference, reference, 0.0, desirable.bool(), weights)
        own_judged = self._judge(policy, reference, point, desirable.bool(), weights)
        return own_judged | {f"reference_{name}": value for name, value in judged.items()}

    def _judge(
        self, log_probs: Tensor, reference: Tensor, kl: float, desirable: Tensor, weights: Tensor
    ) -> dict[str, float]:
        """Return the metrics of :meth:`evaluate` of N rows."""

        def mean(values: Tensor, where: Tensor | None = None) -> float:
            counted = weights.double() if where is None else weights.double() * where
            return float((values.double() * counted).sum() / counted.sum())

        log_ratios = log_probs - reference
        right = (log_ratios - kl).sign() * (2 * desirable.float() - 1)
        accuracy = min(mean((right + 1) / 2), 1.0)
        low, high = wilson_interval(accuracy * len(right), len(right))
        point = torch.tensor(kl, device=log_ratios.device)
        return {
            "loss": mean(objectives.kto(log_ratios, desirable, point, **self.loss_options)),
            "margin": self.beta * (mean(log_ratios, desirable) - mean(log_ratios, ~desirable)),
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "desirable": mean(log_probs, desirable),
            "undesirable": mean(log_probs, ~desirable),
            "kl": kl,
        }
