"""``aligngym evaluate``: how good the policies of finished runs are, each and together, and language models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aligngym.commands import evaluate_language_model
from aligngym.commands.options import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description = (
        "Runs of aligngym train: play episodes with the greedy policies of finished runs, and compare them with the "
        "exact optimum where the environment shows its model. Several runs of one algorithm, with different seeds, are "
        "summed up by their interquartile mean and its bootstrap interval. Language models: judge completions by "
        "rewards, beside those of the reference (--prompts), or ask multiple-choice questions (--choices)."
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        type=Path,
        help="folder that aligngym train, or one with an adapter, has written",
    )
    parser.add_argument(
        "--episodes", type=int, default=100, metavar="N", help="of each run in an environment (default: %(default)s)"
    )
    evaluate_language_model.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print a table, and return 0.

    Raises:
        FileNotFoundError: if a folder holds no finished run.
        ValueError: for a bad option, or a run that cannot be loaded.
    """
    if arguments.seed < 0:
        raise ValueError(f"--seed is at least 0, not {arguments.seed}")
    if evaluate_language_model.is_asked_for(arguments):
        return evaluate_language_model.run(arguments)
    if not arguments.runs:
        raise ValueError("give the folder of a run, or a language model with --prompts FILE or --choices FILE")
    return evaluate_runs(arguments)


def evaluate_runs(arguments: argparse.Namespace) -> int:
    """Play episodes with the policies of runs of ``aligngym train``.

    Raises:
        FileNotFoundError: if a folder holds no finished run.
        ValueError: for a bad option, or a run that cannot be loaded.
    """
    if arguments.episodes < 1:
        raise ValueError(f"--episodes is at least 1, not {arguments.episodes}")
    from aligngym.commands.judgement import judge
    from aligngym.commands.run_folder import load_run

    loaded = [(folder, *load_run(folder)) for folder in arguments.runs]
    groups: dict[tuple[str, str], list[Any]] = {}
    rows = []
    for folder, settings, agent in loaded:
        judgement = judge(settings, agent, arguments.episodes, arguments.seed)
        exact = judgement.exact
        values = [f"{exact[name]:.6f}" if name in exact else "–" for name in ("greedy", "best")]
        rows.append([str(folder), f"{judgement.mean:.4g}", f"± {judgement.half:.2g}", *values])
        key = (settings.algorithm, f"{settings.env} {settings.env_options or ''} {settings.wrappers or ''}")
        groups.setdefault(key, []).append(judgement)
    rows += [row for (algorithm, _), group in groups.items() if len(group) > 1 for row in together(algorithm, group)]
    print(Table([f"greedy policy, {arguments.episodes} episodes", "return", "[95 %]", "exact", "optimum"], rows))
    return 0


def together(algorithm: str, judgements: list[Any]) -> list[list[str]]:
    """Return a row with the interquartile means over runs, and one with their bootstrap intervals."""
    from aligngym.core.statistics import bootstrap_interval, interquartile_mean

    middle: list[str] = []
    interval: list[str] = []
    columns = [[judgement.mean for judgement in judgements]]
    columns += [[judgement.exact.get("greedy", float("nan")) for judgement in judgements]]
    for scores, digits in zip(columns, (".4g", ".6f"), strict=True):
        if any(score != score for score in scores):
            middle, interval = [*middle, "–"], [*interval, ""]
            continue
        low, high = bootstrap_interval(scores)
        middle.append(f"{interquartile_mean(scores):{digits}}")
        interval.append(f"[{low:{digits}}, {high:{digits}}]")
    return [
        [f"{algorithm}, {len(judgements)} runs: interquartile mean", middle[0], "", middle[1], ""],
        ["  bootstrap interval, 95 %", interval[0], "", interval[1], ""],
    ]
