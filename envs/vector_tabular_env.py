"""Thousands of copies of an environment that samples from its model, stepped at once by looking things up in tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from aligngym.envs.tabular_env import TabularEnv, model_of
from aligngym.envs.uniform_streams import UniformStreams

Integers: TypeAlias = NDArray[np.int64]
Step: TypeAlias = tuple[Integers, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]


class VectorTabularEnv(VectorEnv[Any, Any, Any]):
    """Copies of one :class:`TabularEnv` in one table look-up a step.

    It does exactly what ``gymnasium.vector.SyncVectorEnv`` does with as many copies in time limits: the same
    observations, rewards, flags, infos and seeds, in all three autoreset modes. Every copy has its own generator, and
    uses its numbers in the order of :meth:`TabularMDP.sample`. Returned arrays belong to the caller: they are new in
    every step, and none of them is read again here.

    A reset takes ``options={"state": s}``, one state for all copies or one for each, and, as Gymnasium's,
    ``options={"reset_mask": mask}``, the copies to reset.

    Attributes:
        mdp: the exact model.
        states: ``[num_envs]``, the current states.

    Args:
        env: the environment, without wrappers; it is only used to draw pictures.
        num_envs: the number of copies.
        max_episode_steps: steps after which an episode is truncated; ``None`` or −1 for no limit.
        autoreset_mode: when a copy whose episode is over begins another one: in the next step, whose action is
            ignored; in the same step, with the last observation in ``infos["final_obs"]``; or never by itself.

    Raises:
        TypeError: if the steps of ``env`` do more than sample from its model.
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        env: TabularEnv,
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    ) -> None:
        if env is not env.unwrapped or model_of(env) is None:
            raise TypeError(f"{env} is not a bare TabularEnv without a window, whose steps only sample from its model")
        if num_envs < 1:
            raise ValueError(f"num_envs is a number of copies, at least 1, not {num_envs}")
        if max_episode_steps not in (None, -1) and not max_episode_steps >= 1:
            raise ValueError(f"max_episode_steps is at least 1, or None for no limit, not {max_episode_steps}")
        modes = [mode.value for mode in AutoresetMode]
        if not isinstance(autoreset_mode, AutoresetMode) and autoreset_mode not in modes:
            raise ValueError(f"autoreset_mode is one of {', '.join(modes)}, not {autoreset_mode!r}")
        self.env, self.mdp, self.num_envs = env, env.mdp, num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**env.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = env.render_mode
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        #: Steps after which an episode is truncated, or ``None``.
        self.max_episode_steps = None if max_episode_steps in (None, -1) else int(max_episode_steps)
        self._limit = self.max_episode_steps or 2**62
        self._tabulate()
        self._uniforms = UniformStreams(num_envs)
        self._begun = False
        self._time = 0
        self.states = np.zeros(num_envs, dtype=np.int64)
        #: The value of the clock at which the episode of a copy is truncated.
        self._deadlines = np.zeros(num_envs, dtype=np.int64)
        #: Copies whose episode is over and whose next one has not begun.
        self._over = np.zeros(0, dtype=np.int64)

    def _tabulate(self) -> None:
        """Lay out the model's outcomes, and behind them an idle row that pays nothing, for copies that are reset."""
        outcomes, row_starts = self.mdp.outcomes, self.mdp.row_starts
        self._next_states = np.append(outcomes.next_states, 0)
        self._rewards = np.append(outcomes.rewards, 0.0)
        # The end of the last row is where the idle row begins.
        self._first = row_starts.astype(np.int64)
        self._idle_row = len(row_starts) - 1
        self._random = np.append(np.diff(row_starts) > 1, False)
        #: ``[K − 1, S·A + 1]``.
        self._thresholds = np.pad(self.mdp.thresholds(), ((0, 0), (0, 1)), constant_values=np.inf)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of every copy; where steps or starts are random, each is ahead of what its copy has used."""
        return tuple(self._uniforms.generator(copy) for copy in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """The seed of every copy."""
        # Making its generator draws a seed for a copy to which none was given.
        return tuple(self._uniforms.seeds) if self.np_random else ()

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Integers, dict[str, Any]]:
        """Begin an episode in every copy, or in those that ``options["reset_mask"]`` marks.

        Args:
            seed: s for the seeds s, s + 1, …; or one for each copy, where ``None`` lets its generator go on.
            options: ``state`` and ``reset_mask``, see above.

        Raises:
            ValueError: for a seed, a mask or a state that cannot be used.
        """
        options = options or {}
        copies = self._chosen(options.get("reset_mask"))
        seeds = self._seeds(seed)
        starts = self._given_starts(options.get("state"))
        self._uniforms.seed(copies, [seeds[copy] for copy in copies])
        self._over = np.setdiff1d(self._over, copies)
        self._begin(self.states, copies, starts)
        self._begun = True
        return self.states.copy(), {}

    def step(self, actions: ArrayLike) -> Step:
        """Take ``[num_envs]`` actions and return observations, rewards, terminations, truncations and infos.

        Raises:
            ValueError: for actions of a wrong shape or type, or out of range.
            ResetNeeded: before the first reset, or if an episode is over and ``autoreset_mode`` is ``DISABLED``.
        """
        rows = self.states * self.mdp.num_actions + self._checked(actions)
        self._time += 1
        resetting = self._over
        rows[resetting] = self._idle_row
        outcomes = self._draw(rows)
        states, rewards = self._next_states.take(outcomes), self._rewards.take(outcomes)
        self._begin(states, resetting)
        terminated, truncated = self.mdp.terminal.take(states), self._deadlines <= self._time
        terminated[resetting] = False
        finished = terminated | truncated
        self._over = finished.nonzero()[0]
        infos: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and len(self._over):
            infos = self._final_infos(states, finished)
            self._begin(states, self._over)
            self._over = self._over[:0]
        self.states = states
        return states.copy(), rewards, terminated, truncated, infos

    def _draw(self, rows: Integers) -> Integers:
        """Return the number of an outcome for each row s · A + a, as :meth:`TabularMDP.sample` draws it."""
        if not len(self._thresholds):
            return rows
        uniforms = self._uniforms.take_where(self._random.take(rows))
        passed = np.zeros(self.num_envs, dtype=np.int16)
        for thresholds in self._thresholds:
            passed += thresholds.take(rows) <= uniforms
        return self._first.take(rows) + passed

    def _begin(self, states: Integers, copies: Integers, starts: Integers | None = None) -> None:
        """Put some copies into first states, drawn where they are not given, and set their deadlines."""
        if len(copies):
            states[copies] = self._starts(copies) if starts is None else starts[copies]
            self._deadlines[copies] = self._time + self._limit

    def _starts(self, copies: Integers) -> Integers | np.int64:
        """Draw a first state for some copies, as :meth:`TabularMDP.sample_start` does."""
        starts, cumulative = self.mdp.starts
        if len(starts) == 1:
            return starts[0]
        return starts[cumulative[:-1].searchsorted(self._uniforms.take(copies), "right")]

    def _final_infos(self, states: Integers, finished: NDArray[np.bool_]) -> dict[str, Any]:
        final = np.empty(self.num_envs, dtype=object)
        final[self._over] = states[self._over]
        return {"final_obs": final, "_final_obs": finished, "final_info": {}, "_final_info": finished.copy()}

    def _checked(self, actions: ArrayLike) -> Integers:
        if not self._begun:
            raise ResetNeeded("there is no episode yet: call reset() before step()")
        if len(self._over) and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ResetNeeded(
                f"the episodes of copies {self._over[:5].tolist()} … are over, and autoreset_mode is Disabled: reset "
                'them with options={"reset_mask": terminations | truncations}'
            )
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions are {self.num_envs} integers, not an array of shape {actions.shape} and type {actions.dtype}"
            )
        actions = actions.astype(np.int64, copy=False)
        # Seen as unsigned, negative numbers are huge: one pass finds what is too small and what is too large.
        if actions.view(np.uint64).max() >= self.mdp.num_actions:
            copy = int(actions.view(np.uint64).argmax())
            raise ValueError(f"copy {copy}: action {actions[copy]} is not one of 0 … {self.mdp.num_actions - 1}")
        return actions

    def _chosen(self, mask: Any) -> Integers:
        """Return the copies that a reset is for."""
        if mask is None:
            return np.arange(self.num_envs)
        if not isinstance(mask, np.ndarray) or mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ValueError(f"reset_mask is an array of {self.num_envs} booleans, not {mask!r}")
        if not mask.any():
            raise ValueError("reset_mask marks no copy: mark those to reset")
        if not (self._begun or mask.all()):
            raise ResetNeeded("there is no episode yet: the first reset is for all copies, without a reset_mask")
        return mask.nonzero()[0]

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        seeds = [seed + copy for copy in range(self.num_envs)] if isinstance(seed, int) else list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} copies: give one number, or one for each copy")
        for copy, one in enumerate(seeds):
            if one is not None and not (isinstance(one, int) and one >= 0):
                raise ValueError(f"copy {copy}: a seed is an integer from 0, or None, not {one!r}")
        return seeds

    def _given_starts(self, state: ArrayLike | None) -> Integers | None:
        if state is None:
            return None
        states = np.asarray(state)
        if states.shape not in ((), (self.num_envs,)) or states.dtype.kind not in "iu":
            raise ValueError(f"options: state is one state or {self.num_envs} of them, not {state!r}")
        if not ((states >= 0) & (states < self.mdp.num_states)).all():
            raise ValueError(f"options: state {state} is not within 0 … {self.mdp.num_states - 1}")
        return np.broadcast_to(states, self.num_envs).astype(np.int64)

    def render(self) -> tuple[Any, ...] | None:
        """Return a picture of every copy, as the environment itself draws it; copies in one state share one."""
        pictures: dict[int, Any] = {}
        for state in self.states.tolist():
            if state not in pictures:
                self.env.state = state
                pictures[state] = self.env.render()
        return tuple(pictures[state] for state in self.states.tolist())
