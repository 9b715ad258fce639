"""From names and numbers to an agent that can learn: environment → policy → sampler → algorithm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

from aligngym.commands.constructor_options import schedule_of
from aligngym.core.suggestions import closest

if TYPE_CHECKING:
    from aligngym.core import Agent, Policy
    from aligngym.core.sampler import Sampler


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm is called, and what it is put together from.

    Attributes:
        summary: a line for ``--help``.
        agent: where its class is.
        sampler: the class of its sampler; ``None`` for one that steps an environment itself and keeps its own table.
        learns_from_models: whether its experience may be drawn from an exact model instead.
        defaults: options for which the command has another default than the constructor.
        policy: where the class of its policy is, if it needs one of its own.
        fixed: arguments of the base classes that it settles itself, which are no options.
    """

    summary: str
    agent: str
    sampler: str | None = None
    learns_from_models: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    policy: str | None = None
    fixed: tuple[str, ...] = ()

    @property
    def agent_class(self) -> type[Any]:
        """The class of the agent."""
        return _load(self.agent)

    @property
    def sampler_class(self) -> type[Any] | None:
        """The class of the sampler."""
        return _load(f"agents.{self.sampler}") if self.sampler else None

    @property
    def policy_class(self) -> type[Any]:
        """The class of the policy, unless it is a table."""
        return _load(self.policy or "core.NetworkPolicy")


_CRITIC: dict[str, Any] = {"critic": "separate"}
_SEGMENTS: dict[str, Any] = {"sampler": "EnvironmentSampler", "learns_from_models": True}
_EPISODES = {"critic": None, "episodes": 32}
_GROUPS = {**_EPISODES, "group_size": 8}
_ONE_STEP = {"num_envs": 1, "segment_steps": 1}
_TABLE = {"discount": 0.99}

#: All algorithms that ``aligngym train`` knows.
ALGORITHMS = {
    "reinforce": Algorithm("Monte Carlo policy gradient", "agents.REINFORCE", "EpisodeSampler", defaults=_EPISODES),
    "a2c": Algorithm("advantage actor-critic", "agents.A2C", **_SEGMENTS, defaults={**_CRITIC, "segment_steps": 5}),
    "ppo": Algorithm("proximal policy optimisation", "agents.PPO", **_SEGMENTS, defaults=_CRITIC),
    "rloo": Algorithm("REINFORCE, leave one out", "agents.RLOO", "EpisodeSampler", defaults=_GROUPS),
    "grpo": Algorithm("group relative policy optimisation", "agents.GRPO", "EpisodeSampler", defaults=_GROUPS),
    "npg": Algorithm(
        "natural policy gradient",
        "agents.NaturalPolicyGradient",
        **_SEGMENTS,
        defaults=_CRITIC,
        fixed=("value_coefficient",),
    ),
    "trpo": Algorithm(
        "trust region policy optimisation",
        "agents.TRPO",
        **_SEGMENTS,
        defaults=_CRITIC,
        fixed=("value_coefficient",),
    ),
    "qac": Algorithm(
        "actor-critic with action values",
        "agents.QActorCritic",
        "EnvironmentSampler",
        defaults={"critic": None, "segment_steps": 5, "action_masks": False},
    ),
    "dqn": Algorithm(
        "deep Q-learning",
        "agents.DQN",
        "EnvironmentSampler",
        defaults=_ONE_STEP,
        policy="core.q_network.QNetwork",
    ),
    "dpg": Algorithm(
        "deterministic policy gradient, for real-valued actions",
        "agents.DPG",
        "EnvironmentSampler",
        defaults=_ONE_STEP,
        policy="core.deterministic_policy.DeterministicPolicy",
    ),
    "q-learning": Algorithm("Q-learning in a table", "agents.QLearning", defaults=_TABLE),
    "sarsa": Algorithm("Sarsa in a table", "agents.Sarsa", defaults=_TABLE),
    "expected-sarsa": Algorithm("Expected Sarsa in a table", "agents.ExpectedSarsa", defaults=_TABLE),
}


@dataclass
class Experiment:
    """Everything that an agent is made from; the parts are the arguments of their constructors.

    Attributes:
        algorithm: one of :data:`ALGORITHMS`.
        env: a Gymnasium id.
        env_options: keyword arguments of ``gymnasium.make``.
        wrappers: around the environment, the first one innermost: names from ``gymnasium.wrappers`` or
            ``minigrid.wrappers``, or mappings of one name to its arguments.
        policy: ``"table"`` or ``"network"``; ``None`` takes a table where states and actions are numbered.
        seed: of everything random.
        steps: environment steps of the whole run, over which schedules fall.
        parts: arguments of the ``"policy"``, the ``"sampler"`` and the ``"agent"``.
    """

    algorithm: str
    env: str
    env_options: dict[str, Any] = field(default_factory=dict)
    wrappers: list[Any] = field(default_factory=list)
    policy: str | None = None
    seed: int = 0
    steps: int = 100_000
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def make_env(self, **more: Any) -> gymnasium.Env:
        """Make one copy of the environment; ``more`` are further options, such as ``render_mode``.

        Raises:
            ValueError: if there is no such environment or wrapper, or it cannot be made with these options.
        """
        options = {**self.env_options, **more}
        env = _reported(lambda: gymnasium.make(self.env, **options), f"{self.env} with {options or 'no options'}")
        for entry in self.wrappers:
            name, arguments = next(iter(entry.items())) if isinstance(entry, dict) and entry else (str(entry), {})
            env = _reported(functools.partial(_wrapper(name), env, **(arguments or {})), f"the wrapper {name}")
        return env

    def make_policy(self, env: gymnasium.Env) -> Policy:
        """Make a policy that fits the environment."""
        from aligngym.core import TabularPolicy

        if self.policy_kind(env) == "table":
            return TabularPolicy.for_env(env, critic=self.parts["policy"]["critic"] is not None)
        return ALGORITHMS[self.algorithm].policy_class.for_env(env, seed=self.seed, **self.parts["policy"])

    def make_agent(self) -> Agent:
        """Put the agent together.

        Raises:
            ValueError: if the parts do not fit together, or a number is out of its range.
        """
        algorithm, parts = ALGORITHMS[self.algorithm], self.parts
        options = {name: schedule_of(value, self.iterations) for name, value in parts["agent"].items()}
        env = self.make_env()
        try:
            if algorithm.sampler_class is None:
                return algorithm.agent_class(env, seed=self.seed, **options)
            sampler = self.make_sampler()
            return algorithm.agent_class(self.make_policy(env), sampler, seed=self.seed, **options)
        except TypeError as error:
            raise ValueError(f"{self.algorithm} in {self.env}: {error}") from error

    def make_sampler(self) -> Sampler:
        """Make the source of experience: the environment as it steps, or its exact model.

        Raises:
            TypeError: if there is no model to draw from.
            ValueError: for wrappers, which a model knows nothing of, or a number out of its range.
        """
        options = dict(self.parts["sampler"])
        if options.pop("simulator", None) == "model":
            from aligngym.agents import ModelSampler

            if self.wrappers:
                raise ValueError("a model knows nothing of wrappers: leave out --wrapper, or --simulator model")
            return ModelSampler(self.make_env(), **options)
        sampler_class: Any = ALGORITHMS[self.algorithm].sampler_class
        # By its name an environment may be vectorised by its authors; with wrappers, we make the copies.
        if self.wrappers:
            return sampler_class(self.make_env, **options)
        return sampler_class(self.env, **options, **self.env_options)

    def policy_kind(self, env: gymnasium.Env) -> str:
        """Return ``"table"`` or ``"network"``."""
        if ALGORITHMS[self.algorithm].policy:
            return "network"
        spaces = (env.observation_space, env.action_space)
        numbered = all(isinstance(space, gymnasium.spaces.Discrete) and space.start == 0 for space in spaces)
        return self.policy or ("table" if numbered else "network")

    @property
    def iterations(self) -> int | None:
        """How many iterations the run has; ``None`` where they last as long as episodes do."""
        if ALGORITHMS[self.algorithm].sampler != "EnvironmentSampler":
            return None
        sampler = self.parts["sampler"]
        return -(-self.steps // (sampler["num_envs"] * sampler["steps"]))


def environment_named(name: str) -> tuple[str, dict[str, Any]]:
    """Return the Gymnasium id and options that a name on the command line stands for: an id, or a grid's map file.

    Raises:
        ValueError: if the map is no map, or a package with such environments is missing.
        FileNotFoundError: if there is no such map file.
    """
    import aligngym.envs  # registers ours

    if name.endswith(".txt") or Path(name).is_file():
        return "aligngym/GridWorld-v0", {"map": str(aligngym.envs.GridMap.read(name))}
    if name.startswith(("MiniGrid-", "BabyAI-")):
        _minigrid()
    if name not in gymnasium.registry and ":" not in name:
        suggestion = closest(name, list(gymnasium.registry))
        raise ValueError(f"no environment and no map file is called {name!r}{suggestion}")
    return name, {}


def _reported(make: Callable[[], gymnasium.Env], what: str) -> gymnasium.Env:
    """Make something of other people's, whose errors can be of any kind, and say in one line what went wrong."""
    try:
        return make()
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot make {what}: {text}") from error


def _wrapper(name: str) -> type[gymnasium.Wrapper]:
    """Return a wrapper by its name; only these two modules are looked into, so that a file cannot run anything."""
    found = getattr(gymnasium.wrappers, name, None)
    if found is None:
        found = getattr(_minigrid(f"no wrapper {name!r} in gymnasium.wrappers, and "), name, None)
    if not (isinstance(found, type) and issubclass(found, gymnasium.Wrapper)):
        raise ValueError(f"no wrapper {name!r} in gymnasium.wrappers or minigrid.wrappers")
    return found


def _minigrid(otherwise: str = "") -> Any:
    try:
        return import_module("minigrid.wrappers")
    except ImportError as error:
        raise ValueError(f"{otherwise}MiniGrid is missing ({error}): pip install 'aligngym[minigrid]'") from error


def _load(place: str) -> type[Any]:
    module, name = place.rsplit(".", 1)
    return getattr(import_module(f"aligngym.{module}"), name)
