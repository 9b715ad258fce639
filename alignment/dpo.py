"""Direct preference optimisation, for any policy: a table on a grid, or an adapter on a language model.

A policy π has an implicit reward β log π(y|x)/π_ref(y|x); DPO fits the Bradley–Terry model of these rewards to the
preferences. With all pairs weighted by their probabilities its optimum is that of KL-regularised reinforcement
learning, π* ∝ π_ref exp(R/β) (R. Rafailov et al., *Direct preference optimization*, 2023, eq. 4 and 7). IPO and SimPO
have other optima: IPO regresses the log-ratio on the probability of being preferred, SimPO has no reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from aligngym.core import objectives
from aligngym.core.gradient_agent import EpochOrder, GradientAgent
from aligngym.core.policy import Policy
from aligngym.core.schedules import Schedule
from aligngym.core.statistics import wilson_interval
from aligngym.core.trajectories import Preferences, Rows


@dataclass(frozen=True)
class LossKind:
    """A preference loss, whether it compares with a reference, and which options it takes."""

    function: objectives.PreferenceLoss
    uses_reference: bool = True
    options: tuple[str, ...] = ()


LOSSES: Mapping[str, LossKind] = {
    "sigmoid": LossKind(objectives.sigmoid_preference, options=("label_smoothing",)),
    "robust": LossKind(objectives.robust_preference, options=("label_smoothing",)),
    "ipo": LossKind(objectives.ipo_preference),
    "hinge": LossKind(objectives.hinge_preference),
    "simpo": LossKind(objectives.simpo_preference, False, ("label_smoothing", "target_margin")),
}


class PreferenceSource(Protocol):
    """Anything that gives the preferences of the rows it is asked for, such as :class:`Preferences` itself."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Preferences: ...


@dataclass
class PreferenceBatch(Rows):
    """Preferences, and which rows of the dataset they are: ``[B]`` integers."""

    preferences: Preferences
    rows: Tensor


class DPO(GradientAgent[PreferenceBatch]):
    """Train a policy on preferences without a reward model.

    With h = log π(y⁺)/π_ref(y⁺) − log π(y⁻)/π_ref(y⁻), summed over a trajectory's actions, the losses are

    ===========  ==============================================  ================================================
    ``loss``     per pair                                        against trl 1.16
    ===========  ==============================================  ================================================
    sigmoid      −(1−ε) log σ(βh) − ε log σ(−βh)                 the same for ε = 0; trl's ignores label smoothing
    robust       the same with −ε, divided by 1−2ε               the same
    ipo          (h − 1/(2β))²                                   trl divides log-ratios by lengths; the paper not
    hinge        max(0, 1 − βh)                                  the same
    simpo        −log σ(βm − γ), m the difference of the means   trl's CPO trainer with its SimPO loss
                 of log π over tokens, without reference
    ===========  ==============================================  ================================================

    Args:
        policy: what is trained; it names its own reference.
        preferences: pairs to learn from.
        beta: strength of the regularisation towards the reference, in units of reward per nat.
        loss: one of the names above.
        label_smoothing: ε, the share of labels believed to be wrong, in [0, 1/2).
        target_margin: SimPO's γ.
        batch_size: pairs per optimiser step, on all devices together.
        learning_rate: see :class:`GradientAgent`, as for the remaining arguments.
        micro_batch_size: pairs computed at once on one device.
        max_grad_norm: see :class:`GradientAgent`.
        seed: of the order of the pairs, too.
        **options: further arguments of :class:`GradientAgent`.

    Raises:
        ValueError: for an unknown loss, an option the loss would ignore, or a number out of its range.
    """

    headline = ("loss", "rewards/accuracy", "rewards/margin")

    def __init__(
        self,
        policy: Policy,
        preferences: PreferenceSource,
        *,
        beta: float = 0.1,
        loss: str = "sigmoid",
        label_smoothing: float = 0.0,
        target_margin: float = 0.0,
        batch_size: int = 8,
        learning_rate: float | Schedule = 2e-4,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}: choose from {', '.join(LOSSES)}")
        if not beta > 0:
            raise ValueError(f"beta must be positive, not {beta}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is a share of flipped labels, in [0, 0.5), not {label_smoothing}")
        given = {"label_smoothing": label_smoothing, "target_margin": target_margin}
        for name, value in given.items():
            if value and name not in LOSSES[loss].options:
                raise ValueError(f"{name}={value} would be ignored: the loss {loss!r} has no such option")
        if len(preferences) == 0:
            raise ValueError("there are no preferences to learn from")
        super().__init__(
            policy,
            learning_rate=learning_rate,
            micro_batch_size=micro_batch_size,
            max_grad_norm=max_grad_norm,
            seed=seed,
            **options,
        )
        if batch_size % self.accelerator.num_processes:
            raise ValueError(f"batch_size={batch_size} does not divide by {self.accelerator.num_processes} devices")
        self.kind = LOSSES[loss]
        self.loss_options = {name: given[name] for name in self.kind.options}
        self.preferences, self.beta = preferences, beta
        self.order = EpochOrder(len(preferences), batch_size, seed)
        # log π_ref of both answers of every pair, [2, N], computed when a pair is first seen.
        self.reference = torch.full((2, len(preferences)), torch.nan)

    def learn(self, iterations: int | None = None, *, epochs: float | None = None, **options: Any) -> Self:
        """Go over the preferences ``epochs`` times, or do ``iterations`` steps; see :meth:`Agent.learn`.

        Raises:
            ValueError: unless exactly one of the two is given.
        """
        if (iterations is None) == (epochs is None):
            raise ValueError("say how long to learn: either iterations or epochs")
        if epochs is not None:
            iterations = round(epochs * self.order.steps_per_epoch)
        super().learn(iterations, **options)
        return self

    def next_batch(self) -> PreferenceBatch:
        """Return this process's pairs of the current step."""
        rows = self.order(self.iteration)
        processes = self.accelerator.num_processes
        if processes > 1:
            # Every process gets as many pairs; what does not divide waits for the next epoch's order.
            rows = rows[: max(len(rows) // processes, 1) * processes][self.accelerator.process_index :: processes]
        return PreferenceBatch(self.preferences[rows], rows)

    def weight(self, batch: PreferenceBatch) -> float:
        """Return the sum of the pairs' weights."""
        return float(batch.preferences.pair_weights.sum())

    def losses(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[B]`` weighted losses, and the implicit rewards of both sides."""
        pairs = batch.preferences
        scores = self.scores(pairs, self.cached_reference(batch))
        chosen, rejected = self.beta * scores.detach()
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": chosen - rejected,
            "rewards/accuracy": (chosen > rejected).float(),
        }
        weights = pairs.pair_weights
        weighted = {name: values * weights for name, values in metrics.items()}
        return self.preference_losses(scores) * weights, weighted

    def preference_losses(self, scores: Tensor) -> Tensor:
        """Return ``[B]`` losses of pairs with ``[2, B]`` scores; what a new preference algorithm overrides."""
        chosen, rejected = scores
        return self.kind.function(chosen - rejected, beta=self.beta, **self.loss_options)

    def scores(self, pairs: Preferences, reference: Tensor | None) -> Tensor:
        """Return ``[2, B]``, what the loss compares: log-ratios to the reference, or mean log-probabilities."""
        log_probs = self.model(rows := pairs.both()).log_probs.sum(dim=1).view(2, -1)
        return log_probs / rows.lengths.view(2, -1) if reference is None else log_probs - reference

    def reference_log_probs(self, pairs: Preferences) -> Tensor | None:
        """Return ``[2, B]`` log π_ref of the chosen and the rejected trajectories; ``None`` if the loss has none."""
        if not self.kind.uses_reference:
            return None
        return self.policy.reference_log_probs(pairs.both()).sum(dim=1).view(2, -1)

    def cached_reference(self, batch: PreferenceBatch) -> Tensor | None:
        """Return :meth:`reference_log_probs` of a batch, computed only the first time its pairs are seen."""
        where = batch.rows.cpu()
        known = self.reference[:, where]
        if self.kind.uses_reference and not known.isnan().any():
            return known.to(batch.rows.device)
        reference = self.reference_log_probs(batch.preferences)
        if reference is not None:
            self.reference[:, where] = reference.float().cpu()
        return reference

    def act(self, observations: Any, *, greedy: bool = True) -> Any:
        """Let the policy act."""
        return self.policy.act(observations, greedy=greedy)[0]

    @torch.no_grad()
    def evaluate(self, preferences: PreferenceSource) -> dict[str, float]:
        """Judge the policy's implicit rewards on preferences it was not trained on, and its reference's beside them.

        Returns:
            Means over pairs with their weights: ``loss``, ``margin`` and ``accuracy`` (the share of pairs whose chosen
            side has the larger implicit reward; ties count half), with its 95 % Wilson interval ``accuracy_low`` …
            ``accuracy_high``; ``chosen`` and ``rejected``, the mean log π of each side; and all of these for the
            reference, as ``reference_loss`` and so on. Its rewards are 0 for losses that use it, so all pairs tie.
        """
        self.model.eval()
        collected = []
        for rows in torch.arange(len(preferences)).split(self.micro_batch_size or self.order.batch_size):
            pairs = preferences[rows].to(self.accelerator.device)
            reference = self.policy.reference_log_probs(both := pairs.both())
            lengths = both.lengths.view(2, -1)
            sums = [log_probs.sum(dim=1).view(2, -1) for log_probs in (self.model(both).log_probs, reference)]
            collected.append(torch.stack([*sums, lengths, pairs.pair_weights.expand(2, -1)]))
        policy, reference, lengths, (weights, _) = torch.cat(collected, dim=2)

        if self.kind.uses_reference:
            own, before = policy - reference, torch.zeros_like(reference)
        else:
            own, before = policy / lengths, reference / lengths
        judged = self._judge(own, policy, weights)
        return judged | {f"reference_{name}": x for name, x in self._judge(before, reference, weights).items()}

    def _judge(self, scores: Tensor, log_probs: Tensor, weights: Tensor) -> dict[str, float]:
        """Return the metrics of :meth:`evaluate` from ``[2, N]`` scores and log-probabilities, and ``[N]`` weights."""

        def mean(values: Tensor) -> float:
            return float((values.double() * weights).sum() / weights.double().sum())

        margin = scores[0] - scores[1]
        accuracy = min(mean((margin.sign() + 1) / 2), 1.0)
        low, high = wilson_interval(accuracy * len(margin), len(margin))
        return {
            "loss": mean(self.preference_losses(scores)),
            "margin": self.beta * mean(margin),
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "chosen": mean(log_probs[0]),
            "rejected": mean(log_probs[1]),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, the cached reference included."""
        return {**super().state_dict(), "reference": self.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: if it belongs to another number of pairs or another policy.
        """
        if state["reference"].shape != self.reference.shape:
            saved, own = state["reference"].shape[1], len(self.preferences)
            raise ValueError(f"the saved run had {saved} pairs, and this one has {own}: did the data change?")
        super().load_state_dict(state)
        self.reference = state["reference"]
