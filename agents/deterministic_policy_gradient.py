"""The deterministic policy gradient: the critic's slope says which way to move the action."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligngym.agents.environment_agent import EnvironmentAgent, means_of
from aligngym.agents.replay import NStepTransitions, ReplayBuffer, Transitions
from aligngym.core import objectives
from aligngym.core.callbacks import Metrics
from aligngym.core.deterministic_policy import DeterministicPolicy
from aligngym.core.policy import Policy
from aligngym.core.randomness import derived_seed
from aligngym.core.sampler import Sampler
from aligngym.core.schedules import Schedule
from aligngym.core.trajectories import Rows


@dataclass
class Regression(Rows):
    """Transitions, and what the critic should say of them: ``[N]``."""

    transitions: Transitions
    targets: Tensor


class DPG(EnvironmentAgent[Regression]):
    """Deterministic policy gradient for continuous actions, off-policy, with replay and target networks.

        ∇J(θ) = E_s[∇_θ μ_θ(s) ∇_a Q(s, a)|_{a = μ_θ(s)}]

    D. Silver et al., *Deterministic policy gradient algorithms*, 2014, theorem 1 and, for states of another policy,
    eq. 15. The critic regresses Q(s, a) on r + γ Q'(s', μ'(s')), where Q' and μ' follow Q and μ slowly: T. Lillicrap
    et al., *Continuous control with deep reinforcement learning*, 2016 (DDPG). The three changes of S. Fujimoto et al.,
    *Addressing function approximation error in actor-critic methods*, 2018 (TD3), are options: two critics in the
    policy, of whose targets the smaller counts; ``policy_delay=2``; ``target_noise=0.2``.

    An iteration samples, and takes ``gradient_steps`` steps of critic and actor together on replayed transitions.

    Args:
        policy: what is trained, with its critics and its exploration.
        sampler: where transitions come from; an :class:`EnvironmentSampler` of one step is the papers'.
        discount: γ in [0, 1].
        learning_rate: see :class:`GradientAgent`; of actor and critic alike.
        batch_size: transitions of a gradient step.
        capacity: how many transitions are remembered, the latest.
        warm_up: transitions to collect before the first gradient step, at least ``batch_size``.
        gradient_steps: in an iteration.
        tau: τ in (0, 1]; after each step of the actor, targets move by this share towards what they follow. 1 is
            without target networks.
        policy_delay: the actor and the targets take one step for so many of the critic.
        target_noise: standard deviation of the noise on the target's action μ'(s'), as a share of half the box's
            width, cut off at 2.5 times that.
        max_grad_norm: see :class:`GradientAgent`, as for the remaining arguments.
        options: further arguments of :class:`GradientAgent`.

    Raises:
        TypeError: for a policy that is not deterministic.
        ValueError: for a number out of its range, or more than one device.
    """

    policy: DeterministicPolicy
    unit = "iteration"
    headline = ("return", "value", "value_loss")

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        discount: float = 0.99,
        learning_rate: float | Schedule = 1e-3,
        batch_size: int = 256,
        capacity: int = 100_000,
        warm_up: int = 1000,
        gradient_steps: int = 1,
        tau: float = 0.005,
        policy_delay: int = 1,
        target_noise: float = 0.0,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(policy, DeterministicPolicy):
            raise TypeError(
                f"DPG needs a DeterministicPolicy, for real-valued actions, not {type(policy).__name__}: PPO trains "
                "that, and DQN is for discrete actions"
            )
        if not 0 <= discount <= 1:
            raise ValueError(f"discount must be in [0, 1], not {discount}")
        if not 0 < tau <= 1:
            raise ValueError(f"tau must be in (0, 1], not {tau}: at 0 the targets would never follow")
        counts = {"batch_size": batch_size, "gradient_steps": gradient_steps, "policy_delay": policy_delay}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is at least 1, not {count}")
        if not batch_size <= warm_up <= capacity:
            raise ValueError(
                f"batch_size ≤ warm_up ≤ capacity must hold, not {batch_size}, {warm_up}, {capacity}: a batch is drawn "
                "from what was collected, and what was collected must be remembered"
            )
        if not 0 <= target_noise < math.inf:
            raise ValueError(f"target_noise is not negative, and this one is {target_noise}")
        super().__init__(policy, sampler, learning_rate=learning_rate, max_grad_norm=max_grad_norm, **options)
        if self.accelerator.num_processes > 1:
            raise ValueError(f"DPG learns on one device, not on {self.accelerator.num_processes}")
        self.discount = discount
        self.batch_size, self.warm_up, self.gradient_steps = batch_size, warm_up, gradient_steps
        self.tau, self.policy_delay, self.target_noise = tau, policy_delay, target_noise
        self.replay, self.transitions = ReplayBuffer(capacity), NStepTransitions(discount, n=1)
        self.target = copy.deepcopy(policy)
        self.improves = True

    def iterate(self) -> Metrics:
        """Let the policy act, then learn from what is remembered; metrics are means over gradient steps."""
        self.replay.add(self.transitions(self.sampler.sample(self.policy, derived_seed(self.seed, self.iteration))))
        if len(self.replay) < self.warm_up:
            return self.sampler.metrics
        collected: list[Metrics] = []
        for number in range(self.gradient_steps):
            self.improves = (self.iteration * self.gradient_steps + number) % self.policy_delay == 0
            collected.append(self.step(self.next_batch(number)))
            if self.improves:
                self.follow()
        return {**self.sampler.metrics, **means_of(collected)}

    def next_batch(self, number: int = 0) -> Regression:
        """Draw transitions for gradient step ``number`` of this iteration, and say what the critic should learn."""
        seed = derived_seed(self.seed, self.iteration, number)
        batch = self.replay.sample(self.batch_size, np.random.default_rng(seed)).to(self.policy.device)
        return Regression(batch, self.targets(batch, torch.Generator(self.policy.device).manual_seed(seed)))

    @torch.no_grad()
    def targets(self, batch: Transitions, generator: torch.Generator) -> Tensor:
        """Return ``[N]``, r + γ min_c Q'_c(s', μ'(s') + ε), where ε is cut-off noise; r where the task ended."""
        actions = self.target.outputs(batch.next_observations)
        if self.target_noise:
            noise = self.target_noise * torch.empty_like(actions).normal_(generator=generator).clamp(-2.5, 2.5)
            actions = self.policy.clipped(actions + noise * self.policy.half_width)
        following = self.target.action_values(batch.next_observations, actions).amin(dim=0)
        return batch.returns + batch.discounts * following

    def losses(self, batch: Regression) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[N]`` losses: every critic's ½(Q(s, a) − target)² and, at its turn, the actor's −Q(s, μ(s))."""
        observations = batch.transitions.observations
        # What the environment did is the clipped action.
        values = self.policy.action_values(observations, self.policy.clipped(batch.transitions.actions))
        losses = objectives.value_regression(values, batch.targets).sum(dim=0)
        metrics = {"value": values.detach().mean(dim=0), "value_loss": losses.detach()}
        if self.improves:
            losses = losses + self.policy_losses(observations)
        return losses, metrics

    def policy_losses(self, observations: Tensor) -> Tensor:
        """Return ``[N]`` losses whose gradient is −∇_θ μ(s) ∇_a Q(s, μ(s)): the actor's alone, not the critic's."""
        actions = self.policy.outputs(observations)
        point = actions.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.policy.critics[0](observations, point).sum(), point)
        return -(slope * actions).sum(dim=1)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the targets by a share τ towards the policy and its critics."""
        followed = self.policy.trainable_state()
        for name, target in self.target.trainable_state().items():
            target.lerp_(followed[name], self.tau)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, what is remembered included."""
        return {
            **super().state_dict(),
            "target": self.target.trainable_state(),
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.target.load_trainable_state(state["target"])
        self.replay.load_state_dict(state["replay"])
