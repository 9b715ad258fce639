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

from aligngym.agents import batch_metrics
from aligngym.agents.environment_agent import EnvironmentAgent, means_of
from aligngym.agents.kl_control import AdaptiveKL
from aligngym.core import objectives
from aligngym.core.callbacks import Metrics
from aligngym.core.policy import Policy
from aligngym.core.randomness import derived_seed
from aligngym.core.sampler import Sampler
from aligngym.core.schedules import Constant, Schedule, as_schedule
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
            steps can be shuffled (unless the method needs whole trajectories), and so many trajectories otherwise.
            ``None``: all of it.
        entropy_coefficient: c, or a schedule of it over iterations: the loss has −c·H(π(·|s)) for each action
            (R. Williams and J. Peng, 1991).
        value_coefficient: the loss has c·½(V(s) − target)² for each action, if the policy has a critic.
        normalise: what the sum of losses is divided by. ``"actions"``: their number. ``"trajectories"``: the number of
            trajectories, the gradient of J. ``"lengths"``: every trajectory by its own length first, and then by their
            number, as GRPO was published; it favours short successes and long failures.
        normalise_advantages: make advantages of mean 0 and standard deviation 1 over the ``"batch"``, over each
            ``"minibatch"``, or not (``None``).
        beta: strength of the KL penalty towards the policy's reference, in units of reward per nat: a number, a
            schedule over iterations, or an :class:`AdaptiveKL`.
        kl: ``"reward"`` subtracts β·log π/π_ref from the reward of each action, whose gradient is that of the
            regularised objective E[Σ r] − β KL(π‖π_ref) of whole trajectories; ``"k2"`` and ``"k3"`` add an estimate
            to the loss of each action, which leaves out what the action does to later divergence, and k3 has the
            gradient of another divergence: see :func:`aligngym.core.objectives.kl_loss`.
        measure_kl: report the KL to the reference also where ``beta`` is 0.
        importance_cap: ``None`` trusts the log-probabilities that a sampler gives. Samplers that compute in other
            numerics than the policy (another engine, a quantised copy) are better given a cap C: the policy is then
            asked for log π_old, and every action's loss weighted by min(π_old/π_sampler, C), truncated importance
            sampling. F. Yao et al., *Your efficient RL framework secretly brings you off-policy RL training*, 2025.
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
        beta: float | Schedule | AdaptiveKL = 0.0,
        kl: str = "reward",
        measure_kl: bool = False,
        importance_cap: float | None = None,
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
            ("beta", 0.0 if isinstance(beta, (Schedule, AdaptiveKL)) else beta),
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
        if importance_cap is not None and not importance_cap > 0:
            raise ValueError(
                f"importance_cap is the largest weight of an action, positive or None, not {importance_cap}"
            )
        super().__init__(policy, sampler, learning_rate=learning_rate, max_grad_norm=max_grad_norm, **options)
        self.discount = discount
        self.epochs, self.minibatch_size = epochs, minibatch_size
        self.entropy_schedule, self.value_coefficient = as_schedule(entropy_coefficient), value_coefficient
        self.normalise, self.normalise_advantages = normalise, normalise_advantages
        self.kl_control = beta if isinstance(beta, AdaptiveKL) else as_schedule(beta)
        self._adapted_beta = beta.initial if isinstance(beta, AdaptiveKL) else 0.0
        self.kl, self.uses_reference = kl, measure_kl or self.kl_control != Constant(0.0)
        self.importance_cap = importance_cap

    # What a method overrides.

    #: Whether the loss of an action depends on the rest of its trajectory, so that steps may not be taken out of it.
    whole_trajectories = False

    def advantages(self, batch: Experience) -> Tensor:
        """Return how much better each action was than usual: ``[B, T]``, or ``[B]`` for whole trajectories."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its advantages are")

    def objective(self, log_probs: Tensor, batch: Experience) -> Tensor:
        """Return ``[B, T]`` losses of actions with these log-probabilities; their gradient is the policy's.

        Trajectories without an advantage have none, so that they need not be evaluated.
        """
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

    @property
    def beta(self) -> float:
        """The strength of the KL penalty in this iteration."""
        control = self.kl_control
        return self._adapted_beta if isinstance(control, AdaptiveKL) else control(self.iteration)

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
        if isinstance(self.kl_control, AdaptiveKL):
            kl, rows = known["kl_to_reference"], len(batch) * self.accelerator.num_processes
            self._adapted_beta = self.kl_control.adapted(self.beta, kl, rows)
        return {**self.sampler.metrics, **means_of(collected), **known}

    def next_batch(self) -> Experience:
        """Let the policy act, and judge what it did."""
        seed = derived_seed(self.seed, self.iteration, self.accelerator.process_index)
        return self.judge(self.sampler.sample(self.policy, seed))

    @torch.no_grad()
    def judge(self, trajectories: Trajectories) -> Experience:
        """Return trajectories with values, advantages, targets and log-probabilities.

        The last may be missing from a batch that is for a single gradient step, during which π_old is π.
        """
        batch = Experience.of(trajectories)
        self.policy.eval()
        self._ask_policy(batch)
        if self.uses_reference and self.beta and self.kl == "reward":
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

    def _ask_policy(self, batch: Experience) -> None:
        """Fill in what the policy and its reference say of a batch, if it is needed and not known."""
        unknown = batch.log_probs is None
        several_steps = self.epochs > 1 or self.minibatch_size is not None
        needed = (
            self.policy.has_critic
            or (unknown and (several_steps or self.uses_reference))
            or (not unknown and self.importance_cap is not None)
        )
        said, reference = [], []
        # Both about the same piece in turn, because its rows need then be laid out only once.
        for rows in self.pieces(batch) if needed or self.uses_reference else []:
            piece = rows.to(batch.mask.device)
            if needed:
                said.append(self.policy(piece))
            if self.uses_reference:
                reference.append(self.policy.reference_log_probs(piece))
        if self.uses_reference:
            batch.reference_log_probs = torch.cat(reference)
        if not needed:
            return
        if self.importance_cap is not None:
            batch.sampler_log_probs = batch.log_probs
        if unknown or self.importance_cap is not None:
            batch.log_probs = torch.cat([evaluation.log_probs for evaluation in said])
        if self.policy.has_critic:
            batch.values = torch.cat([evaluation.values for evaluation in said])
            batch.next_values = self.policy.next_values(batch, batch.values)

    def state_dict(self) -> dict[str, Any]:
        """Return what :class:`EnvironmentAgent` does, and β where it adapts itself."""
        adapted = {"beta": self._adapted_beta} if isinstance(self.kl_control, AdaptiveKL) else {}
        return {**super().state_dict(), **adapted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._adapted_beta = state.get("beta", self._adapted_beta)

    def minibatches(self, batch: Experience) -> Iterator[Experience]:
        """Yield the pieces of a batch that one gradient step each sees, in a new order every epoch.

        Raises:
            ValueError: if a minibatch is larger than the batch.
        """
        # What advantages were made of is no longer needed, and copying it for every minibatch takes time.
        by_step = self.policy.markov and not self.whole_trajectories
        used_up = ["rewards", "terminated", "truncated", "next_values", "next_observations", "next_action_mask"]
        # Trajectories of a group share a start, which a policy that sees all of it need compute only once.
        used_up += ["group"] if by_step else []
        batch = dataclasses.replace(batch, **dict.fromkeys(used_up))  # type: ignore[arg-type]
        whole = batch.mask.numel() if by_step else len(batch)
        size = self.minibatch_size or whole
        if size > whole:
            what = "actions" if by_step else "trajectories"
            raise ValueError(f"minibatch_size={size} is more than the {whole} {what} of a batch: sample more")
        rows = batch.steps() if by_step else batch
        for epoch in range(self.epochs):
            if size == whole:
                yield self.weighted(rows)
                continue
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.iteration, epoch))
            order = torch.randperm(len(rows), generator=generator).to(rows.mask.device)
            for part in order.tensor_split(math.ceil(len(rows) / size)):
                yield self.weighted(rows[part if by_step else part.sort().values])

    def weighted(self, minibatch: Experience) -> Experience:
        """Say how much every action counts, standardise advantages if asked to, and leave out rows without any."""
        mask, shares = minibatch.mask, minibatch.shares
        weights = mask.to(shares.dtype)
        if self.normalise != "actions":
            totals = self.accelerator.reduce(torch.stack([weights.sum(), shares.sum()]), "sum")
            weights = (shares if self.normalise == "lengths" else weights) * totals[0] / totals[1]
        advantages = minibatch.advantages
        if self.normalise_advantages == "minibatch":
            advantages = standardised(advantages, mask)
        minibatch = dataclasses.replace(minibatch, weights=weights, advantages=advantages)
        return self._without_silent_rows(minibatch) if self.skips_silent_rows else minibatch

    @property
    def skips_silent_rows(self) -> bool:
        """Whether trajectories without an advantage are left out of the gradient, to which they add nothing.

        They do where the loss has other terms; and for Markov policies looking for them costs more than it saves.
        """
        others = self.policy.has_critic or self.entropy_coefficient or (self.beta and self.kl != "reward")
        return not (self.policy.markov or others)

    def _without_silent_rows(self, minibatch: Experience) -> Experience:
        heard = (minibatch.advantages != 0).any(dim=1)
        # All devices take part in every step, be it with nothing to say.
        heard[0] |= ~heard.any()
        rows = minibatch[heard]
        counts = torch.stack([rows.mask.sum(), minibatch.mask.sum()]).to(rows.weights.dtype)
        counts = self.accelerator.reduce(counts, "sum")
        # The sum of losses is divided by the actions that are left, and means what it meant.
        rows.weights = rows.weights * counts[0] / counts[1]
        return rows

    def weight(self, batch: Experience) -> float:
        """Return the number of actions."""
        return float(batch.mask.sum())

    def losses(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[B, T]`` weighted losses: the objective's, the critic's, the entropy's and the KL penalty's."""
        evaluation = self.model(batch, entropy=self.policy.markov or self.entropy_coefficient > 0)
        if batch.log_probs is None:
            batch = dataclasses.replace(batch, log_probs=evaluation.log_probs.detach())
        losses = self.objective(evaluation.log_probs, batch)
        metrics = self.diagnose(evaluation.log_probs.detach(), batch)
        if self.beta and self.kl != "reward":
            penalty = objectives.kl_loss(evaluation.log_probs, batch.log_probs, batch.reference_log_probs, self.kl)
            metrics["kl_loss"] = penalty.detach()
            losses = losses + self.beta * penalty
        if batch.sampler_log_probs is not None:
            losses = losses * self.importance(batch)
        if evaluation.entropy is not None:
            metrics["entropy"] = evaluation.entropy.detach()
            if self.entropy_coefficient:
                losses = losses - self.entropy_coefficient * evaluation.entropy
        if evaluation.values is not None:
            value_losses = self.value_losses(evaluation.values, batch)
            metrics["value_loss"] = value_losses.detach()
            losses = losses + self.value_coefficient * value_losses
        return losses * batch.weights, {name: values * batch.mask for name, values in metrics.items()}

    def importance(self, batch: Experience) -> Tensor:
        """Return ``[B, T]``, min(π_old/π_sampler, C), the weights of actions that were drawn in other numerics."""
        assert self.importance_cap is not None
        return objectives.truncated_ratio(batch.log_probs, batch.sampler_log_probs, self.importance_cap)

    def value_losses(self, values: Tensor, batch: Experience) -> Tensor:
        """Return ``[B, T]``, the critic's losses."""
        return objectives.value_regression(values, batch.targets)

    def diagnose(self, log_probs: Tensor, batch: Experience) -> dict[str, Tensor]:
        """Return ``[B, T]`` metrics of a gradient step: none here."""
        return {}

    def describe(self, batch: Experience) -> Metrics:
        """Return metrics of a whole batch: of its critic, its groups, its distance to the reference and its sampler."""
        metrics: Metrics = {}
        if batch.values is not None and batch.targets is not None:
            metrics["explained_variance"] = batch_metrics.explained_variance(batch)
        if batch.group is not None:
            metrics["silent_groups"] = batch_metrics.silent_groups(batch)
        if batch.sampler_log_probs is not None:
            metrics |= batch_metrics.sampler_mismatch(batch)
        if batch.reference_log_probs is not None:
            rows = batch_metrics.kl_to_reference(batch)
            penalty = 0.0 if self.kl == "reward" else self.beta * rows["kl_to_reference"]
            rows["regularised_return"] = batch.returns - penalty
            # All devices see the same, because the strength of the penalty may follow from it.
            means = self.accelerator.reduce(torch.stack([values.mean() for values in rows.values()]), "mean")
            metrics |= {**dict(zip(rows, means.tolist(), strict=True)), "beta": self.beta}
        return metrics


def standardised(values: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Return (x − mean) / (standard deviation + ε) over where ``mask`` is true, and 0 elsewhere."""
    chosen = values[mask]
    if len(chosen) < 2:
        return values * 0
    return torch.where(mask, (values - chosen.mean()) / (chosen.std() + epsilon), 0.0)
