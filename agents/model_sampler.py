"""Experience drawn from an exact model: in a compiled loop on a processor, in tensors on a GPU."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aligngym.core.callbacks import Metrics
from aligngym.core.compilation import compiled
from aligngym.core.markov_policy import acting_step_by_step
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Trajectories
from aligngym.envs.tabular_mdp import TabularMDP
from aligngym.envs.tensor_tabular_env import TensorTabularEnv


class ModelSampler(Sampler):
    """The next ``steps`` steps of every copy of a model, as :class:`EnvironmentSampler` gives those of a simulator.

    The policy is written down as a table for the whole sample, so that a step is a few look-ups: a hundredth of the
    time that Gymnasium takes. A copy whose episode is over is in a first state after the same step. The processor and
    a GPU draw other numbers from one seed, by the same law.

    Args:
        model: an exact model, or an environment that has one (our own, and Gymnasium's toy-text ones, whose steps are
            then drawn from what they say of themselves).
        num_envs: copies.
        steps: T, of each copy in one sample.
        max_episode_steps: steps after which an episode is truncated; by default the environment's registered limit.
        device: where the copies live, the policy's in general.

    Raises:
        TypeError: if there is no model.
        ValueError: for fewer than one copy or step.
    """

    def __init__(
        self,
        model: TabularMDP | gymnasium.Env,
        *,
        num_envs: int = 8,
        steps: int = 64,
        max_episode_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is how many each copy takes in a sample, at least 1, not {steps}")
        if max_episode_steps is None and isinstance(model, gymnasium.Env) and model.spec is not None:
            max_episode_steps = model.spec.max_episode_steps
        self.env = TensorTabularEnv(model, num_envs, max_episode_steps=max_episode_steps, device=device)
        self.steps = steps
        self.metrics: Metrics = {}
        #: In no state from this number on is anything decided.
        self._decided = int(np.flatnonzero(~self.env.mdp.terminal).max(initial=-1)) + 1
        self._begun = False
        #: Return and length, so far, of the episode that each copy is in.
        self._running = torch.zeros(2, num_envs, device=self.env.device)

    @torch.no_grad()
    def sample(self, policy: Policy, seed: int) -> Trajectories:
        """Act by the policy's table.

        Raises:
            TypeError: if the policy is not over numbered states and actions.
            ValueError: if it is over those of another model.
        """
        table, mdp = acting_step_by_step(policy).probability_table().to(self.env.device), self.env.mdp
        if len(table) < self._decided or table.shape[1] != mdp.num_actions:
            raise ValueError(
                f"the policy is over {len(table)} states and {table.shape[1]} actions, the model over "
                f"{mdp.num_states} and {mdp.num_actions}"
            )
        thresholds = table.cumsum(dim=1)[:, :-1]
        generator = torch.Generator(self.env.device).manual_seed(seed)
        if not self._begun:
            self.env.reset(generator)
            self._begun = True
        on_processor = self.env.device.type == "cpu"
        rows, finished = (self._in_a_loop if on_processor else self._in_tensors)(thresholds, generator)
        total, length, episodes = finished.tolist()
        self.metrics = {"return": total / episodes, "length": length / episodes} if episodes else {}
        return Trajectories(mask=torch.ones_like(rows["terminated"]), **rows)

    def _in_a_loop(self, thresholds: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        env, mdp = self.env, self.env.mdp
        shape = (env.num_envs, self.steps)
        integers = {name: np.empty(shape, np.int64) for name in ("observations", "actions", "next_observations")}
        ends = {name: np.empty(shape, np.bool_) for name in ("terminated", "truncated")}
        rewards, finished = np.empty(shape, np.float32), np.zeros(3)
        states, elapsed, running = (x.numpy().copy() for x in (env.states, env.elapsed, self._running))
        starts, start_thresholds = mdp.starts
        roll(
            (states, elapsed, running, finished),
            (mdp.row_starts, mdp.cumulative, mdp.outcomes.next_states, mdp.outcomes.rewards, mdp.terminal),
            (starts, start_thresholds[:-1], env.max_episode_steps or 2**62),
            np.ascontiguousarray(thresholds.numpy()),
            torch.rand(*shape, 3, dtype=torch.float64, generator=generator).numpy(),
            (*integers.values(), rewards, *ends.values()),  # type: ignore[arg-type]
        )
        env.states, env.elapsed, self._running = (torch.from_numpy(x) for x in (states, elapsed, running))
        rows = {name: torch.from_numpy(x) for name, x in {**integers, "rewards": rewards, **ends}.items()}
        return rows, torch.from_numpy(finished)

    def _in_tensors(self, thresholds: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        env, thresholds = self.env, thresholds.float()
        columns: dict[str, list[Tensor]] = {}
        finished = torch.zeros(3, device=env.device)
        for _ in range(self.steps):
            states = env.states
            uniforms = torch.rand(env.num_envs, 1, generator=generator, device=env.device)
            actions = (thresholds[states] <= uniforms).sum(dim=1)
            step = env.step(actions, generator)
            for name, values in {"observations": states, "actions": actions, **vars(step)}.items():
                columns.setdefault(name, []).append(values)
            over = step.terminated | step.truncated
            running = self._running + torch.stack([step.rewards, torch.ones_like(step.rewards)])
            finished += torch.stack([*(running * over).sum(dim=1), over.sum()])
            self._running = running * ~over
        rows = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        rows["next_observations"] = rows.pop("next_states")
        return rows, finished

    def state_dict(self) -> dict[str, Any]:
        """The state of every copy."""
        return {"begun": self._begun, "states": self.env.states, "elapsed": self.env.elapsed, "running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        device = self.env.device
        self._begun = state["begun"]
        self.env.states, self.env.elapsed = state["states"].to(device), state["elapsed"].to(device)
        self._running = state["running"].to(device)


Integers = NDArray[np.int64]
Reals = NDArray[np.float64]
Booleans = NDArray[np.bool_]


@compiled
def roll(
    copies: tuple[Integers, Integers, Reals, Reals],
    model: tuple[Integers, Reals, Integers, Reals, Booleans],
    starting: tuple[Integers, Reals, int],
    thresholds: Reals,
    uniforms: Reals,
    recorded: tuple[Integers, Integers, Integers, Reals, Booleans, Booleans],
) -> None:
    """Step every copy, copy by copy, and write down what it did.

    Args:
        copies: state, steps since its episode began, and return and length so far of each copy, which are changed; and
            sums over the episodes that end: return, length, number.
        model: where each row s·A + a begins, and of its outcomes the cumulative probability, state and reward; and
            which states are terminal.
        starting: first states, their cumulative probabilities but the last, and the time limit.
        thresholds: ``[S, A − 1]``, the policy's cumulative probabilities.
        uniforms: ``[n, T, 3]``, for the action, its outcome, and the first state of the next episode.
        recorded: ``[n, T]`` each: state, action, next state, reward, terminated, truncated.
    """
    states, elapsed, running, finished = copies
    row_starts, cumulative, next_states, rewards, terminal = model
    starts, start_thresholds, limit = starting
    seen, actions, shown, paid, terminated, truncated = recorded
    num_actions = thresholds.shape[1] + 1
    for copy in range(uniforms.shape[0]):
        state = states[copy]
        for t in range(uniforms.shape[1]):
            action = 0
            while action < num_actions - 1 and thresholds[state, action] <= uniforms[copy, t, 0]:
                action += 1
            row = state * num_actions + action
            outcome = row_starts[row]
            while outcome < row_starts[row + 1] - 1 and cumulative[outcome] <= uniforms[copy, t, 1]:
                outcome += 1
            following = next_states[outcome]
            elapsed[copy] += 1
            seen[copy, t], actions[copy, t], shown[copy, t] = state, action, following
            paid[copy, t], terminated[copy, t] = rewards[outcome], terminal[following]
            truncated[copy, t] = elapsed[copy] >= limit and not terminal[following]
            running[0, copy] += rewards[outcome]
            running[1, copy] += 1
            state = following
            if terminated[copy, t] or truncated[copy, t]:
                finished[0] += running[0, copy]
                finished[1] += running[1, copy]
                finished[2] += 1
                running[0, copy] = running[1, copy] = elapsed[copy] = 0
                start = 0
                while start < len(start_thresholds) and start_thresholds[start] <= uniforms[copy, t, 2]:
                    start += 1
                state = starts[start]
        states[copy] = state
