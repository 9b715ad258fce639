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


#: Chooses an action for an observation, and ``[A]`` booleans of what is allowed if the environment says so.
Player = Callable[[Any, "NDArray[np.bool_] | None"], Any]


def player(agent: Any, space: gymnasium.Space, *, greedy: bool = True, seed: int = 0) -> Player:
    """Return a function that acts in an action space as the agent does, with masks if it has learned with them."""
    if not hasattr(agent.policy, "act"):
        drawing = np.random.default_rng(seed)
        return lambda observation, allowed: int(agent.act(observation, greedy=greedy, generator=drawing))
    import torch

    policy, generator = agent.policy.eval(), torch.Generator().manual_seed(seed)

    def act(observation: Any, allowed: NDArray[np.bool_] | None) -> Any:
        options = {"action_mask": allowed[None]} if allowed is not None and knows_masks(agent) else {}
        rows = policy.encode(observation)[None]
        action = policy.act(rows, greedy=greedy, generator=generator, **options)[0][0].numpy()
        return action.clip(space.low, space.high) if isinstance(space, gymnasium.spaces.Box) else int(action)

    return act


def knows_masks(agent: Any) -> bool:
    """Return whether an agent is told which actions are allowed."""
    return getattr(getattr(agent, "sampler", None), "action_masks", False)


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

    env = settings.experiment().make_env()
    played = evaluate_episodes(player(agent, env.action_space), env, episodes, seed, action_masks=True)
    half = played["return_standard_error"] * stdtrit(max(1, episodes - 1), 0.975)
    if half < 1e-9 * max(1.0, abs(played["return"])):
        # All episodes went alike, but for the rounding of their sum.
        half = 0.0
    discount = settings.values["discount"]
    return Judgement(played["return"], half, played["truncated"], discount, _exact(agent, env, discount))


def _exact(agent: Any, env: gymnasium.Env, discount: float) -> dict[str, float]:
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


def _shows_states(env: gymnasium.Env, num_states: int) -> bool:
    """Return whether observations are the model's states, of which one may have been appended, and masks are known."""
    spaces = (env.observation_space, env.action_space)
    if not all(isinstance(space, gymnasium.spaces.Discrete) and space.start == 0 for space in spaces):
        return False
    _, info = env.reset(seed=0)
    masks_are_known = ACTION_MASK not in info or hasattr(env.unwrapped, ACTION_MASK)
    return masks_are_known and num_states - spaces[0].n in (0, 1)  # type: ignore[attr-defined]


def _tables(agent: Any, env: gymnasium.Env) -> dict[str, NDArray[np.float64]]:
    """Return ``[S, A]``, π(a|s), of the greedy policy and of the one that draws its actions."""
    policy = agent.policy
    if isinstance(policy, np.ndarray):
        return {"greedy": np.eye(policy.shape[1])[policy.argmax(axis=1)]}
    import torch

    states, allowed = torch.arange(int(env.observation_space.n)), None  # type: ignore[attr-defined]
    if hasattr(env.unwrapped, ACTION_MASK) and knows_masks(agent):
        allowed = torch.tensor(np.array([env.unwrapped.action_mask(int(s)) for s in states]), dtype=torch.bool)  # type: ignore[attr-defined]
        # An episode has ended where nothing is allowed.
        allowed |= ~allowed.any(dim=1, keepdim=True)
    with torch.no_grad():
        distribution = policy.from_outputs(policy.outputs(states).double(), allowed)
    greedy = torch.eye(policy.num_actions, dtype=torch.float64)[distribution.mode()]
    return {"greedy": greedy.numpy(), "drawn": distribution.probabilities.numpy()}
