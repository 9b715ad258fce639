"""Direct preference optimisation, for any policy: a table on a grid, or an adapter on a language model.

A policy π has an implicit reward β log π(y|x)/π_ref(y|x); DPO fits the Bradley–Terry model of these rewards to the
preferences. With all pairs weighted by their probabilities its optimum is that of KL-regularised reinforcement
learning, π* ∝ π_ref exp(R/β) (R. Rafailov et al., *Direct preference optimization*, 2023, eq. 4 and 7). Most other
losses have other optima: IPO regresses the log-ratio on the probability of being preferred; SimPO, CPO and ORPO have no
reference; APO-zero saturates, so that where labels disagree it goes to what the majority prefers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aligngym.alignment.dataset_agent import DatasetAgent, Source
from aligngym.alignment.preference_losses import PairScores
from aligngym.alignment.preference_objective import PreferenceBatch, PreferenceObjective
from aligngym.core.policy import Policy
from aligngym.core.schedules import Schedule
from aligngym.core.statistics import wilson_interval
from aligngym.core.trajectories import Preferences


class DPO(PreferenceObjective, DatasetAgent[PreferenceBatch]):
    """Train a policy on preferences without a reward model.

    With r = log π(y)/π_ref(y), summed over a trajectory's actions, its mark ⁺ for the chosen and ⁻ for the rejected
    side, h = r⁺ − r⁻, and log p = log π(y)/|y| without reference, the losses are

    ===========  ==============================================  ================================================
    ``loss``     per pair                                        against trl 1.16
    ===========  ==============================================  ================================================
    sigmoid      −(1−ε) log σ(βh) − ε log σ(−βh)                 the same for ε = 0; trl's ignores label smoothing
    robust       the same with −ε, divided by 1−2ε               the same
    ipo          (h − 1/(2β))²                                   trl divides log-ratios by lengths; the paper not
    hinge        max(0, 1 − βh)                                  the same
    simpo        −log σ(β(log p⁺ − log p⁻) − γ)                  trl's CPO trainer with its SimPO loss
    cpo          −log σ(β(log π⁺ − log π⁻)) − log p⁺             trl averages log p⁺ over the tokens of a batch
    orpo         −β log σ(log odds p⁺ − log odds p⁻) − log p⁺    trl's log p⁺ covers the prompt as well
    apo_zero     σ(−βr⁺) + σ(βr⁻)                                the same
    apo_down     σ(βr⁺) + σ(−βh)                                 the same
    bco_pair     −log σ(βr⁺) − log σ(−βr⁻)                       the same: without the paper's running shift
    nca_pair     −log σ(βr⁺) − ½ log σ(−βr⁺) − ½ log σ(−βr⁻)     the same
    nll          −log p⁺                                         trl's ``sft`` averages over the tokens of a batch
    ===========  ==============================================  ================================================

    A mix is a sum with weights: ``{"sigmoid": 1, "nll": 1}`` is RPO, and MPO is
    ``{"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1}``.

    Args:
        policy: what is trained; it names its own reference.
        preferences: pairs to learn from.
        beta: strength of the regularisation towards the reference, in units of reward per nat; ORPO's λ.
        loss: one of the names above, or a mix: a mapping, or text such as ``"sigmoid:0.8,nll:0.2"``.
        label_smoothing: ε, the share of labels believed to be wrong, in [0, 1/2).
        target_margin: SimPO's γ.
        batch_size: pairs per optimiser step, on all devices together.
        tokens_per_batch: take as many pairs as have this many tokens at most instead; see :class:`DatasetAgent`.
        learning_rate: see :class:`GradientAgent`, as for the remaining arguments.
        micro_batch_size: pairs computed at once on one device.
        max_grad_norm: see :class:`GradientAgent`.
        seed: of the order of the pairs, too.
        **options: further arguments of :class:`GradientAgent`.

    Raises:
        ValueError: for an unknown loss, an option the loss would ignore, or a number out of its range.
    """

    noun = "preferences"
    sides = 2

    def __init__(
        self,
        policy: Policy,
        preferences: Source[Preferences],
        *,
        batch_size: int = 8,
        tokens_per_batch: int | None = None,
        learning_rate: float | Schedule = 2e-4,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            policy,
            preferences,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            learning_rate=learning_rate,
            seed=seed,
            **options,
        )

    def next_batch(self) -> PreferenceBatch:
        """Return this process's pairs of the current step."""
        rows = self.next_rows()
        return PreferenceBatch(self.data[rows], rows)

    def reference_of(self, batch: PreferenceBatch) -> Tensor:
        return self.cached_reference(batch, batch.preferences)

    @torch.no_grad()
    def evaluate(self, preferences: Source[Preferences]) -> dict[str, float]:
        """Judge the policy's implicit rewards on preferences it was not trained on, and its reference's beside them.

        Returns:
            Means over pairs with their weights: ``loss``, ``margin`` and ``accuracy`` (the share of pairs whose chosen
            side has the larger implicit reward; ties count half), with its 95 % Wilson interval ``accuracy_low`` …
            ``accuracy_high``; ``chosen`` and ``rejected``, the mean log π of each side; and all of these for the
            reference, as ``reference_loss`` and so on. Its rewards are 0 for losses that use it, so all pairs tie.
        """
        self.model.eval()
        collected = []
        for pairs in self.all_pieces(preferences):
            reference = self.reference_log_probs(pairs)
            scores = self.scores(pairs, reference)
            weights = pairs.pair_weights.expand(2, -1)
            collected.append(torch.stack([scores.log_probs, reference, scores.lengths, weights]))
        policy, reference, lengths, (weights, _) = torch.cat(collected, dim=2)
        own, before = (PairScores(x, lengths, reference, self.compares) for x in (policy, reference))
        judged = self._judge(before, weights)
        return self._judge(own, weights) | {f"reference_{name}": value for name, value in judged.items()}

    def _judge(self, scores: PairScores, weights: Tensor) -> dict[str, float]:
        """Return the metrics of :meth:`evaluate` of N pairs with ``[N]`` weights."""

        def mean(values: Tensor) -> float:
            return float((values.double() * weights).sum() / weights.double().sum())

        chosen, rejected = scores
        margin = chosen - rejected
        accuracy = min(mean((margin.sign() + 1) / 2), 1.0)
        low, high = wilson_interval(accuracy * len(margin), len(margin))
        return {
            "loss": mean(self.preference_losses(scores)),
            "margin": self.beta * mean(margin),
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "chosen": mean(scores.log_probs[0]),
            "rejected": mean(scores.log_probs[1]),
        }
