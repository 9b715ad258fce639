"""How good a trained agent is: by episodes, and exactly where the environment shows its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from aligngym.core.spaces import ACTION_MASK

if TYPE_CHECKING:
    from aligngym.commands.run_folder import Settings
    from aligngym.core import Agent


class LastInfo(gymnasium.Wrapper):
    """Keeps what an environment said besides its observation, such as which actions are allowed."""

    info: dict[str, Any]

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, self.info = self.env.reset(**options)
        return observation, self.info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, self.info = self.env.step(action)
        return observation, reward, terminated, truncated, self.info


def player(agent: Any, env: LastInfo, *, greedy: bool = True, seed: int = 0) -> Callable[[Any], Any]:
    """Return a function that acts as the agent does, among the actions that the environment allows."""
    if not hasattr(agent.policy, "act"):
        drawing = np.random.default_rng(seed)
        return lambda observation: int(agent.act(observation, greedy=greedy, generator=drawing))
    import torch

    from aligngym.agents.evaluation import allowed_actions

    policy, generator = agent.policy.eval(), torch.Generator().manual_seed(seed)
    space, masked = env.action_space, agent.sampler.action_masks

    def act(observation: Any) -> Any:
        mask = allowed_actions(observation, env.info) if masked else None
        options = {} if mask is None else {"action_mask": mask[None]}
        rows = policy.encode(observation)[None]
        action = policy.act(rows, greedy=greedy, generator=generator, **options)[0][0].numpy()
        return action.clip(space.low, space.high) if isinstance(space, gymnasium.spaces.Box) else int(action)

    return act


@dataclass
class Judgement:
    """What a policy is worth.

    Attributes:
        mean: of the greedy policy's undiscounted returns.
        half: of the 95 % interval of the mean, Student's t.
        truncated: the share of episodes that were cut off.
        discount: γ of the exact values.
        exact: without a time limit, the expected discounted return of the ``"greedy"`` policy, of the policy as it
            draws its actions (``"drawn"``), and of the ``"best"`` there is; empty where there is no model.
    """

    mean: float
    half: float
    truncated: float
    discount: float
    exact: dict[str, float]


def judge(settings: Settings, agent: Agent, episodes: int, seed: int) -> Judgement:
    """Play episodes with the greedy policy, and look into the environment's model if it has one."""
    from aligngym.agents import evaluate_episodes

    env = LastInfo(settings.experiment().make_env())
    played = evaluate_episodes(player(agent, env), env, episodes, seed)
    half = played["return_standard_error"] * stdtrit(max(1, episodes - 1), 0.975)
    discount = settings.values["discount"]
    return Judgement(played["return"], half, played["truncated"], discount, _exact(agent, env, discount))


def _exact(agent: Any, env: LastInfo, discount: float) -> dict[str, float]:
    from aligngym.agents import PolicyIteration
    from aligngym.agents.episodes import fitted, model_or_none

    mdp = model_or_none(env)
    if mdp is None or not _shows_states(env, mdp.num_states):
        return {}
    policies = _tables(agent, env)
    try:
        planner = PolicyIteration(mdp, discount).learn(progress=False)
    except ValueError:
        # Without a discount, some tasks have no finite value.
        return {}
    values = {"best": float(mdp.initial @ planner.values)}
    for name, policy in policies.items():
        try:
            values[name] = float(mdp.initial @ mdp.evaluate(fitted(policy, mdp), discount))
        except ValueError:
            # Nor has a policy that goes on paying for ever.
            values[name] = float("nan")
    return values


def _shows_states(env: LastInfo, num_states: int) -> bool:
    """Return whether observations are the model's states, of which one may have been appended, and masks are known."""
    spaces = (env.observation_space, env.action_space)
    if not all(isinstance(space, gymnasium.spaces.Discrete) and space.start == 0 for space in spaces):
        return False
    env.reset(seed=0)
    knows_masks = ACTION_MASK not in env.info or hasattr(env.unwrapped, ACTION_MASK)
    return knows_masks and num_states - spaces[0].n in (0, 1)  # type: ignore[attr-defined]


def _tables(agent: Any, env: LastInfo) -> dict[str, NDArray[np.float64]]:
    """Return ``[S, A]``, π(a|s), of the greedy policy and of the one that draws its actions."""
    policy = agent.policy
    if isinstance(policy, np.ndarray):
        return {"greedy": np.eye(policy.shape[1])[policy.argmax(axis=1)]}
    import torch

    states, allowed = torch.arange(int(env.observation_space.n)), None  # type: ignore[attr-defined]
    if ACTION_MASK in env.info and agent.sampler.action_masks:
        allowed = torch.tensor(np.array([env.unwrapped.action_mask(int(s)) for s in states]), dtype=torch.bool)  # type: ignore[attr-defined]
        # An episode has ended where nothing is allowed.
        allowed |= ~allowed.any(dim=1, keepdim=True)
    with torch.no_grad():
        distribution = policy.from_outputs(policy.outputs(states).double(), allowed)
    greedy = torch.eye(policy.num_actions, dtype=torch.float64)[distribution.mode()]
    return {"greedy": greedy.numpy(), "drawn": distribution.probabilities.numpy()}
