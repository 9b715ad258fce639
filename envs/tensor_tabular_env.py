"""Copies of an environment that live in tensors, on whatever device computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from torch import Tensor

from aligngym.envs.tabular_mdp import TabularMDP


@dataclass
class TensorStep:
    """What one step of n copies did, all ``[n]``: the state it led to, also at the end of an episode, and so on."""

    next_states: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor


class TensorTabularEnv:
    """Copies of an exact model, stepped by looking things up in tables on a device: :class:`VectorTabularEnv` in torch.

    A copy whose episode is over is in a first state after the same step. Random numbers come from the generator that
    every call is given, so that the environment remembers its states alone.

    Attributes:
        states: ``[n]``, the current states.
        elapsed: ``[n]``, steps since each episode began.

    Args:
        model: an exact model, or an environment that has one.
        num_envs: n.
        max_episode_steps: steps after which an episode is truncated; ``None`` for no limit.
        device: where the tables and states are.

    Raises:
        ValueError: for fewer than one copy or step.
    """

    def __init__(
        self,
        model: TabularMDP | gymnasium.Env,
        num_envs: int,
        *,
        max_episode_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_envs < 1 or (max_episode_steps is not None and max_episode_steps < 1):
            raise ValueError(f"{num_envs} copies of at most {max_episode_steps} steps: both are at least 1")
        self.mdp = mdp = model if isinstance(model, TabularMDP) else TabularMDP.from_env(model)
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.device = torch.device(device)

        def table(values: Any, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(values, dtype=dtype, device=self.device)

        self._first = table(mdp.row_starts[:-1], torch.long)
        self._next_states = table(mdp.outcomes.next_states, torch.long)
        self._rewards = table(mdp.outcomes.rewards, torch.float32)
        self._terminal = table(mdp.terminal, torch.bool)
        # One row of outcomes beside the other, as they are looked up.
        self._thresholds = table(mdp.thresholds().T.copy(), torch.float32)
        starts, start_cumulative = mdp.starts
        self._start_states = table(starts, torch.long)
        self._start_thresholds = table(start_cumulative[:-1], torch.float32)
        self.states = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self.elapsed = torch.zeros_like(self.states)

    def reset(self, generator: torch.Generator) -> Tensor:
        """Begin an episode in every copy, and return ``[n]`` states."""
        self.states = self._draw_starts(generator)
        self.elapsed = torch.zeros_like(self.states)
        return self.states

    def step(self, actions: Tensor, generator: torch.Generator) -> TensorStep:
        """Take ``[n]`` actions within 0 … A − 1, which is not checked."""
        rows = self.states * self.mdp.num_actions + actions
        outcomes = self._first[rows]
        if self._thresholds.shape[1]:
            uniforms = torch.rand(self.num_envs, 1, generator=generator, device=self.device)
            outcomes = outcomes + (self._thresholds[rows] <= uniforms).sum(dim=1)
        next_states, self.elapsed = self._next_states[outcomes], self.elapsed + 1
        terminated = self._terminal[next_states]
        truncated = torch.zeros_like(terminated)
        if self.max_episode_steps is not None:
            truncated = (self.elapsed >= self.max_episode_steps) & ~terminated
        over = terminated | truncated
        self.states = torch.where(over, self._draw_starts(generator), next_states)
        self.elapsed = torch.where(over, 0, self.elapsed)
        return TensorStep(next_states, self._rewards[outcomes], terminated, truncated)

    def _draw_starts(self, generator: torch.Generator) -> Tensor:
        if len(self._start_states) == 1:
            return self._start_states.expand(self.num_envs)
        uniforms = torch.rand(self.num_envs, generator=generator, device=self.device)
        return self._start_states[torch.searchsorted(self._start_thresholds, uniforms, right=True)]
