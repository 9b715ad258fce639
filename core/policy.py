"""Policies π(a|s): what acts, and what says how probable an action was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import gymnasium
import torch
from torch import Tensor, nn

from aligngym.core.spaces import table_shape
from aligngym.core.storage import load_tree, save_tree
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
    """

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


class TabularPolicy(Policy):
    """A softmax over a table: π(a|s) ∝ exp(logits[s, a]).

    Every policy with full support can be written so, which makes it the policy whose optimum can be reached exactly.
    Observations are state numbers, ``[B, T]``.

    Args:
        num_states: S, rows of the table.
        num_actions: A, columns of the table.
        reference: ``[S, A]`` probabilities, all positive, to start from and to be regularised towards; the uniform
            policy by default.

    Raises:
        ValueError: if the reference has another shape, a zero, or rows that do not sum to one.
    """

    reference_logits: Tensor

    def __init__(self, num_states: int, num_actions: int, reference: Any = None) -> None:
        super().__init__()
        if reference is None:
            reference = torch.full((num_states, num_actions), 1 / num_actions, dtype=torch.float64)
        probabilities = torch.as_tensor(reference, dtype=torch.float64)
        if probabilities.shape != (num_states, num_actions):
            raise ValueError(f"the reference has shape {tuple(probabilities.shape)}, not {(num_states, num_actions)}")
        if not (probabilities > 0).all() or not torch.allclose(probabilities.sum(1), torch.ones(()).double()):
            raise ValueError("every row of the reference must be positive and sum to one")
        logits = probabilities.log().float()
        self.logits = nn.Parameter(logits.clone())
        self.register_buffer("reference_logits", logits)

    @classmethod
    def for_env(cls, env: gymnasium.Env, reference: Any = None) -> Self:
        """Make a table that fits an environment with discrete observations and actions, both counted from 0.

        Raises:
            TypeError: if the environment's spaces are not of that kind.
        """
        return cls(*table_shape(env), reference)

    @property
    def probabilities(self) -> Tensor:
        """``[S, A]``, π(a|s), detached."""
        return self.logits.detach().softmax(dim=1)

    def forward(self, trajectories: Trajectories, *, entropy: bool = False) -> Evaluation:
        log_table = self.logits.log_softmax(dim=1)
        entropies = None
        if entropy:
            per_state = -(log_table.exp() * log_table).sum(dim=1)
            entropies = _look_up(per_state[:, None], trajectories, torch.zeros_like(trajectories.actions))
        return Evaluation(_look_up(log_table, trajectories, trajectories.actions), entropies)

    @torch.no_grad()
    def reference_log_probs(self, trajectories: Trajectories) -> Tensor:
        return _look_up(self.reference_logits.log_softmax(dim=1), trajectories, trajectories.actions)

    @torch.no_grad()
    def act(
        self, observations: Any, *, greedy: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        log_probs = self.logits.log_softmax(dim=1)[torch.as_tensor(observations, device=self.logits.device)]
        if greedy:
            actions = log_probs.argmax(dim=-1)
        else:
            flat = log_probs.exp().reshape(-1, log_probs.shape[-1])
            actions = torch.multinomial(flat, 1, generator=generator).reshape(log_probs.shape[:-1])
        return actions, log_probs.gather(-1, actions[..., None])[..., 0]

    def save(self, path: str | Path) -> None:
        save_tree(path, {"logits": self.logits, "reference_logits": self.reference_logits})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else.
        """
        tree = load_tree(path)
        if tree.keys() != {"logits", "reference_logits"}:
            raise ValueError(f"{path} holds no table, but {', '.join(map(str, tree))}")
        policy = cls(*tree["logits"].shape)
        policy.logits.data = tree["logits"]
        policy.reference_logits = tree["reference_logits"]
        return policy


def _look_up(table: Tensor, trajectories: Trajectories, actions: Tensor) -> Tensor:
    """Return ``table[s_t, a_t]``, 0 where the mask is false (padding there must not index the table)."""
    mask = trajectories.mask
    states = trajectories.observations.where(mask, 0)
    return torch.where(mask, table[states, actions.where(mask, 0)], 0.0)
