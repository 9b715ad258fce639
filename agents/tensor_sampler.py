"""Experience from tens of thousands of copies of an exact model, without leaving the device."""

from __future__ import annotations

from typing import Any

import torch

from aligngym.core.callbacks import Metrics
from aligngym.core.markov_policy import MarkovPolicy
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler
from aligngym.core.trajectories import Trajectories
from aligngym.envs.tensor_tabular_env import TensorTabularEnv


class TensorSampler(Sampler):
    """The next ``steps`` steps of every copy of a :class:`TensorTabularEnv`, as :class:`EnvironmentSampler` gives them.

    The policy is written down as a table for the whole sample.

    Args:
        env: the copies.
        steps: T, of each copy in one sample.

    Raises:
        ValueError: for fewer than one step.
    """

    def __init__(self, env: TensorTabularEnv, *, steps: int = 32) -> None:
        if steps < 1:
            raise ValueError(f"steps is how many each copy takes in a sample, at least 1, not {steps}")
        self.env, self.steps = env, steps
        self.metrics: Metrics = {}
        self._begun = False
        #: Return and length, so far, of the episode that each copy is in.
        self._running = torch.zeros(2, env.num_envs, device=env.device)

    @torch.no_grad()
    def sample(self, policy: Policy, seed: int) -> Trajectories:
        """Act by the policy's table.

        Raises:
            TypeError: if the policy is not over numbered states and actions.
        """
        if not isinstance(policy, MarkovPolicy):
            raise TypeError(f"numbered states need a policy that acts step by step, not {type(policy).__name__}")
        env, generator = self.env, torch.Generator(self.env.device).manual_seed(seed)
        thresholds = policy.probability_table().to(env.device).cumsum(dim=1)[:, :-1].float()
        if not self._begun:
            env.reset(generator)
            self._begun = True
        columns: dict[str, list[torch.Tensor]] = {}
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
        total, length, episodes = finished.tolist()
        self.metrics = {"return": total / episodes, "length": length / episodes} if episodes else {}
        return Trajectories(mask=torch.ones_like(rows["terminated"]), **rows)

    def state_dict(self) -> dict[str, Any]:
        """The state of every copy."""
        return {"begun": self._begun, "states": self.env.states, "elapsed": self.env.elapsed, "running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        device = self.env.device
        self._begun = state["begun"]
        self.env.states, self.env.elapsed = state["states"].to(device), state["elapsed"].to(device)
        self._running = state["running"].to(device)
