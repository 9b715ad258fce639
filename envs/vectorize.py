"""Many copies of whatever environment a user has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from aligngym.envs.interface_check import check_interface
from aligngym.envs.tabular_env import TabularEnv, model_of
from aligngym.envs.vector_tabular_env import VectorTabularEnv

if TYPE_CHECKING:
    from aligngym.envs.tensor_tabular_env import TensorTabularEnv

#: What :func:`vectorize` understands.
AnyEnvironment = str | gymnasium.Env | VectorEnv | Callable[[], gymnasium.Env]


def vectorize(env: AnyEnvironment, num_envs: int = 8, *, one_by_one: bool = False, **options: Any) -> VectorEnv:
    """Return ``num_envs`` copies of an environment that are stepped together.

    An environment that samples from its exact model becomes a :class:`VectorTabularEnv`, thousands of copies of which
    cost little more than one; a registered name becomes what its authors vectorised, if they did.

    Args:
        env: a registered name, an environment, a function that makes one, or copies already made, which are returned
            as they are.
        num_envs: how many.
        one_by_one: whether every copy must have a generator, and so a seed, of its own.
        options: of the environment, where it is given by name.

    Raises:
        ValueError: for fewer than one copy, options for an environment that is already made, or one that breaks
            Gymnasium's interface.
        TypeError: for anything that is no environment.
    """
    if options and not isinstance(env, str):
        raise ValueError(f"options {sorted(options)} are for an environment given by name, and this one is made")
    if isinstance(env, VectorEnv):
        return env
    if num_envs < 1:
        raise ValueError(f"num_envs is a number of copies, at least 1, not {num_envs}")
    if isinstance(env, str):
        made = gymnasium.make(env, **options)
        if not isinstance(made.unwrapped, TabularEnv):
            return gymnasium.make_vec(env, num_envs, "sync" if one_by_one else None, **options)
        env = made
    if isinstance(env, gymnasium.Env):
        limit = env.spec.max_episode_steps if env.spec else None
        # Wrappers that change what is seen or paid must stay; those that gymnasium.make adds do not.
        if model_of(env) is not None:
            return VectorTabularEnv(
                env.unwrapped,  # type: ignore[arg-type]
                num_envs,
                max_episode_steps=limit,
                autoreset_mode=AutoresetMode.SAME_STEP,
            )
        check_interface(copy.deepcopy(env))
        return SyncVectorEnv([lambda: copy.deepcopy(env)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    if callable(env):
        check_interface(env())
        return SyncVectorEnv([env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    raise TypeError(f"an environment, its name, or a function that makes one is needed, not {env!r}")


def single_copy(env: VectorEnv | TensorTabularEnv) -> gymnasium.Env:
    """Return one more copy of what a vector environment steps, for evaluating without disturbing it.

    Raises:
        TypeError: if it does not say how another one is made.
    """
    if isinstance(env, VectorTabularEnv):
        one = copy.copy(env.env)
        return gymnasium.wrappers.TimeLimit(one, env.max_episode_steps) if env.max_episode_steps else one
    if not isinstance(env, VectorEnv):
        one = TabularEnv(env.mdp)
        return gymnasium.wrappers.TimeLimit(one, env.max_episode_steps) if env.max_episode_steps else one
    if isinstance(env, SyncVectorEnv):
        return copy.deepcopy(env.envs[0])
    if env.spec is not None:
        return gymnasium.make(env.spec.id, **env.spec.kwargs.get("env_kwargs", {}))
    raise TypeError(f"{env} does not say how one copy of it is made: give the environment to evaluate on")
