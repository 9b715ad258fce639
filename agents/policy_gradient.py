"""What all policy-gradient methods share: act, judge the actions, make the better ones more probable.

∇J = E[Σ_t ∇ log π(a_t|s_t) A_t]: R. Sutton et al., *Policy gradient methods for reinforcement learning with function
approximation*, 2000. Methods differ in the advantages A and in the objective whose gradient this is; each overrides
one or both, and each trains any policy: a table, a network, a language model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aligngym.agents.environment_agent import EnvironmentAgent, means_of
from aligngym.core import objectives
from aligngym.core.callbacks import Metrics
from aligngym.core.policy import Policy
from aligngym.core.randomness import derived_seed
from aligngym.core.sampler import Sampler
from aligngym.core.schedules import Schedule, as_schedule
from aligngym.core.trajectories import Experience, Trajectories

#: What the losses of a batch's actions are divided by; see :class:`PolicyGradient`.
NORMALISATIONS = ("actions", "trajectories", "lengths")


class PolicyGradient(EnvironmentAgent[Experience]):
    """A template: an iteration samples, computes :meth:`advantages`, and steps along the gradient of :meth:`objective`.

    Args:
        policy: what is trained.
        sampler: where its experience comes from.
        discount: γ in [0, 1].
        learning_rate: see :class:`GradientAgent`.
        epochs: how often an iteration goes over its batch.
        minibatch_size: how much of the batch one gradient step sees: so many actions if the policy is Markov, whose
            steps can be shuffled, and so many trajectories otherwise. ``None``: all of it.
        entropy_coefficient: c, or a schedule of it over iterations: the loss has −c·H(π(·|s)) for each action
            (R. Williams and J. Peng, 1991).
        value_coefficient: the loss has c·½(V(s) − target)² for each action, if the policy has a critic.
        normalise: what the sum of losses is divided by. ``"actions"``: their number. ``"trajectories"``: the number of
            trajectories, the gradient of J. ``"lengths"``: every trajectory by its own length first, and then by their
            number, as GRPO was published; it favours short successes and long failures.
        normalise_advantages: make advantages of mean 0 and standard deviation 1 over the ``"batch"``, over each
            ``"minibatch"``, or not (``None``).
        beta: strength of the KL penalty towards the policy's reference, in units of reward per nat.
        kl: ``"reward"`` subtracts β·log π/π_ref from the reward of each action, whose gradient is that of the
            regularised objective; ``"k2"`` and ``"k3"`` add an estimate to the loss: see
            :func:`aligngym.core.objectives.kl_estimate`.
        max_grad_norm: see :class:`GradientAgent`, as for the remaining arguments.
        options: further arguments of :class:`GradientAgent`.

    Raises:
        ValueError: for a number out of its range or an unknown choice.
    """

    unit = "iteration"
    headline: tuple[str, ...] = ("return", "entropy", "loss")

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        discount: float = 0.99,
        learning_rate: float | Schedule = 3e-4,
        epochs: int = 1,
        minibatch_size: int | None = None,
        entropy_coefficient: float | Schedule = 0.0,
        value_coefficient: float = 0.5,
        normalise: str = "actions",
        normalise_advantages: str | None = None,
        beta: float = 0.0,
        kl: str = "reward",
        max_grad_norm: float | None = 0.5,
        **options: Any,
    ) -> None:
        if not 0 <= discount <= 1:
            raise ValueError(f"discount must be in [0, 1], not {discount}")
        if epochs < 1:
            raise ValueError(f"epochs is how often to go over a batch, at least 1, not {epochs}")
        if minibatch_size is not None and minibatch_size < 1:
            raise ValueError(f"minibatch_size is at least 1, or None for the whole batch, not {minibatch_size}")
        for name, number in (
            ("entropy_coefficient", 0.0 if isinstance(entropy_coefficient, Schedule) else entropy_coefficient),
            ("value_coefficient", value_coefficient),
            ("beta", beta),
        ):
            if not (number >= 0 and math.isfinite(number)):
                raise ValueError(f"{name} is not negative, and this one is {number}")
        for name, choice, choices in (
            ("normalise", normalise, NORMALISATIONS),
            ("normalise_advantages", normalise_advantages, ("batch", "minibatch", None)),
            ("kl", kl, ("reward", "k2", "k3")),
        ):
            if choice not in choices:
                raise ValueError(f"{name} is one of {', '.join(map(str, choices))}, not {choice!r}")
        super().__init__(policy, sampler, learning_rate=learning_rate, max_grad_norm=max_grad_norm, **options)
        self.discount = discount
        self.epochs, self.minibatch_size = epochs, minibatch_size
        self.entropy_schedule, self.value_coefficient = as_schedule(entropy_coefficient), value_coefficient
        self.normalise, self.normalise_advantages = normalise, normalise_advantages
        self.beta, self.kl = beta, kl

    # What a method overrides.

    def advantages(self, batch: Experience) -> Tensor:
        """Return how much better each action was than usual: ``[B, T]``, or ``[B]`` for whole trajectories."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its advantages are")

    def objective(self, log_probs: Tensor, batch: Experience) -> Tensor:
        """Return ``[B, T]`` losses of actions with these log-probabilities; their gradient is the policy's."""
        return objectives.score_function(log_probs, batch.advantages)

    def targets(self, batch: Experience, advantages: Tensor) -> Tensor:
        """Return ``[B, T]``, what the critic learns: A + V, the λ-return if the advantages are GAE."""
        return advantages + batch.values

    def stop_early(self, metrics: Metrics) -> bool:
        """Say whether the rest of the batch's minibatches should be left out."""
        return False

    @property
    def entropy_coefficient(self) -> float:
        """The entropy's coefficient in this iteration."""
        return self.entropy_schedule(self.iteration)

    # The loop.

    def iterate(self) -> Metrics:
        """Sample a batch, and go over it in minibatches; metrics are means over them."""
        batch = self.next_batch()
        collected: list[Metrics] = []
        for minibatch in self.minibatches(batch):
            collected.append(self.step(minibatch))
            if self.stop_early(collected[-1]):
                break
        known = {**self.describe(batch), "gradient_steps": len(collected)}
        return {**self.sampler.metrics, **means_of(collected), **known}

    def next_batch(self) -> Experience:
        """Let the policy act, and judge what it did."""
        seed = derived_seed(self.seed, self.iteration, self.accelerator.process_index)
        return self.judge(self.sampler.sample(self.policy, seed))

    @torch.no_grad()
    def judge(self, trajectories: Trajectories) -> Experience:
        """Return trajectories with log-probabilities, values, advantages and targets."""
        batch = Experience.of(trajectories)
        self.policy.eval()
        said = [self.policy(piece) for piece in batch.split(self.micro_batch_size or len(batch))]
        if batch.log_probs is None:
            batch.log_probs = torch.cat([evaluation.log_probs for evaluation in said])
        if self.policy.has_critic:
            batch.values = torch.cat([evaluation.values for evaluation in said])
            batch.next_values = self.policy.next_values(batch, batch.values)
        if self.beta:
            pieces = batch.split(self.micro_batch_size or len(batch))
            batch.reference_log_probs = torch.cat([self.policy.reference_log_probs(piece) for piece in pieces])
            if self.kl == "reward":
                batch.rewards = batch.rewards - self.beta * (batch.log_probs - batch.reference_log_probs)
        advantages = self.advantages(batch)
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand_as(batch.mask)
        batch.advantages = torch.where(batch.mask, advantages, 0.0)
        if self.policy.has_critic:
            batch.targets = self.targets(batch, batch.advantages)
        if self.normalise_advantages == "batch":
            batch.advantages = standardised(batch.advantages, batch.mask)
        return batch

    def minibatches(self, batch: Experience) -> Iterator[Experience]:
        """Yield the pieces of a batch that one gradient step each sees, in a new order every epoch.

        Raises:
            ValueError: if a minibatch is larger than the batch.
        """
        # What advantages were made of is no longer needed, and copying it for every minibatch takes time.
        used_up = (
            "rewards",
            "terminated",
            "truncated",
            "next_values",
            "next_observations",
            "next_action_mask",
            "group",
        )
        batch = dataclasses.replace(batch, **dict.fromkeys(used_up))  # type: ignore[arg-type]
        whole = batch.mask.numel() if self.policy.markov else len(batch)
        size = self.minibatch_size or whole
        if size > whole:
            what = "actions" if self.policy.markov else "trajectories"
            raise ValueError(f"minibatch_size={size} is more than the {whole} {what} of a batch: sample more")
        rows = batch.steps() if self.policy.markov else batch
        for epoch in range(self.epochs):
            if size == whole:
                yield self.weighted(rows)
                continue
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.iteration, epoch))
            order = torch.randperm(len(rows), generator=generator).to(rows.mask.device)
            for part in order.tensor_split(math.ceil(len(rows) / size)):
                yield self.weighted(rows[part])

    def weighted(self, minibatch: Experience) -> Experience:
        """Say how much every action counts, and standardise advantages where that is asked for."""
        mask, shares = minibatch.mask, minibatch.shares
        weights = mask.to(shares.dtype)
        if self.normalise != "actions":
            totals = self.accelerator.reduce(torch.stack([weights.sum(), shares.sum()]), "sum")
            weights = (shares if self.normalise == "lengths" else weights) * totals[0] / totals[1]
        advantages = minibatch.advantages
        if self.normalise_advantages == "minibatch":
            advantages = standardised(advantages, mask)
        return dataclasses.replace(minibatch, weights=weights, advantages=advantages)

    def weight(self, batch: Experience) -> float:
        """Return the number of actions."""
        return float(batch.mask.sum())

    def losses(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[B, T]`` weighted losses: the objective's, the critic's, the entropy's and the KL penalty's."""
        evaluation = self.model(batch, entropy=self.policy.markov or self.entropy_coefficient > 0)
        losses = self.objective(evaluation.log_probs, batch)
        metrics = self.diagnose(evaluation.log_probs.detach(), batch)
        if evaluation.entropy is not None:
            metrics["entropy"] = evaluation.entropy.detach()
            if self.entropy_coefficient:
                losses = losses - self.entropy_coefficient * evaluation.entropy
        if evaluation.values is not None:
            value_losses = self.value_losses(evaluation.values, batch)
            metrics["value_loss"] = value_losses.detach()
            losses = losses + self.value_coefficient * value_losses
        if self.beta and self.kl != "reward":
            penalty = objectives.kl_estimate(evaluation.log_probs, batch.reference_log_probs, self.kl)
            metrics["kl_to_reference"] = penalty.detach()
            losses = losses + self.beta * penalty
        return losses * batch.weights, {name: values * batch.mask for name, values in metrics.items()}

    def value_losses(self, values: Tensor, batch: Experience) -> Tensor:
        """Return ``[B, T]``, the critic's losses."""
        return objectives.value_regression(values, batch.targets)

    def diagnose(self, log_probs: Tensor, batch: Experience) -> dict[str, Tensor]:
        """Return ``[B, T]`` metrics of a gradient step: none here."""
        return {}

    def describe(self, batch: Experience) -> Metrics:
        """Return metrics of a whole batch: how much of its returns' variance the critic explained."""
        if batch.values is None or batch.targets is None:
            return {}
        targets, values = batch.targets[batch.mask], batch.values[batch.mask]
        variance = targets.var(correction=0)
        explained = 1 - (targets - values).var(correction=0) / variance if variance > 0 else torch.zeros(())
        return {"explained_variance": float(explained)}


def standardised(values: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Return (x − mean) / (standard deviation + ε) over where ``mask`` is true, and 0 elsewhere."""
    chosen = values[mask]
    if len(chosen) < 2:
        return values * 0
    return torch.where(mask, (values - chosen.mean()) / (chosen.std() + epsilon), 0.0)
