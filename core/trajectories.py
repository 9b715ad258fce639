"""Experience, batch first, in one dataclass for grids and language models."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

#: Fills positions of ``observations`` and ``actions`` that hold nothing. It is no state, action or token, so padding
#: can never be mistaken for a real end-of-sequence token.
PADDING = -1


@functools.cache
def _field_names(kind: type[Rows]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))  # type: ignore[arg-type]


class Rows:
    """A dataclass whose tensors share their first axis, and which can be sliced, split, joined and moved as one.

    Fields are tensors, other ``Rows``, or ``None``.
    """

    def __len__(self) -> int:
        return next(len(value) for value in self._values() if value is not None)

    def _values(self) -> Iterator[Tensor | Rows | None]:
        return (getattr(self, name) for name in _field_names(type(self)))  # type: ignore[arg-type]

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """Return the rows that an index tensor, a boolean mask or a slice selects."""
        return type(self)(*(None if value is None else value[rows] for value in self._values()))

    def split(self, size: int) -> Iterator[Self]:
        """Yield consecutive pieces of at most ``size`` rows."""
        if size >= len(self):
            return iter([self])
        return (self[slice(start, start + size)] for start in range(0, len(self), size))

    def to(self, device: torch.device | str) -> Self:
        """Return the same rows on ``device``."""
        return type(self)(*(None if value is None else value.to(device) for value in self._values()))

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Join parts along the rows; ``[B, T]`` tensors of different lengths T are filled up on the right.

        Observations and actions are filled with :data:`PADDING`, everything else with zero (``False``).
        """
        joined: list[Tensor | Rows | None] = []
        for field in fields(cls):  # type: ignore[arg-type]
            values = [getattr(part, field.name) for part in parts]
            if values[0] is None:
                joined.append(None)
            elif isinstance(values[0], Rows):
                joined.append(type(values[0]).concatenate(values))
            else:
                fill = PADDING if field.name in ("observations", "actions") else 0
                joined.append(torch.cat(_same_length(values, fill)))
        return cls(*joined)


def _same_length(tensors: list[Tensor], fill: int) -> list[Tensor]:
    if tensors[0].dim() < 2:
        return tensors
    longest = max(tensor.shape[1] for tensor in tensors)
    padded = []
    for tensor in tensors:
        missing = tensor.new_full((tensor.shape[0], longest - tensor.shape[1], *tensor.shape[2:]), fill)
        padded.append(torch.cat([tensor, missing], dim=1) if missing.shape[1] else tensor)
    return padded


#: The default of a field that not all trajectories have. Such fields are typed as tensors, because whoever reads one
#: knows what its sampler gives.
_ABSENT: Tensor = None  # type: ignore[assignment]


@dataclass
class Trajectories(Rows):
    """B rows of at most T steps: a segment of every copy of a vector environment, or a batch of completions.

    Attributes:
        observations: what the policy saw. On an environment ``[B, T, …]``, the observation before each action. For a
            language model ``[B, P]``, the prompt's tokens, filled up with :data:`PADDING` on either side.
        actions: ``[B, T]`` (discrete), the action taken at each step or the token that follows, :data:`PADDING` where
            there is none; or ``[B, T, D]`` (continuous).
        mask: ``[B, T]`` booleans, true where the policy itself acted: false on padding, and on tokens that somebody
            else wrote in a conversation.
        rewards: ``[B, T]``, the reward that followed each action.
        log_probs: ``[B, T]``, log-probability of each action under the policy that acted, 0 where ``mask`` is false.
        terminated: ``[B, T]`` booleans, true where the task ended with this step: nothing follows, value 0.
        truncated: ``[B, T]`` booleans, true where only the recording ended: the value of what follows is estimated.
        values: ``[B, T]``, the critic's estimate of the state before each action.
        next_values: ``[B, T]``, its estimate of the state after each action, also where an episode was truncated.
        group: ``[B]`` integers, the same for rows that share a start state or a prompt.
        next_observations: ``[B, T, …]``, what the environment showed after each action, also at the end of an episode.
        action_mask: ``[B, T, A]`` booleans, which actions were allowed; ``None`` if always all.
        next_action_mask: ``[B, T, A]`` booleans, which actions are allowed after each step.
    """

    observations: Tensor
    actions: Tensor
    mask: Tensor
    rewards: Tensor = _ABSENT
    log_probs: Tensor = _ABSENT
    terminated: Tensor = _ABSENT
    truncated: Tensor = _ABSENT
    values: Tensor = _ABSENT
    next_values: Tensor = _ABSENT
    group: Tensor = _ABSENT
    next_observations: Tensor = _ABSENT
    action_mask: Tensor = _ABSENT
    next_action_mask: Tensor = _ABSENT

    @property
    def returns(self) -> Tensor:
        """``[B]``, the undiscounted sum of each row's rewards."""
        if self.rewards is None:
            raise ValueError("these trajectories carry no rewards, so they have no returns")
        return (self.rewards * self.mask).sum(dim=1)

    @property
    def lengths(self) -> Tensor:
        """``[B]``, how many actions of each row the policy chose."""
        return self.mask.sum(dim=1)

    def steps(self) -> Self:
        """Return every action that the policy took as a row of its own, ``[N, 1, …]``, in order of the rows.

        A policy that sees only the current state needs no more than this, and what is computed for padding is saved.
        """
        rows, columns = self.mask.nonzero(as_tuple=True)

        def taken(value: Tensor) -> Tensor:
            return value[rows] if value.dim() == 1 else value[rows, columns][:, None]

        return type(self)(*(None if value is None else taken(value) for value in self._values()))  # type: ignore[arg-type]


@dataclass
class Experience(Trajectories):
    """Trajectories, and what a learner made of their rewards.

    Attributes:
        advantages: ``[B, T]``, how much better each action was than what the policy does on average.
        targets: ``[B, T]``, what the critic's values are drawn towards.
        shares: ``[B, T]``, which part of its trajectory an action is, 1 / length: they sum to the number of
            trajectories, and go on saying so when steps are taken out of their trajectories.
        weights: ``[B, T]``, how much the loss of each action counts; their mean over actions is what normalises it.
        reference_log_probs: ``[B, T]``, log-probability of each action under the policy's reference.
        sampler_log_probs: ``[B, T]``, log-probability of each action under what drew it, where ``log_probs`` are those
            of the policy before its update and the two differ.
    """

    advantages: Tensor = _ABSENT
    targets: Tensor = _ABSENT
    shares: Tensor = _ABSENT
    weights: Tensor = _ABSENT
    reference_log_probs: Tensor = _ABSENT
    sampler_log_probs: Tensor = _ABSENT

    @classmethod
    def of(cls, trajectories: Trajectories, **learned: Tensor | None) -> Self:
        """Return the same trajectories with further fields."""
        lengths = trajectories.lengths.clamp(min=1)[:, None]
        known = {field.name: getattr(trajectories, field.name) for field in fields(trajectories)}
        return cls(**known | {"shares": trajectories.mask / lengths} | learned)


@dataclass
class Preferences(Rows):
    """B pairs of trajectories from the same start, of which ``chosen`` was preferred to ``rejected``.

    Attributes:
        chosen: B trajectories.
        rejected: B trajectories.
        weights: ``[B]``, how much each pair counts: 1 for an observed comparison, a probability when all outcomes of a
            comparison are enumerated. ``None`` counts every pair once.
    """

    chosen: Trajectories
    rejected: Trajectories
    weights: Tensor | None = None

    @property
    def pair_weights(self) -> Tensor:
        """``[B]``, the weights, ones if none were given."""
        return self.chosen.mask.new_ones(len(self), dtype=torch.float32) if self.weights is None else self.weights

    def both(self) -> Trajectories:
        """Return the 2B rows of one batch, chosen first, grouped by pair so that a shared prompt is computed once."""
        rows = Trajectories.concatenate([self.chosen, self.rejected])
        rows.group = torch.arange(len(self), device=rows.mask.device).repeat(2)
        return rows
