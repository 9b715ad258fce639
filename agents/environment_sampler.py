"""Experience from copies of an environment: segments for actor–critics, whole episodes for Monte Carlo methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aligngym.core.callbacks import Metrics
from aligngym.core.markov_policy import Actor, acting_step_by_step
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import PADDING, Trajectories
from aligngym.envs.copies import Copies, Step
from aligngym.envs.vectorize import AnyEnvironment, vectorize


class EnvironmentSampler(Sampler):
    """The next ``steps`` steps of every copy of an environment.

    Episodes go on from one sample to the next, so a row may begin in the middle of an episode and hold several. A row's
    end is no end of its episode: what follows is estimated.

    Args:
        env: a name, an environment, a function that makes one, or a vector environment: see
            :func:`aligngym.envs.vectorize`.
        num_envs: copies to make, if they are not made yet.
        steps: T, of each copy in one sample.
        action_masks: whether the policy is told which actions are allowed, where the environment says so: in
            ``infos["action_mask"]`` or in a dictionary of observations.
        options: of an environment given by name.

    Raises:
        ValueError: for fewer than one copy or step.
    """

    def __init__(
        self,
        env: AnyEnvironment,
        *,
        num_envs: int = 8,
        steps: int = 128,
        action_masks: bool = True,
        **options: Any,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is how many each copy takes in a sample, at least 1, not {steps}")
        self.env = vectorize(env, num_envs, **options)
        self.copies = Copies(self.env)
        self.steps, self.action_masks = steps, action_masks
        self.metrics: Metrics = {}
        self._seed: int | None = None
        # Actions since the first reset: an environment that honours its seed is brought back by taking them again.
        self._taken: list[NDArray[Any]] = []
        self._episodes = _Episodes(self.env.num_envs)

    def sample(self, policy: Policy, seed: int) -> Trajectories:
        if self._seed is None:
            self._reset(seed)
        policy = acting_step_by_step(policy)
        act, recorder = policy.actor(seed), _Recorder()
        self._episodes.forget_finished()
        for _ in range(self.steps):
            step, seen = _act(self.copies, act, self.action_masks)
            self._episodes.add(step.rewards, step.acted, step.terminated | step.truncated)
            recorder.add(
                **seen,
                mask=step.acted,
                rewards=step.rewards,
                terminated=step.terminated,
                truncated=step.truncated,
                next_action_mask=step.next_action_mask if self.action_masks else None,
            )
        rows = recorder.trajectories(policy.device)
        self._remember(recorder.actions)
        self.metrics = self._episodes.metrics
        return rows

    def _reset(self, seed: int) -> None:
        self._seed = seed
        self._taken = []
        self.copies.reset(seed)

    def _remember(self, actions: NDArray[Any]) -> None:
        small = actions.dtype.kind == "i" and actions.max() < 256
        self._taken.append(actions.astype(np.uint8) if small else actions)

    def state_dict(self) -> dict[str, Any]:
        """The first seed and all actions since, from which the environment comes back exactly."""
        if self._seed is None:
            return {}
        self._taken = [np.concatenate(self._taken)]
        return {"seed": self._seed, "actions": self._taken[0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the same actions again."""
        if not state:
            return
        self._reset(int(state["seed"]))
        self._episodes = _Episodes(self.env.num_envs)
        discrete = state["actions"].dtype == np.uint8
        for actions in state["actions"]:
            step = self.copies.step(actions.astype(np.int64) if discrete else actions)
            self._episodes.add(step.rewards, step.acted, step.terminated | step.truncated)
        self._taken = [state["actions"]]


class EpisodeSampler(Sampler):
    """Whole episodes, each from its first to its last step, and in groups that share a start.

    Every sample begins anew, so nothing is remembered between two of them. Episodes of a group are reset with the same
    seed: they share the start state, and the luck as long as they act alike. Sharing luck leaves every estimator that
    compares an episode with the others of its group unbiased, because actions are drawn independently.

    Args:
        env: see :class:`EnvironmentSampler`; copies already made must be as many as there are episodes.
        episodes: B, in one sample.
        group_size: episodes that share a start; must divide ``episodes``.
        max_steps: episodes longer than this are truncated; ``None`` trusts the environment to end them.
        action_masks: see :class:`EnvironmentSampler`.
        options: of an environment given by name.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        env: AnyEnvironment,
        *,
        episodes: int = 16,
        group_size: int = 1,
        max_steps: int | None = None,
        action_masks: bool = True,
        **options: Any,
    ) -> None:
        if group_size < 1 or episodes < 1 or episodes % group_size:
            raise ValueError(f"{episodes} episodes do not divide into groups of {group_size}")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps is at least 1, or None, not {max_steps}")
        self.env = vectorize(env, episodes, one_by_one=True, **options)
        if self.env.num_envs != episodes:
            raise ValueError(f"{episodes} episodes need as many copies, and {self.env} has {self.env.num_envs}")
        self.copies = Copies(self.env)
        self.episodes, self.group_size, self.max_steps = episodes, group_size, max_steps
        self.action_masks = action_masks
        self.metrics: Metrics = {}

    def sample(self, policy: Policy, seed: int) -> Trajectories:
        groups = self.episodes // self.group_size
        seeds = np.random.SeedSequence(seed).generate_state(groups) >> 1
        group = np.arange(groups).repeat(self.group_size)
        self.copies.reset([int(s) for s in seeds[group]])
        policy = acting_step_by_step(policy)
        act, recorder, running = policy.actor(seed), _Recorder(), np.ones(self.episodes, dtype=bool)
        while running.any():
            step, seen = _act(self.copies, act, self.action_masks)
            last = self.max_steps is not None and len(recorder) + 1 >= self.max_steps
            truncated = (step.truncated | last) & ~step.terminated
            recorder.add(
                **seen,
                mask=running,
                rewards=step.rewards * running,
                terminated=step.terminated & running,
                truncated=truncated & running,
            )
            running = running & ~(step.terminated | truncated)
        rows = recorder.trajectories(policy.device)
        rows.group = torch.from_numpy(group).to(policy.device)
        self.metrics = {"return": float(rows.returns.mean()), "length": float(rows.lengths.float().mean())}
        return rows


def _act(copies: Copies, act: Actor, action_masks: bool) -> tuple[Step, dict[str, NDArray[Any] | None]]:
    """Let every copy act once; return what happened, and what was seen and done, by the fields of trajectories."""
    observations, allowed = copies.observations, copies.action_mask if action_masks else None
    actions = act(observations, allowed)
    step = copies.step(actions)
    seen = {"observations": observations, "actions": actions, "action_mask": allowed}
    return step, {**seen, "next_observations": step.next_observations}


class _Recorder:
    """Collects what happened, step by step, and makes trajectories of it."""

    def __init__(self) -> None:
        self._steps: list[dict[str, NDArray[Any] | None]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, **step: NDArray[Any] | None) -> None:
        """Add one step of every copy: for each field of the trajectories ``[B, …]``."""
        self._steps.append(step)

    @property
    def actions(self) -> NDArray[Any]:
        """``[T, B, …]``."""
        return np.stack([step["actions"] for step in self._steps])  # type: ignore[misc]

    def trajectories(self, device: torch.device) -> Trajectories:
        """Return ``[B, T, …]`` tensors."""
        fields: dict[str, torch.Tensor] = {}
        for name, first in self._steps[0].items():
            if first is not None:
                stacked = np.stack([step[name] for step in self._steps], axis=1)  # type: ignore[misc]
                tensor = torch.from_numpy(stacked).to(device)
                fields[name] = tensor.float() if tensor.dtype == torch.float64 else tensor
        mask = fields["mask"]
        for name in ("observations", "actions"):
            if fields[name].dtype == torch.int64 and fields[name].dim() == 2:
                fields[name] = fields[name].where(mask, PADDING)
        return Trajectories(**fields)


class _Episodes:
    """Returns and lengths of the episodes that end while copies go on."""

    def __init__(self, num_envs: int) -> None:
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs)
        self._finished: list[tuple[float, float]] = []

    def forget_finished(self) -> None:
        """Let :attr:`metrics` speak of what ends from now on."""
        self._finished = []

    def add(self, rewards: NDArray[np.float64], acted: NDArray[np.bool_], over: NDArray[np.bool_]) -> None:
        """Count one step of every copy."""
        self._returns += rewards
        self._lengths += acted
        if over.any():
            self._finished += zip(self._returns[over].tolist(), self._lengths[over].tolist(), strict=True)
            self._returns[over] = self._lengths[over] = 0

    @property
    def metrics(self) -> Metrics:
        """Return the mean return and length of the episodes that ended."""
        if not self._finished:
            return {}
        returns, lengths = zip(*self._finished, strict=True)
        return {"return": float(np.mean(returns)), "length": float(np.mean(lengths))}
