"""``aligngym train``: an algorithm and an environment in, a policy and a comparison with the optimum out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from tqdm.auto import tqdm

from aligngym.commands.experiment import ALGORITHMS, environment_named
from aligngym.commands.options import Table, read_yaml
from aligngym.core.callbacks import Callback, Checkpoints, Metrics
from aligngym.core.suggestions import closest

if TYPE_CHECKING:
    from aligngym.commands.run_folder import Settings
    from aligngym.core import Agent

HEADINGS = {
    "run": "the run",
    "policy": "the policy",
    "sampler": "where experience comes from",
    "agent": "the algorithm",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; the options depend on the algorithm, and are declared when it is known."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "aligngym train ALGORITHM ENV [options]"
    parser.epilog = "algorithms\n" + "\n".join(f"  {name:15} {entry.summary}" for name, entry in ALGORITHMS.items())
    parser.add_argument("algorithm", metavar="ALGORITHM", help="one of those below; its options: ALGORITHM --help")
    parser.add_argument(
        "rest",
        metavar="ENV",
        nargs=argparse.REMAINDER,
        help="a Gymnasium id or the map file of a grid world, and options",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, save and report; what can be wrong with the input is found before anything is written."""
    settings, resume = read_settings(arguments.algorithm, arguments.rest)
    from aligngym.commands.run_folder import CHECKPOINT

    agent: Any = settings.experiment().make_agent()
    refuse_large_minibatch(agent)
    output = Path(settings.values["output"])
    done = 0
    if resume and (output / CHECKPOINT).exists():
        agent.load(output / CHECKPOINT)
        done = steps_done(output, agent.iteration)
    elif not resume:
        settings.write(output)
    announce(settings, done)
    started, before = time.perf_counter(), done
    budget = Budget(settings.values["steps"], done)
    if done < budget.limit:
        learn(agent, budget, output, settings.values["checkpoint_every"])
    report(settings, agent, output, budget.done - before, time.perf_counter() - started)
    return 0


def learn(agent: Agent, budget: Budget, output: Path, checkpoint_every: int) -> None:
    """Let the agent learn until the steps are spent, with metrics, TensorBoard and checkpoints in ``output``."""
    from aligngym.core.tracking import Tracking

    around: list[Callback] = [budget, Tracking(output)]
    if checkpoint_every:
        around.append(Checkpoints(output, checkpoint_every))
    # No iteration is shorter than a step.
    agent.learn(budget.limit, callbacks=around, progress=False)


class Budget(Callback):
    """Counts environment steps into the metrics, shows them in a progress bar, and ends the run when they are spent.

    Args:
        limit: steps in all.
        done: steps before this run.
    """

    def __init__(self, limit: int, done: int = 0) -> None:
        self.limit, self.done = limit, done

    def on_start(self, agent: Agent, iterations: int | None) -> None:
        self.bar = tqdm(
            total=self.limit,
            initial=self.done,
            desc=type(agent).__name__,
            unit=" steps",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )

    def on_iteration(self, agent: Agent, metrics: Metrics) -> None:
        steps = steps_of(agent, metrics)
        self.done += steps
        metrics["env_steps"] = self.done
        shown = {name.rsplit("/")[-1]: f"{metrics[name]:.4g}" for name in agent.headline if name in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(steps)
        if self.done >= self.limit:
            agent.stop()

    def on_end(self, agent: Agent) -> None:
        self.bar.close()


def steps_of(agent: Any, metrics: Metrics) -> int:
    """Return how many steps the environments took in an iteration, of all copies together."""
    sampler: Any = getattr(agent, "sampler", None)
    if hasattr(sampler, "steps"):
        return int(sampler.steps * sampler.env.num_envs)
    return round(metrics["length"] * (sampler.episodes if sampler else agent.episodes_per_iteration))


def steps_done(output: Path, iteration: int) -> int:
    """Return how many environment steps a run had taken after an iteration, by its metrics."""
    with (output / "metrics.jsonl").open(encoding="utf-8") as file:
        for line in file:
            # The last line of a killed run may have been cut short.
            if line.endswith("\n") and (record := json.loads(line))["step"] == iteration:
                return int(record["env_steps"])
    raise ValueError(f"{output}/metrics.jsonl has no iteration {iteration}, which the checkpoint is from: start anew")


def refuse_large_minibatch(agent: Any) -> None:
    """Raise ValueError if a minibatch is known to be larger than the batch, before the first one is sampled."""
    size: int | None = getattr(agent, "minibatch_size", None)
    sampler: Any = getattr(agent, "sampler", None)
    if size and hasattr(sampler, "steps") and hasattr(agent, "minibatches") and size > steps_of(agent, {}):
        raise ValueError(
            f"--minibatch-size {size} is more than the {steps_of(agent, {})} actions of a batch "
            f"(--num-envs {sampler.env.num_envs} times --segment-steps {sampler.steps}): make it smaller"
        )


# Settings from flags and files.


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def read_settings(algorithm: str, words: Sequence[str]) -> tuple[Settings, bool]:
    """Return the settings that the words after the algorithm stand for, and whether a run is to be continued.

    Raises:
        ValueError: for whatever is wrong with them.
        FileNotFoundError: for a missing file, or a run to continue that is not there.
        FileExistsError: if the output folder holds a run already.
    """
    from aligngym.commands.run_folder import CONFIG, Settings, checked, options_of, tuned_config

    parser, arguments = parse(algorithm, words)
    known = {option.name for options in options_of(algorithm).values() for option in options}
    flags = checked({name: value for name, value in vars(arguments).items() if name in known}, "", algorithm)
    if arguments.env_option:
        flags["env_options"] = dict(map(key_and_value, arguments.env_option))
    if arguments.wrapper:
        flags["wrappers"] = arguments.wrapper
    base: dict[str, Any] = {}
    # What was tuned for the default map says nothing about another one.
    env_id, map_options = environment_named(arguments.env) if arguments.env else (None, {})
    config = arguments.config or (env_id and not map_options and tuned_config(algorithm, env_id))
    if config and config != "none":
        base = checked(read_yaml(config), str(config), algorithm)
    if not arguments.env and "env" not in base:
        parser.error("ENV is missing: a Gymnasium id or the map file of a grid world")
    given = {**base, **flags, "env_options": {**base.get("env_options", {}), **flags.get("env_options", {})}}
    settings = Settings.complete(algorithm, arguments.env, given, name=arguments.env or "")
    output = Path(settings.values["output"])
    if arguments.resume:
        if not arguments.config:
            given = flags
        return continued(Settings.read(output), settings, given, bool(arguments.env)), True
    if (output / CONFIG).exists():
        raise FileExistsError(f"{output} already holds a run: choose another --output, or continue it with --resume")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output {output} is a file: choose a folder")
    if config and not arguments.config:
        print(f"settings {config}")
    return settings, False


def continued(recorded: Settings, asked: Settings, given: dict[str, Any], env_given: bool) -> Settings:
    """Return the recorded settings of a run, if nothing that is given differs from them."""
    pairs: list[tuple[str, Any, Any]] = [("algorithm", recorded.algorithm, asked.algorithm)]
    options = dict(given.get("env_options", {}))
    if env_given:
        pairs.append(("env", recorded.env, asked.env))
        options |= {name: value for name, value in asked.env_options.items() if name == "map"}
    pairs += [(name, recorded.env_options.get(name), value) for name, value in options.items()]
    pairs += [(name, recorded.values[name], asked.values[name]) for name in given if name in recorded.values]
    if "wrappers" in given:
        pairs.append(("wrappers", recorded.wrappers, given["wrappers"]))
    for name, before, now in pairs:
        if before != now:
            raise ValueError(f"--resume continues with {name}={before}, and {now} was given: leave it out")
    return recorded


def parse(algorithm: str, words: Sequence[str]) -> tuple[Parser, argparse.Namespace]:
    """Read the flags that the algorithm has; their values are still text."""
    from aligngym.commands.run_folder import options_of

    options = options_of(algorithm)
    parser = Parser(prog=f"aligngym train {algorithm}", description=ALGORITHMS[algorithm].summary, allow_abbrev=False)
    parser.usage = f"{parser.prog} ENV [options]"
    parser.add_argument("env", metavar="ENV", nargs="?", help="a Gymnasium id, or the map file of a grid world")
    run_group = parser.add_argument_group(HEADINGS["run"])
    run_group.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="settings, before which flags come; by default those tuned for the environment, if there are; "
        "none takes the defaults below",
    )
    run_group.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")
    run_group.add_argument(
        "--env-option", metavar="KEY=VALUE", action="append", help="of the environment, such as is_slippery=false"
    )
    run_group.add_argument(
        "--wrapper",
        metavar="NAME",
        action="append",
        help="from gymnasium.wrappers or minigrid.wrappers, innermost first",
    )
    for part, group in options.items():
        heading = run_group if part == "run" else parser.add_argument_group(HEADINGS[part])
        for option in group:
            option.add_to(heading)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        flag = unknown[0].split("=")[0]
        parser.error(f"unknown option {flag}{closest(flag, parser._option_string_actions)}")
    return parser, arguments


def key_and_value(text: str) -> tuple[str, Any]:
    """Split ``key=value``, and read the value as YAML does."""
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise ValueError(f"--env-option {text}: KEY=VALUE is expected")
    return key, yaml.safe_load(value)


# What is printed.


def announce(settings: Settings, done: int) -> None:
    """Print what is about to happen."""
    values = settings.values
    options = "".join(f", {name}={value!r}" for name, value in settings.env_options.items() if name != "map")
    learned = f"a {values['policy']}" if values.get("policy") else "a table"
    print(
        f"task     {settings.algorithm} in {settings.env}{options}: {learned}, seed {values['seed']}\n"
        f"steps    {values['steps']:,}{f', from {done:,}' if done else ''}\n"
        f"output   {values['output']}",
        flush=True,
    )


def report(settings: Settings, agent: Agent, output: Path, steps: int, seconds: float) -> None:
    """Save the weights, print how good they are, and keep what was printed."""
    from aligngym.commands.judgement import judge
    from aligngym.commands.run_folder import WEIGHTS, save_weights

    save_weights(agent, output)
    judgement = judge(settings, agent, settings.values["evaluation_episodes"], settings.values["seed"])
    rows = [*judgement_rows(judgement, settings.values["evaluation_episodes"])]
    rows += [
        ["environment steps", f"{steps:,}", ""],
        ["seconds", f"{seconds:.1f}", ""],
        ["steps/s", f"{steps / seconds:,.0f}" if steps else "–", ""],
    ]
    text = str(Table(["", "learned", "optimum"], rows))
    print(f"\n{text}\n")
    (output / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(
        f"policy          {output / WEIGHTS}\n"
        f"metrics         {output / 'metrics.jsonl'}, tensorboard --logdir {output}\n"
        f"watch it        aligngym play {output}\n"
        f"the same again  aligngym train {settings.algorithm} --config {output / 'config.yaml'} --output ANOTHER"
    )


def judgement_rows(judgement: Any, episodes: int) -> list[list[str]]:
    """Return what a policy is worth as rows of a table: what, learned, optimum."""
    limit = f", {judgement.truncated:.0%} cut off" if judgement.truncated else ""
    played = f"return of the greedy policy, {episodes} episodes{limit} [95 %]"
    rows = [[played, f"{judgement.mean:.4g} ± {judgement.half:.2g}", ""]]
    exact = judgement.exact
    for name, label in (("greedy", "greedy policy"), ("drawn", "actions drawn")):
        if name in exact:
            label = f"exact return, discount {judgement.discount:g}, no time limit, {label}"
            rows.append([label, f"{exact[name]:.6f}", f"{exact['best']:.6f}"])
    return rows
