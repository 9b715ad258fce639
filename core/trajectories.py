"""Experience, batch first, in one dataclass for grids and language models."""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, groupby, pairwise
from typing import Any, Self

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

    #: What these rows were moved from, and the values that came of it.
    _origin: Any = None

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

    def sizes(self) -> Tensor:
        """Return ``[3, B]`` integers of every row: observations, actions, and the group whose observations it shares.

        Padding does not count. Rows of which a part is trajectories are as large as these.

        Raises:
            TypeError: if there are no trajectories in them.
        """
        for value in self._values():
            if isinstance(value, Rows):
                return value.sizes()
        raise TypeError(f"{type(self).__name__} holds no trajectories, so it has no steps to count")

    def pieces(self, steps_at_once: int) -> list[Self]:
        """Return consecutive pieces of at most ``steps_at_once`` steps, as few as can be, and these as even as can be.

        A step is an observation or an action. Rows of one group that stand together count their observations once, and
        stay in one piece unless they are more than one holds. A row that is larger than a piece is one by itself.
        """
        observations, actions, groups = self.sizes().tolist()
        # Where rows may be cut, and the steps between two such places.
        places, steps = [0], []
        for _, members in groupby(range(len(self)), key=groups.__getitem__):
            rows = list(members)
            start = observations[rows[0]]
            taken = [actions[row] for row in rows]
            # Every part of a group that has to be cut begins with the same observations again.
            for begin, end in pairwise(even_cuts(taken, steps_at_once - start)):
                places.append(rows[0] + end)
                steps.append(start + sum(taken[begin:end]))
        cuts = [places[cut] for cut in even_cuts(steps, steps_at_once)]
        return [self] if len(cuts) <= 2 else [self[slice(*ends)] for ends in pairwise(cuts)]

    def to(self, device: torch.device | str) -> Self:
        """Return the same rows on ``device``."""
        moved = type(self)(*(None if value is None else _moved(value, device) for value in self._values()))
        if torch.device(device).type != "cpu" and self._is_on_processor():
            moved._origin = self, tuple(moved._values())
        return moved

    @property
    def host(self) -> Self:
        """The same rows on the processor: those that they were moved from, if they still are as they were moved.

        To ask a GPU for them would mean to wait until it has done everything that it was given to do.
        """
        if self._is_as_moved():
            return self._origin[0]
        return self if self._is_on_processor() else self.to("cpu")

    def _is_on_processor(self) -> bool:
        return all(
            value._is_on_processor() if isinstance(value, Rows) else value.device.type == "cpu"
            for value in self._values()
            if value is not None
        )

    def _is_as_moved(self) -> bool:
        """Return whether these rows were moved, and nothing in them was replaced or written to since."""
        return self._origin is not None and all(
            value is moved
            and (value is None or (value._is_as_moved() if isinstance(value, Rows) else value._version == 0))
            for value, moved in zip(self._values(), self._origin[1], strict=True)
        )

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


def _moved(value: Tensor | Rows, device: torch.device | str) -> Tensor | Rows:
    if isinstance(value, Tensor) and value.device.type == "cpu" and torch.device(device).type == "cuda":
        # From pinned memory it is copied without waiting for what the GPU was given to do before.
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def even_cuts(sizes: Sequence[int], limit: int) -> list[int]:
    """Return where to cut a sequence into parts of at most ``limit``, first 0 and last the number of things in it.

    Parts are as few as possible, and of all ways to cut into so few the largest of them is smallest. Only a thing that
    is larger than ``limit`` makes a larger part, by itself.
    """
    if sum(sizes) <= limit:
        return [0, len(sizes)]
    sums = [0, *accumulate(sizes)]

    def cuts(limit: int) -> list[int]:
        # Parts that are filled in turn are as few as possible: whatever else fits ends no later.
        found = [0]
        while found[-1] < len(sizes):
            found.append(max(found[-1] + 1, bisect_right(sums, sums[found[-1]] + limit) - 1))
        return found

    fewest = len(cuts(limit))
    return cuts(bisect_left(range(limit), True, key=lambda smaller: len(cuts(smaller)) <= fewest))


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

    def sizes(self) -> Tensor:
        observations, actions = ((rows != PADDING).flatten(1).sum(dim=1) for rows in (self.observations, self.actions))
        group = torch.arange(len(self), device=actions.device) if self.group is None else self.group.long()
        return torch.stack([observations, actions, group])

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

    def sizes(self) -> Tensor:
        observations, chosen, _ = self.chosen.sizes()
        return torch.stack([observations, chosen + self.rejected.sizes()[1], torch.arange(len(self)).to(chosen)])

    def both(self) -> Trajectories:
        """Return the 2B rows of one batch, chosen first, grouped by pair so that a shared prompt is computed once.

        It is the same object every time, so that whoever lays its rows out need do so only once.
        """
        return self._both

    @functools.cached_property
    def _both(self) -> Trajectories:
        if self.host is not self:
            return self.host.both().to(self.chosen.mask.device)
        rows = Trajectories.concatenate([self.chosen, self.rejected])
        rows.group = torch.arange(len(self), device=rows.mask.device).repeat(2)
        return rows
