"""Whether an environment keeps what Gymnasium's interface promises, found out before anything learns in it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from aligngym.core.spaces import allowed_actions


def check_interface(env: gymnasium.Env) -> None:
    """Reset an environment and take one step, and look at what comes back.

    Gymnasium's own checker looks at more, and warns of it; here is what would otherwise end in an error somewhere else.

    Raises:
        TypeError: if the spaces are no spaces.
        ValueError: if what ``reset`` or ``step`` returns is not what they promise; the message says what is wrong.
    """
    for name in ("observation_space", "action_space"):
        if not isinstance(getattr(env, name, None), spaces.Space):
            raise TypeError(f"the {name} of {env} is {getattr(env, name, None)!r}, which is no space of Gymnasium")
    returned: Any = env.reset(seed=0)
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise ValueError(f"reset of {env} returned {_short(returned)}, not (observation, info)")
    _check_observation(env, "reset", returned[0])
    allowed = allowed_actions(*returned)
    returned = env.step(env.action_space.sample() if allowed is None else int(allowed.argmax()))
    if not (isinstance(returned, tuple) and len(returned) == 5):
        raise ValueError(
            f"step of {env} returned {_short(returned)}, not (observation, reward, terminated, truncated, info)"
        )
    observation, reward, *ends, info = returned
    _check_observation(env, "step", observation)
    if not np.issubdtype(np.asarray(reward).dtype, np.number) or np.ndim(reward):
        raise ValueError(f"step of {env} paid {_short(reward)}, which is no number")
    if not all(isinstance(end, (bool, np.bool_)) for end in ends):
        raise ValueError(f"step of {env} said terminated={ends[0]!r}, truncated={ends[1]!r}: both are true or false")
    if not isinstance(info, dict):
        raise ValueError(f"step of {env} gave {_short(info)} for an info, which is a dictionary")


def _check_observation(env: gymnasium.Env, where: str, observation: Any) -> None:
    space = env.observation_space
    # That numbers stay within their bounds is not asked: many environments have one that does not.
    is_box = isinstance(space, spaces.Box)
    if not (np.shape(observation) == space.shape if is_box else space.contains(observation)):
        raise ValueError(f"{where} of {env} showed {_short(observation)}, which is not in its {space}")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}…"
