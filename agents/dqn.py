"""Deep Q-learning: Q-learning with a network, a memory, and a target that stands still for a while."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligngym.agents.environment_agent import EnvironmentAgent, means_of
from aligngym.agents.replay import NStepTransitions, ReplayBuffer, Transitions
from aligngym.core.callbacks import Metrics
from aligngym.core.policy import Policy
from aligngym.core.q_network import QNetwork, greedy_actions
from aligngym.core.randomness import derived_seed
from aligngym.core.sampler import Sampler
from aligngym.core.schedules import Decay, Schedule


class DQN(EnvironmentAgent[Transitions]):
    """Draw Q(s, a) towards R + γⁿ max_a' Q⁻(s', a'), on transitions drawn from a memory of what was done before.

    V. Mnih et al., *Human-level control through deep reinforcement learning*, 2015, algorithm 1. An iteration takes a
    sample of steps into the memory, and then ``gradient_steps`` steps on batches from it. The extensions that
    M. Hessel et al. put together in *Rainbow*, 2018, are options, most of them elsewhere:

    =============  ===============================================================  ================================
    double         Q⁻(s', argmax_a' Q(s', a')), H. van Hasselt et al., 2016         ``double=True``
    n-step         R = r₁ + γ r₂ + … + γⁿ⁻¹ rₙ                                      ``n=3``
    prioritised    T. Schaul et al., 2016                                           ``replay=PrioritizedReplay(…)``
    dueling        Z. Wang et al., 2016                                             ``QNetwork(…, dueling=True)``
    distribution   M. Bellemare et al., 2017                                        ``CategoricalQNetwork(…)``
    =============  ===============================================================  ================================

    A terminated episode is worth nothing more; a truncated one goes on being worth Q⁻(s', a').

    Args:
        policy: what is trained; its ε follows the schedule below.
        sampler: of a few steps of each copy.
        replay: the memory; a number is the capacity of a :class:`ReplayBuffer`.
        discount: γ in [0, 1].
        n: steps before Q⁻ is asked.
        double: let the trained network choose the action whose value the target network tells.
        batch_size: transitions in a gradient step.
        gradient_steps: in each iteration.
        learning_starts: transitions to remember before the first gradient step.
        target_every: gradient steps between two updates of the target network.
        target_rate: how far it goes towards the trained network then, in (0, 1]; 1 copies it.
        initial_epsilon: ε of the first action.
        final_epsilon: ε at last.
        epsilon_steps: environment steps in between, over which ε falls linearly.
        learning_rate: see :class:`GradientAgent`, as for the remaining arguments.
        max_grad_norm: see :class:`GradientAgent`.
        options: further arguments of :class:`GradientAgent`.

    Raises:
        TypeError: for a policy that is no :class:`QNetwork`.
        ValueError: for a number out of its range, a batch that the memory cannot hold, or several devices, which would
            each need a memory.
    """

    unit = "iteration"
    headline = ("return", "epsilon", "loss")

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        replay: ReplayBuffer | int = 100_000,
        discount: float = 0.99,
        n: int = 1,
        double: bool = False,
        batch_size: int = 64,
        gradient_steps: int = 1,
        learning_starts: int = 1000,
        target_every: int = 100,
        target_rate: float = 1.0,
        initial_epsilon: float = 1.0,
        final_epsilon: float = 0.05,
        epsilon_steps: int = 10_000,
        learning_rate: float | Schedule = 1e-3,
        max_grad_norm: float | None = 10.0,
        **options: Any,
    ) -> None:
        if not isinstance(policy, QNetwork):
            raise TypeError(f"{type(self).__name__} learns action values: it needs a QNetwork, not {policy!r}")
        for name, number in (
            ("batch_size", batch_size),
            ("gradient_steps", gradient_steps),
            ("target_every", target_every),
        ):
            if number < 1:
                raise ValueError(f"{name} is at least 1, not {number}")
        self.replay = ReplayBuffer(replay) if isinstance(replay, int) else replay
        if not batch_size <= learning_starts <= self.replay.capacity:
            raise ValueError(
                f"learning starts with at least a batch in a memory that holds it: batch_size={batch_size} ≤ "
                f"learning_starts={learning_starts} ≤ capacity={self.replay.capacity} does not hold"
            )
        if not 0 < target_rate <= 1:
            raise ValueError(f"target_rate is in (0, 1], not {target_rate}: at 0 the target would never move")
        if not 0 <= final_epsilon <= initial_epsilon <= 1 or epsilon_steps < 0:
            raise ValueError(
                f"epsilon falls from {initial_epsilon} to {final_epsilon} in {epsilon_steps} steps: take probabilities "
                "that do not rise, and a number of steps that is not negative"
            )
        super().__init__(policy, sampler, learning_rate=learning_rate, max_grad_norm=max_grad_norm, **options)
        if self.accelerator.num_processes > 1:
            raise ValueError(f"{type(self).__name__} runs on one device, not on {self.accelerator.num_processes}")
        self.policy: QNetwork = policy
        self.double = double
        self.transitions = NStepTransitions(discount, n)
        self.batch_size, self.gradient_steps, self.learning_starts = batch_size, gradient_steps, learning_starts
        self.target_every, self.target_rate = target_every, target_rate
        self.final_epsilon = final_epsilon
        self.exploration = Decay(initial_epsilon - final_epsilon, epsilon_steps)
        self.environment_steps = self.gradient_steps_done = 0
        policy.epsilon = self.epsilon

    @property
    def epsilon(self) -> float:
        """The probability of a random action now."""
        return self.final_epsilon + self.exploration(self.environment_steps)

    # The algorithm.

    def iterate(self) -> Metrics:
        """Act for a while, and learn from what is remembered; metrics are means over the gradient steps."""
        self.explore()
        metrics = {**self.sampler.metrics, "epsilon": self.policy.epsilon, "steps": self.environment_steps}
        if len(self.replay) < self.learning_starts:
            return metrics
        self.generator = np.random.default_rng(derived_seed(self.seed, self.iteration, 1))
        learned = [self.learn_from(self.next_batch()) for _ in range(self.gradient_steps)]
        return {**metrics, **means_of(learned)}

    def explore(self) -> None:
        """Take ε-greedy steps, and remember them."""
        self.policy.epsilon = self.epsilon
        trajectories = self.sampler.sample(self.policy, derived_seed(self.seed, self.iteration, 0))
        self.environment_steps += int(trajectories.mask.sum())
        self.replay.add(self.transitions(trajectories))

    def next_batch(self) -> Transitions:
        """Draw transitions from the memory."""
        return self.replay.sample(self.batch_size, self.generator)

    def learn_from(self, batch: Transitions) -> Metrics:
        """Take a gradient step, and bring the target network up to date when it is time."""
        metrics = self.step(batch)
        self.gradient_steps_done += 1
        if self.gradient_steps_done % self.target_every == 0:
            self.policy.update_target(self.target_rate)
        return metrics

    def losses(self, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[N]`` weighted losses, and how far predictions were off."""
        predicted = of_actions(self.policy.network(batch.observations), batch.actions)
        targets = self.targets(batch)
        losses = self.policy.regression(predicted, targets)
        surprises = self.policy.surprise(predicted.detach(), targets)
        self.replay.update(batch.rows, surprises)
        return losses if batch.weights is None else losses * batch.weights, {"td_error": surprises}

    @torch.no_grad()
    def targets(self, batch: Transitions) -> Tensor:
        """Return ``[N, …]``, R + γ' Q⁻(s', a') with the best allowed a', in the form that the policy predicts."""
        following = self.policy.target(batch.next_observations)
        judge = self.policy.network(batch.next_observations) if self.double else following
        best = greedy_actions(self.policy.means(judge), batch.next_action_mask)
        return self.policy.bootstrap(batch.returns, batch.discounts, of_actions(following, best))

    # Keeping.

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue: the memory and the sampler's episodes included."""
        return {
            **super().state_dict(),
            "replay": self.replay.state_dict(),
            "waiting": self.transitions.state_dict(),
            "environment_steps": self.environment_steps,
            "gradient_steps": self.gradient_steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.replay.load_state_dict(state["replay"])
        self.transitions.load_state_dict(state["waiting"])
        self.environment_steps, self.gradient_steps_done = state["environment_steps"], state["gradient_steps"]
        self.policy.epsilon = self.epsilon


def of_actions(outputs: Tensor, actions: Tensor) -> Tensor:
    """Return ``[N, …]``, the outputs that belong to ``[N]`` actions, from ``[N, A, …]``."""
    index = actions.view(-1, *[1] * (outputs.dim() - 1))
    return outputs.take_along_dim(index, dim=1).squeeze(1)
