"""Policies π(a|s): what acts, and what says how probable an action was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aligngym.core.callbacks import Callback
from aligngym.core.trajectories import Trajectories


@dataclass
class Evaluation:
    """What a policy says about actions that were taken, all ``[B, T]`` and 0 where the policy did not act.

    Attributes:
        log_probs: log π(a_t | s_t), differentiable.
        entropy: H(π(·|s_t)) in nats, if it was asked for.
        values: the critic's V(s_t), for policies that have one.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


class Policy(nn.Module, ABC):
    """A distribution over actions with parameters, and a frozen **reference** that it started from.

    Calling the policy on :class:`Trajectories` evaluates the actions in them, with gradients; the training loop does
    nothing else with it, so the same loop trains a table, a network and an adapter on a language model.

    Attributes:
        markov: whether an action's probability depends on the current observation alone, so that steps may be taken
            out of their trajectories.
        deterministic: whether an evaluation draws no random numbers (dropout does).
        callbacks: what the policy wants to be done around a learner's iterations.
    """

    markov: bool = False
    deterministic: bool = False
    callbacks: Sequence[Callback] = ()

    @abstractmethod
    def forward(self, trajectories: Trajectories, *, entropy: bool = False) -> Evaluation:
        """Evaluate the actions of ``trajectories``."""

    @abstractmethod
    def reference_log_probs(self, trajectories: Trajectories) -> Tensor:
        """Return ``[B, T]`` log π_ref(a_t | s_t) without gradients, 0 where ``mask`` is false."""

    @abstractmethod
    def act(
        self, observations: Any, *, greedy: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Any, Tensor]:
        """Choose an action for each observation; return the actions and their log-probabilities."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the policy in the format that others of its kind are read from."""

    @property
    def steps_at_once(self) -> int | None:
        """How many steps, observations and actions together, are best evaluated at once; ``None`` if any number is."""
        return None

    @property
    def has_critic(self) -> bool:
        """Whether the policy estimates the value of a state."""
        return False

    def next_values(self, trajectories: Trajectories, values: Tensor) -> Tensor:
        """Return ``[B, T]``, the critic's value of the state after each action.

        Within an episode it is the value of the next step at which the policy acts; what others do in between, such as
        the tokens of an environment in a conversation, is stepped over. At the end of a row or an episode nothing
        follows, and it is 0, unless the policy can look at what the environment showed last.

        Args:
            trajectories: the steps.
            values: ``[B, T]``, the critic's values of the states before each action.
        """
        length = values.shape[1]
        columns = torch.arange(length, device=values.device).where(trajectories.mask, length)
        upcoming = columns.flip(1).cummin(dim=1).values.flip(1)
        nothing = torch.zeros_like(values[:, :1])
        following = torch.cat([upcoming[:, 1:], torch.full_like(upcoming[:, :1], length)], dim=1)
        return torch.cat([values, nothing], dim=1).gather(1, following)

    def trainable_state(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name; for an adapter, not the model below it."""
        return {name: parameter.data for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`trainable_state` returned.

        Raises:
            ValueError: if names or shapes differ.
        """
        own = self.trainable_state()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise ValueError("the saved parameters are not those of this policy: was it made with other arguments?")
        for name, parameter in own.items():
            parameter.copy_(state[name])
