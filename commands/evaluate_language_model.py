"""``aligngym evaluate`` for language models: completions judged by rewards, and multiple-choice questions."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligngym.commands.language_model_options import (
    CONFIG,
    Chosen,
    add_decoding_arguments,
    add_model_arguments,
    decoding_options,
)
from aligngym.commands.options import Table, read_yaml

if TYPE_CHECKING:
    from aligngym.alignment import LanguagePolicy
    from aligngym.alignment.evaluation import CompletionEvaluation
    from aligngym.alignment.multiple_choice import ChoiceEvaluation, Question
    from aligngym.alignment.rewards import Rewards
    from aligngym.core.statistics import Estimate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that language models have."""
    judged = parser.add_argument_group("language models: what to judge by")
    judged.add_argument("--prompts", metavar="FILE", help="rows with a prompt, to be completed and judged by rewards")
    judged.add_argument("--rewards", metavar="LIST", help="such as final_answer, or my_rewards.py:brevity:0.1, …")
    judged.add_argument("--reward-model", metavar="FOLDER", help="that aligngym reward has trained, or a Hub id")
    judged.add_argument("--choices", metavar="FILE", help="rows of question, choices and answer, asked in every order")
    judged.add_argument(
        "--by-text", action="store_true", help="read the letter from a completion, not from log-probabilities"
    )
    judged.add_argument("--limit", type=int, metavar="N", help="take only the first rows")
    judged.add_argument(
        "--no-reference", action="store_true", help="judge the model alone, not beside what it was without the adapter"
    )
    judged.add_argument("--output", metavar="FILE.json", type=Path, help="write the numbers there, too")
    add_model_arguments(parser)
    add_decoding_arguments(parser)


def is_asked_for(arguments: argparse.Namespace) -> bool:
    """Return whether the arguments are about a language model: they name one, or a run that trained one."""
    named = ("model", "adapter", "prompts", "rewards", "reward_model", "choices")
    return any(getattr(arguments, name) for name in named) or any(map(_trained_an_adapter, arguments.runs))


def _trained_an_adapter(folder: Path) -> bool:
    config = folder / CONFIG
    return config.is_file() and "model" in read_yaml(config) and "algorithm" not in read_yaml(config)


def run(arguments: argparse.Namespace) -> int:
    """Judge a language model, print a table, and return 0.

    Raises:
        FileNotFoundError: for a missing file or adapter.
        ValueError: for bad options, rows or rewards.
    """
    _check(arguments)
    decoding = decoding_options(arguments)
    chosen = Chosen.of(arguments.model, arguments.runs[0] if arguments.runs else arguments.adapter)
    table, metrics = (_choices if arguments.choices else _completions)(arguments, chosen, decoding)
    print(table)
    if arguments.output is not None:
        from aligngym.core.storage import replacing

        numbers = {name: None if math.isnan(value) else value for name, value in metrics.items()}
        with replacing(arguments.output) as temporary:
            temporary.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if len(arguments.runs) + bool(arguments.adapter) > 1:
        raise ValueError("one language model at a time: give one RUN, or one --adapter")
    if bool(arguments.prompts) == bool(arguments.choices):
        raise ValueError("a language model is judged by either --prompts FILE with --rewards, or --choices FILE")
    if arguments.prompts and not (arguments.rewards or arguments.reward_model):
        raise ValueError("--prompts needs something to judge completions by: --rewards LIST or --reward-model FOLDER")
    if arguments.choices and (arguments.rewards or arguments.reward_model):
        raise ValueError("--choices are judged by their answers: leave out --rewards and --reward-model")
    if arguments.choices and arguments.samples > 1:
        raise ValueError("--choices are answered once in every order: leave out --samples")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit is at least 1, not {arguments.limit}")


def _completions(
    arguments: argparse.Namespace, chosen: Chosen, decoding: dict[str, Any]
) -> tuple[str, dict[str, float]]:
    from aligngym.alignment.evaluation import evaluate_completions
    from aligngym.alignment.prompts import load_prompts
    from aligngym.alignment.rewards import Rewards

    rows = load_prompts(arguments.prompts, system_prompt=arguments.system_prompt)[: arguments.limit]
    rewards = Rewards.parse(arguments.rewards) if arguments.rewards else None
    if rewards is not None:
        # Loading a model takes longer than seeing that a column is missing.
        rewards.check(set().union(*rows))
    policy = chosen.load(arguments)
    if arguments.reward_model:
        rewards = with_reward_model(rewards, policy, arguments.reward_model)
    assert rewards is not None
    result = evaluate_completions(
        policy,
        rows,
        rewards,
        completions=arguments.samples,
        against_reference=not arguments.no_reference and chosen.adapter is not None,
        rows_at_once=arguments.batch_size,
        seed=arguments.seed,
        **decoding,
    )
    way = "greedy" if decoding["greedy"] else f"{arguments.samples} drawn of each"
    return completions_table(result, f"{len(rows)} prompts, {way} [95 %]"), result.metrics


def with_reward_model(rewards: Rewards | None, policy: LanguagePolicy, folder: str) -> Rewards:
    """Return rewards with a reward model added, which shares the policy's base model if it has the same."""
    from aligngym.alignment.reward_model import RewardModel
    from aligngym.alignment.rewards import Rewards

    try:
        model = RewardModel.sharing(policy, folder)
    except (FileNotFoundError, ValueError):
        # Of another base, or no adapter at all; what is wrong with it otherwise is said again.
        model = RewardModel.from_pretrained(folder)
    added = Rewards([model], names=["reward_model"])
    return added if rewards is None else Rewards.together([rewards, added])


def completions_table(result: CompletionEvaluation, title: str) -> str:
    """Return what was measured of completions, the policy's beside the reference's."""
    labels = {"reward": "reward", "length": "length, tokens", "unfinished": "unfinished"}
    labels |= {f"distinct_{n}": f"distinct {n}-grams" for n in (1, 2)}
    labels["distinct_2_of_prompt"] = "distinct 2-grams, of one prompt"
    hidden, names = "", list(result.completions.components)
    if len(names) == 1 and result.policy["reward"] == result.policy[f"rewards/{names[0]}"]:
        labels["reward"] = f"reward, {names[0]}"
        hidden = f"rewards/{names[0]}"
    rows = []
    for name, estimate in result.policy.items():
        if name == hidden:
            continue
        label = labels.get(name) or f"  {name.removeprefix('rewards/')}"
        other = [shown(result.reference[name])] if result.reference else []
        rows.append([label, shown(estimate), *other])
    if result.win_rate is not None:
        rows.append(["win rate against the reference, ties half", shown(result.win_rate), ""])
        rows.append(["KL to the reference, nats", f"{result.kl:.2f} ± {result.kl_standard_error:.2f}", "0"])
    return str(Table([title, "policy", *(["reference"] if result.reference else [])], rows))


def shown(estimate: Estimate) -> str:
    """Return an estimate with its interval, if it has one."""
    if math.isnan(estimate.value):
        return "–"
    interval = "" if math.isnan(estimate.low) else f" [{_number(estimate.low)}, {_number(estimate.high)}]"
    return f"{_number(estimate.value)}{interval}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _choices(arguments: argparse.Namespace, chosen: Chosen, decoding: dict[str, Any]) -> tuple[str, dict[str, float]]:
    from aligngym.alignment.multiple_choice import evaluate_choices, load_questions

    questions = load_questions(arguments.choices)[: arguments.limit]
    policy = chosen.load(arguments)
    how: dict[str, Any] = {name: getattr(arguments, name) for name in ("system_prompt", "batch_size", "seed")}
    how |= {"by": "text", **decoding} if arguments.by_text else {}
    answered = {"policy": evaluate_choices(policy, questions, **how)}
    metrics = answered["policy"].metrics
    if not arguments.no_reference and chosen.adapter is not None:
        answered["reference"] = evaluate_choices(policy, questions, reference=True, **how)
        metrics |= {f"reference_{name}": value for name, value in answered["reference"].metrics.items()}
    return choices_table(answered, questions, "by text" if arguments.by_text else "by log-probability"), metrics


def choices_table(answered: Mapping[str, ChoiceEvaluation], questions: list[Question], way: str) -> str:
    """Return what was chosen and how often it was right, a column for each who answered, and one for guessing."""
    from aligngym.alignment.multiple_choice import chance

    guessed, guessed_circular = chance(questions)
    results = list(answered.values())

    def row(label: str, show: Callable[[ChoiceEvaluation], str], guessing: str = "") -> list[str]:
        return [label, *map(show, results), guessing]

    rows = [
        row("right in every order of the options", lambda x: shown(x.circular_accuracy), f"{guessed_circular:.3f}"),
        row("right, mean of all orders", lambda x: shown(x.accuracy), f"{guessed:.3f}"),
        row("position bias (0 none, 1 one letter)", lambda x: f"{x.position_bias:.3f}", "0"),
    ]
    for letter in results[0].chosen:
        if any(result.chosen[letter] for result in results) or letter != "none":
            right = results[0].correct.get(letter, 0) / sum(results[0].correct.values())
            label = "chosen none" if letter == "none" else f"chosen {letter} (right in {right:.1%})"
            rows.append(["  " + label, *(f"{result.metrics[f'chosen/{letter}']:.1%}" for result in results), ""])
    return str(Table([f"{len(questions)} questions, {way} [95 %]", *answered, "guessing"], rows))
