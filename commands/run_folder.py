"""The folder of a run: its settings, checkpoints, metrics and weights, and how settings are put together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from aligngym.commands.constructor_options import Option, constructor_options
from aligngym.commands.experiment import ALGORITHMS, Experiment, environment_named
from aligngym.commands.options import read_yaml
from aligngym.core.storage import replacing
from aligngym.core.suggestions import closest

if TYPE_CHECKING:
    from aligngym.core import Agent

CONFIG, WEIGHTS, CHECKPOINT = "config.yaml", "policy.safetensors", "checkpoint.safetensors"

#: Settings that were found to work, one file for each algorithm and environment.
TUNED = Path(__file__).parent / "configs"

#: What :class:`Experiment` and the command themselves give to constructors.
_NO_OPTIONS = (
    *("env", "policy", "sampler", "seed", "observation_space", "action_space"),
    *("optimizer", "accelerator", "behaviour", "compiled"),
)


@dataclass(kw_only=True)
class RunOptions:
    """What a run is, whatever the algorithm.

    Args:
        steps: environment steps in all, of all copies together
        seed: of everything random
        output: folder of the run (default: runs/ALGORITHM-ENV-seedN)
        checkpoint_every: iterations between checkpoints, from which --resume continues
        evaluation_episodes: episodes of the greedy policy at the end
        policy: table or network (default: a table where states and actions are numbered)
    """

    steps: int = 100_000
    seed: int = 0
    output: str | None = None
    checkpoint_every: int = 100
    evaluation_episodes: int = 100
    policy: str | None = None


@dataclass(kw_only=True)
class Simulator:
    """What experience is drawn from.

    Args:
        simulator: environment, which is stepped as it is, or model: numbered states are drawn from what the environment
            says of itself, which is far faster, and knows no action masks
    """

    simulator: str = "environment"


def options_of(algorithm: str) -> dict[str, list[Option]]:
    """Return the options of the ``"run"``, the ``"policy"``, the ``"sampler"`` and the ``"agent"``.

    Raises:
        ValueError: for an unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        hint = closest(algorithm, ALGORITHMS) or f": choose from {', '.join(ALGORITHMS)}"
        raise ValueError(f"unknown algorithm {algorithm!r}{hint}")
    made_of = ALGORITHMS[algorithm]
    parts = {"run": constructor_options(RunOptions)}
    if made_of.sampler_class is not None:
        parts["policy"] = constructor_options(made_of.policy_class, _NO_OPTIONS)
        # The run has steps already.
        parts["sampler"] = constructor_options(made_of.sampler_class, _NO_OPTIONS, {"steps": "segment_steps"})
    if made_of.learns_from_models:
        parts["sampler"] += constructor_options(Simulator)
    parts["agent"] = constructor_options(made_of.agent_class, (*_NO_OPTIONS, *made_of.fixed))
    defaults = made_of.defaults
    return {
        part: [dataclasses.replace(option, default=defaults.get(option.name, option.default)) for option in options]
        for part, options in parts.items()
    }


@dataclass
class Settings:
    """Every setting of a run by its name; ``config.yaml`` has all of them and repeats the run.

    Attributes:
        algorithm: one of :data:`ALGORITHMS`.
        env: a Gymnasium id.
        env_options: of ``gymnasium.make``.
        wrappers: see :class:`Experiment`.
        values: of the options, by their names.
    """

    algorithm: str
    env: str
    env_options: dict[str, Any]
    wrappers: list[Any]
    values: dict[str, Any]

    @classmethod
    def complete(cls, algorithm: str, env: str | None, given: dict[str, Any], name: str = "") -> Settings:
        """Return settings with the defaults for what is not given.

        Args:
            algorithm: one of :data:`ALGORITHMS`.
            env: as on the command line; ``None`` takes the one that is given.
            given: settings by name, checked.
            name: of the run's folder, if none is given.

        Raises:
            ValueError: for options of a network where a table is learned, and as :class:`Experiment` does.
        """
        given = dict(given)
        env_id, options = environment_named(str(env or given.get("env")))
        env_options = {**given.get("env_options", {}), **options}
        options_by_part = options_of(algorithm)
        values = {
            option.name: given.get(option.name, option.default)
            for options in options_by_part.values()
            for option in options
        }
        settings = cls(algorithm, env_id, env_options, list(given.get("wrappers", [])), values)
        if "policy" in options_by_part:
            settings._settle_policy(given, options_by_part["policy"])
            settings._settle_simulator(given)
        values["output"] = values["output"] or f"runs/{algorithm}-{Path(name or env_id).stem}-seed{values['seed']}"
        for option in ("steps", "evaluation_episodes"):
            if values[option] < 1:
                raise ValueError(f"--{option.replace('_', '-')} is at least 1, not {values[option]}")
        for option in ("seed", "checkpoint_every"):
            if values[option] < 0:
                raise ValueError(f"--{option.replace('_', '-')} is at least 0, not {values[option]}")
        return settings

    def _settle_policy(self, given: dict[str, Any], options: list[Option]) -> None:
        """Decide between table and network, and leave out what a table does not have."""
        experiment = self.experiment()
        kind = self.values["policy"] = experiment.policy_kind(experiment.make_env())
        if kind not in ("table", "network"):
            raise ValueError(f"--policy is 'table' or 'network', not {kind!r}")
        for option in options:
            if kind == "table" and option.name != "critic":
                if given.get(option.name, option.default) != option.default:
                    raise ValueError(f"{option.flag} is about networks, and here a table learns: add --policy network")
                del self.values[option.name]

    def _settle_simulator(self, given: dict[str, Any]) -> None:
        """Leave out what a model does not have."""
        simulator = self.values.get("simulator", "environment")
        if simulator not in ("environment", "model"):
            raise ValueError(f"--simulator is 'environment' or 'model', not {simulator!r}")
        if simulator == "model":
            if given.get("action_masks"):
                raise ValueError("a model knows no action masks: add --no-action-masks, or leave out --simulator model")
            del self.values["action_masks"]

    @classmethod
    def read(cls, folder: str | Path) -> Settings:
        """Read the settings of a run.

        Raises:
            FileNotFoundError: if there is no run in the folder.
        """
        path = Path(folder) / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"no run in {folder}: give the folder that aligngym train has written")
        values = checked(read_yaml(path), str(path))
        return cls.complete(values["algorithm"], None, values)

    def write(self, folder: str | Path) -> None:
        """Write them to ``config.yaml`` in the folder of a run."""
        tree = dataclasses.asdict(self)
        tree |= tree.pop("values")
        with replacing(Path(folder) / CONFIG) as temporary:
            temporary.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")

    def experiment(self) -> Experiment:
        """Return what the run's agent is made from."""
        parts = {
            part: {option.argument: self.values[option.name] for option in options if option.name in self.values}
            for part, options in options_of(self.algorithm).items()
        }
        run = parts.pop("run")
        return Experiment(
            self.algorithm,
            self.env,
            self.env_options,
            self.wrappers,
            policy=run["policy"],
            seed=run["seed"],
            steps=run["steps"],
            parts=parts,
        )


def checked(values: dict[str, Any], source: str, algorithm: str | None = None) -> dict[str, Any]:
    """Return the settings in a file or of flags, each of them read as its option is.

    Args:
        values: by name.
        source: the file, for errors; empty for flags.
        algorithm: whose settings they must be; by default, what they say themselves.

    Raises:
        ValueError: for an unknown name, with a suggestion, a wrong type, or another algorithm's settings.
    """
    written_for = values.get("algorithm", algorithm)
    if algorithm is not None and written_for != algorithm:
        raise ValueError(f"{source}: these are settings of {written_for}, and {algorithm} is asked for")
    known = {option.name: option for options in options_of(str(written_for)).values() for option in options}
    others = {"algorithm": str, "env": str, "env_options": dict, "wrappers": list}
    result = {}
    for name, value in values.items():
        if name in others:
            if not isinstance(value, others[name]):
                raise ValueError(f"{source}: {name} is {value!r}: a {others[name].__name__} is expected")
            result[name] = value
        elif name in known:
            result[name] = known[name].read(value, f"{source}: {name}" if source else known[name].flag)
        else:
            raise ValueError(f"{source}: unknown option {str(name)!r}{closest(str(name), [*known, *others])}")
    return result


def tuned_config(algorithm: str, env: str) -> Path | None:
    """Return the file of settings that were found to work, if there is one for this pair."""
    path = TUNED / f"{algorithm}-{env.replace('/', '-')}.yaml"
    return path if path.is_file() else None


def save_weights(agent: Any, folder: str | Path) -> None:
    """Write what has been learned: a policy in its own format, or the table of a tabular agent."""
    learned = agent.policy if hasattr(agent.policy, "save") else agent
    learned.save(Path(folder) / WEIGHTS)


def load_run(folder: str | Path) -> tuple[Settings, Agent]:
    """Return the settings and the agent of a finished run, with the weights it has learned.

    Raises:
        FileNotFoundError: if there is no run, or it has not been finished.
        ValueError: if the weights do not fit the settings.
    """
    settings = Settings.read(folder)
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"the run in {folder} is not finished: continue it with aligngym train … --resume")
    agent: Any = settings.experiment().make_agent()
    if hasattr(agent.policy, "save"):
        # A network takes its weights over, a table is made anew.
        try:
            agent.policy.load_state_dict(agent.policy.load(weights).state_dict())
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit {Path(folder) / CONFIG}: {error}") from error
    else:
        agent.load(weights)
    return settings, agent
