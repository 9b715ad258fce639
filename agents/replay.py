"""What an off-policy learner remembers: transitions of one or several steps, and which of them to look at again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aligngym.core.compilation import compiled
from aligngym.core.trajectories import Rows, Trajectories


@dataclass
class Transitions(Rows):
    """N times from a state to one that was seen up to n steps later.

    Attributes:
        observations: ``[N, …]``, s.
        actions: ``[N]``, a.
        returns: ``[N]``, R = Σ_k γ^k r_k over the m ≤ n steps in between.
        discounts: ``[N]``, what the value of s' counts: γ^m, or 0 if the task ended there.
        next_observations: ``[N, …]``, s'.
        next_action_mask: ``[N, A]`` booleans, which actions are allowed in s'; ``None`` if always all.
        rows: ``[N]``, where they are in the replay they were drawn from.
        weights: ``[N]``, how much the loss of each counts; ``None``: all the same.
    """

    observations: Tensor
    actions: Tensor
    returns: Tensor
    discounts: Tensor
    next_observations: Tensor
    next_action_mask: Tensor | None = None
    # Whoever reads them knows that they came from a replay.
    rows: Tensor = None  # type: ignore[assignment]
    weights: Tensor | None = None


class NStepTransitions:
    """Makes transitions of n steps from trajectories whose rows continue those of the call before.

    A transition ends early where an episode ends. The last n − 1 steps of a row wait for the next call, which is when
    it is known what followed. Between s and s' the actions are the behaviour's, and nothing corrects for that unless
    n = 1 (as in Rainbow, M. Hessel et al., 2018).

    Args:
        discount: γ in [0, 1].
        n: steps, at least 1.
    """

    def __init__(self, discount: float, n: int) -> None:
        if not 0 <= discount <= 1:
            raise ValueError(f"discount must be in [0, 1], not {discount}")
        if n < 1:
            raise ValueError(f"n is a number of steps, at least 1, not {n}")
        self.discount, self.n = discount, n
        self._waiting: dict[str, Tensor] = {}

    def __call__(self, trajectories: Trajectories) -> Transitions:
        """Return what is known now, in order of the rows."""
        steps = _without_what_is_not_stored(trajectories)
        if self._waiting:
            steps = {name: torch.cat([self._waiting[name], value], dim=1) for name, value in steps.items()}
        starts = max(steps["mask"].shape[1] - self.n + 1, 0)
        self._waiting = {name: value[:, starts:] for name, value in steps.items()} if self.n > 1 else {}

        def after(name: str, k: int) -> Tensor:
            """Return ``[B, starts]``, a field k steps after each start."""
            return steps[name][:, k : k + starts]

        returns = torch.zeros_like(after("rewards", 0))
        length = torch.zeros_like(returns, dtype=torch.long)
        goes_on = torch.ones_like(returns, dtype=torch.bool)
        for k in range(self.n):
            returns += self.discount**k * goes_on * after("rewards", k)
            length += goes_on
            goes_on = goes_on & ~(after("terminated", k) | after("truncated", k))
        row, start = after("mask", 0).nonzero(as_tuple=True)
        length = length[row, start]
        last = start + length - 1
        mask = steps.get("next_action_mask")
        return Transitions(
            steps["observations"][row, start],
            steps["actions"][row, start],
            returns[row, start],
            self.discount**length * ~steps["terminated"][row, last],
            steps["next_observations"][row, last],
            None if mask is None else mask[row, last],
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The steps that wait."""
        return dict(self._waiting)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._waiting = dict(state)


def _without_what_is_not_stored(trajectories: Trajectories) -> dict[str, Tensor]:
    names = (
        "observations",
        "actions",
        "mask",
        "rewards",
        "terminated",
        "truncated",
        "next_observations",
        "next_action_mask",
    )
    steps = {name: getattr(trajectories, name) for name in names}
    if steps["next_observations"] is None:
        raise ValueError("these trajectories do not say what the environment showed after each action")
    return {name: value.cpu() for name, value in steps.items() if value is not None}


class ReplayBuffer:
    """Remembers the last ``capacity`` transitions, and draws from them uniformly, with replacement.

    L. Lin, *Self-improving reactive agents based on reinforcement learning, planning and teaching*, 1992. Memory is
    taken when the first transitions come: two observations each.

    Args:
        capacity: how many; the oldest make room.

    Raises:
        ValueError: for fewer than one.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is a number of transitions, at least 1, not {capacity}")
        self.capacity = capacity
        self.added = 0
        self._fields: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, transitions: Transitions) -> None:
        """Remember transitions, in place of the oldest ones."""
        known = {f.name: getattr(transitions, f.name) for f in fields(transitions)}
        known = {name: value for name, value in known.items() if value is not None}
        if not self._fields:
            self._fields = {name: value.new_empty(self.capacity, *value.shape[1:]) for name, value in known.items()}
        count = len(transitions)
        # Of more than fit, the last ones stay.
        rows = (self.added + np.arange(max(count - self.capacity, 0), count)) % self.capacity
        places = torch.from_numpy(rows)
        for name, value in known.items():
            self._fields[name][places] = value[-self.capacity :]
        self.added += count
        self._written(rows)

    def sample(self, size: int, generator: np.random.Generator) -> Transitions:
        """Draw ``size`` transitions."""
        return self._at(generator.integers(len(self), size=size))

    def update(self, rows: Tensor, surprises: Tensor) -> None:
        """Hear how far the learner's predictions for some rows were off, ``[N]`` each; ignored here."""

    def _written(self, rows: NDArray[np.int64]) -> None:
        """Hear which rows are new."""

    def _at(self, rows: NDArray[np.int64]) -> Transitions:
        places = torch.from_numpy(rows)
        return Transitions(**{name: value[places] for name, value in self._fields.items()}, rows=places)

    def state_dict(self) -> dict[str, Any]:
        """What has been written so far; the rest of the memory is left out."""
        return {"added": self.added, "fields": {name: value[: len(self)] for name, value in self._fields.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError: if it does not come from a buffer of this capacity.
        """
        held = max((len(value) for value in state["fields"].values()), default=0)
        if held != min(state["added"], self.capacity):
            raise ValueError(f"{held} transitions were saved of a replay whose capacity is not {self.capacity}")
        self.added, self._fields = state["added"], {}
        for name, value in state["fields"].items():
            self._fields[name] = value.new_empty(self.capacity, *value.shape[1:])
            self._fields[name][:held] = value


class PrioritizedReplay(ReplayBuffer):
    """Draws transition i with probability P(i) = p_i^α / Σ_k p_k^α, where p_i is how surprising it was, plus a little.

    A loss is multiplied by (N·P(i))^−β / max_j (N·P(j))^−β, which with β = 1 makes its expected gradient that of
    uniform sampling, but for a factor. New transitions get the largest priority there is. A batch takes one transition
    from each of as many ranges of equal probability as it has rows. T. Schaul et al., *Prioritized experience replay*,
    2016, algorithm 1 and section 3.3.

    Args:
        capacity: see :class:`ReplayBuffer`.
        alpha: α ≥ 0; 0 is uniform.
        beta: β in [0, 1] to begin with.
        beta_steps: transitions added until β has risen to 1, linearly; 0: it stays as it is.
        smallest: added to the surprise, positive, so that no transition is lost.

    Raises:
        ValueError: for a number out of its range.
    """

    def __init__(
        self,
        capacity: int,
        *,
        alpha: float = 0.6,
        beta: float = 0.4,
        beta_steps: int = 0,
        smallest: float = 1e-6,
    ) -> None:
        super().__init__(capacity)
        if not alpha >= 0:
            raise ValueError(f"alpha is an exponent of priorities, at least 0, not {alpha}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is an exponent of importance weights, in [0, 1], not {beta}")
        if beta_steps < 0:
            raise ValueError(f"beta_steps is a number of transitions, at least 0, not {beta_steps}")
        if not smallest > 0:
            raise ValueError(f"smallest must be positive, not {smallest}: what has no priority is never seen again")
        self.alpha, self.first_beta, self.beta_steps, self.smallest = alpha, beta, beta_steps, smallest
        self.tree = SumTree(capacity)

    @property
    def beta(self) -> float:
        """β now."""
        progress = min(self.added / self.beta_steps, 1) if self.beta_steps else 0
        return self.first_beta + progress * (1 - self.first_beta)

    @property
    def priorities(self) -> NDArray[np.float64]:
        """``[len(self)]``, p_i^α."""
        return self.tree.leaves[: len(self)]

    def sample(self, size: int, generator: np.random.Generator) -> Transitions:
        points = (np.arange(size) + generator.random(size)) / size
        rows = self.tree.find(points * self.tree.total)
        batch = self._at(rows)
        # N and the sum of all priorities cancel.
        weights = (self.priorities[rows] / self.priorities.min()) ** -self.beta
        batch.weights = torch.from_numpy(weights).to(batch.returns.dtype)
        return batch

    def update(self, rows: Tensor, surprises: Tensor) -> None:
        """Give rows the priority of their last surprise."""
        self.tree.set(rows.cpu().numpy(), (surprises.cpu().numpy().astype(np.float64) + self.smallest) ** self.alpha)

    def _written(self, rows: NDArray[np.int64]) -> None:
        largest = self.tree.leaves.max()
        self.tree.set(rows, np.full(len(rows), largest if largest > 0 else 1.0))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "priorities": self.priorities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.tree = SumTree(self.capacity)
        self.tree.set(np.arange(len(self)), state["priorities"])


class SumTree:
    """Numbers, and a binary tree of their sums, in which changing a number or finding one by its share takes log₂ N.

    Args:
        size: N.
    """

    def __init__(self, size: int) -> None:
        self._first_leaf = 1 << (size - 1).bit_length()
        # Node i has the children 2i and 2i + 1; the root is 1.
        self._sums = np.zeros(2 * self._first_leaf)
        self.leaves = self._sums[self._first_leaf : self._first_leaf + size]

    @property
    def total(self) -> float:
        """The sum of all numbers."""
        return float(self._sums[1])

    def set(self, places: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Write ``[n]`` numbers at ``[n]`` places; of several at one place the last stays."""
        _write(self._sums, places + self._first_leaf, values)

    def find(self, points: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return ``[n]``, the first place up to which the numbers sum to more than each of ``[n]`` points."""
        return _find(self._sums, points) - self._first_leaf


@compiled
def _write(sums: NDArray[np.float64], nodes: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    for i in range(len(nodes)):
        node = nodes[i]
        sums[node] = values[i]
        while node > 1:
            node //= 2
            # Added anew, so that rounding errors do not add up.
            sums[node] = sums[2 * node] + sums[2 * node + 1]


@compiled
def _find(sums: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.int64]:
    found = np.empty(len(points), dtype=np.int64)
    for i in range(len(points)):
        point, node = points[i], 1
        while 2 * node < len(sums):
            node *= 2
            # Rounding must not lead to where there is nothing.
            if point >= sums[node] and sums[node + 1] > 0:
                point -= sums[node]
                node += 1
        found[i] = node
    return found
