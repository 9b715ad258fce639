"""Actor–critic with a critic of actions, learnt by Sarsa."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from aligngym.agents.policy_gradient import PolicyGradient
from aligngym.core.advantages import gae
from aligngym.core.markov_policy import MarkovPolicy, WeightsPolicy
from aligngym.core.networks import ObservationNetwork
from aligngym.core.policy import Evaluation, Policy
from aligngym.core.randomness import seeded
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Experience, Trajectories


class ActionValuePolicy(WeightsPolicy):
    """A policy beside a critic that gives Q(s, a) for every action.

    As an evaluation of actions that were taken, ``values`` are Q(s_t, a_t), and so the value after a step is
    Q(s_{t+1}, a_{t+1}), what Sarsa bootstraps from. Where a row was cut before a_{t+1} was chosen, it is its mean,
    Σ_a π(a|s_{t+1}) Q(s_{t+1}, a).

    Args:
        policy: what acts, over discrete actions, and without a critic.
        critic: a module that gives ``[N, A]`` for ``[N, …]`` encoded observations; by default a table of zeros where
            states are numbered, and two layers of 64 units otherwise, whose first weights come from ``seed``.
        seed: see ``critic``.

    Raises:
        TypeError: for a policy that does not act step by step, or whose actions are continuous.
        ValueError: for a policy that has a critic already.
    """

    def __init__(self, policy: Policy, critic: nn.Module | None = None, seed: int = 0) -> None:
        if not (isinstance(policy, MarkovPolicy) and policy.is_discrete):
            raise TypeError(f"values of actions need a policy over discrete actions, step by step, not {policy}")
        if policy.has_critic:
            raise ValueError("the policy has a critic V(s) of its own, which would not learn: make it with none")
        super().__init__(policy.observation_space, policy.action_space)
        self.policy = policy
        self.critic = (action_value_network(policy, seed) if critic is None else critic).to(policy.device)

    @property
    def has_critic(self) -> bool:
        return True

    def outputs(self, observations: Tensor) -> Tensor:
        return self.policy.outputs(observations)

    def reference_outputs(self, observations: Tensor) -> Tensor:
        return self.policy.reference_outputs(observations)

    def state_values(self, observations: Tensor) -> Tensor:
        return (self.outputs(observations).softmax(dim=-1) * self.critic(observations)).sum(dim=-1)

    def forward(self, trajectories: Trajectories, *, entropy: bool = False) -> Evaluation:
        if trajectories.action_mask is not None:
            raise TypeError("action masks are not supported beside values of actions: sample with action_masks=False")
        said = self.policy(trajectories, entropy=entropy)
        mask = trajectories.mask
        table = self.critic(trajectories.observations[mask])
        taken = table.gather(1, trajectories.actions[mask][:, None])[:, 0]
        return Evaluation(said.log_probs, said.entropy, torch.zeros_like(said.log_probs).masked_scatter(mask, taken))


def action_value_network(policy: MarkovPolicy, seed: int = 0) -> nn.Module:
    """Return a module that gives ``[N, A]`` for observations of a policy: a table of zeros, or a small network."""
    states, num_actions = policy.observation_space, policy.num_actions
    if isinstance(states, spaces.Discrete):
        return nn.Embedding.from_pretrained(torch.zeros(int(states.n), num_actions), freeze=False)
    with seeded(seed):
        body = ObservationNetwork(states, (64, 64), "tanh")
        return nn.Sequential(body, nn.Linear(body.num_features, num_actions))


class QActorCritic(PolicyGradient):
    """The actor follows E[∇ log π(a|s) Q(s, a)], and the critic learns Q by Sarsa.

    The actor's gradient is the policy gradient theorem as it stands: R. Sutton and A. Barto, *Reinforcement Learning*,
    2nd ed., section 13.2; S. Zhao, *Mathematical Foundations of Reinforcement Learning*, section 10.1 (QAC). The critic
    is drawn towards r + γ Q(s', a'). The action values of a wrong critic are a biased estimate, of less variance than
    returns.

    Args:
        policy: what is trained, over discrete actions, and without a critic.
        sampler: of short segments.
        critic: see :class:`ActionValuePolicy`, which the agent's ``policy`` becomes.
        baseline: subtract Σ_a π(a|s) Q(s, a) from Q(s, a), which changes no expectation and leaves less variance;
            QAC as in the book does not.
        trace: λ of the critic's targets, Sarsa(λ)'s; 0 is Sarsa.
        options: of :class:`PolicyGradient`.

    Raises:
        TypeError: for continuous actions, or a policy that does not act step by step.
        ValueError: for a policy with a critic, or a trace out of [0, 1].
    """

    policy: ActionValuePolicy

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        *,
        critic: nn.Module | None = None,
        baseline: bool = True,
        trace: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not 0 <= trace <= 1:
            raise ValueError(f"trace is λ in [0, 1], not {trace}")
        super().__init__(ActionValuePolicy(policy, critic, seed), sampler, seed=seed, **options)
        self.baseline, self.trace = baseline, trace

    def advantages(self, batch: Experience) -> Tensor:
        if not self.baseline:
            return batch.values
        means = self.policy.state_values(batch.observations[batch.mask])
        return batch.values - torch.zeros_like(batch.values).masked_scatter(batch.mask, means)

    def targets(self, batch: Experience, advantages: Tensor) -> Tensor:
        # With Q for values, GAE's errors are Sarsa's.
        ends = (batch.terminated, batch.truncated)
        errors = gae(batch.rewards, batch.values, batch.next_values, *ends, self.discount, self.trace, batch.mask)
        return batch.values + errors
