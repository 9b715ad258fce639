"""``aligngym reward``: preferences, or solutions judged step by step, in; a reward model and its accuracy out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from aligngym.commands.adapter_run import CONFIG, AdapterOptions, run_options, train_adapter
from aligngym.commands.options import Table, add_options, option

if TYPE_CHECKING:
    from aligngym.alignment.data import TokenPreferences
    from aligngym.alignment.reward_model import RewardModel
    from aligngym.alignment.reward_training import Calibration

#: What the table of a finished run shows, under which name and with how many digits.
PAIRS_SHOWN = {
    "accuracy": ("accuracy [95 %]", ".3f"),
    "loss": ("loss", ".4f"),
    "margin": ("margin", ".3f"),
    "brier": ("Brier score", ".4f"),
    "calibration_error": ("calibration error", ".4f"),
}
STEPS_SHOWN = {
    "solution_accuracy": ("solutions judged rightly [95 %]", ".3f"),
    "accuracy": ("steps judged rightly", ".3f"),
    "right": ("steps that are right", ".3f"),
    "loss": ("loss", ".4f"),
    "brier": ("Brier score", ".4f"),
    "calibration_error": ("calibration error", ".4f"),
}
#: Characters of a text that a list of mistakes shows.
WIDTH = 90


@dataclass
class RewardOptions(AdapterOptions):
    """Everything that a run depends on."""

    command = "reward"
    positive = (*AdapterOptions.positive, "eval_size", "max_length")
    sources = ("train", "eval")

    train: str | None = option(
        None, "pairs (prompt, chosen, rejected) or steps (prompt, completions, labels): .jsonl, … file, or a Hub id"
    )
    adapter: str | None = option(None, "continue this reward adapter")
    batch_size: int = option(8, "pairs, or solutions, per optimiser step")
    eval: str | None = option(None, "rows to judge the model on; without it, some of --train are held back")
    eval_size: int = option(100, "rows held back for evaluation, at most a fifth of --train")
    max_length: int = option(1024, "most tokens of prompt and completion together")
    drop_invalid: bool = option(False, "leave out rows that cannot be used, instead of stopping at them")
    process: bool = option(False, "judge step by step; by itself where the rows have completions and labels")
    separator: str = option("\n", "what ends a step (--process; default: a new line)")
    mistakes: int = option(3, "pairs to show that are ranked most wrongly")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")
    add_options(parser, RewardOptions)


def run(arguments: argparse.Namespace) -> int:
    """Train, save and report; everything that can be wrong with the input is found before the first step."""
    options = run_options(RewardOptions, arguments)
    from aligngym.alignment.data import read_rows
    from aligngym.alignment.step_labels import is_stepwise

    rows = read_rows(str(options.train))
    if options.process or (rows and is_stepwise(rows[0])):
        options.process = True
        return _train_on_steps(options, arguments.resume)
    return _train_on_pairs(options, arguments.resume)


def _train_on_pairs(options: RewardOptions, resume: bool) -> int:
    from aligngym.alignment.data import load_preferences
    from aligngym.alignment.reward_model import RewardModel
    from aligngym.alignment.reward_training import RewardTraining, judge, margins, pair_calibration

    model = RewardModel.for_training(options.model, **_model_options(options))

    def load(source: str) -> TokenPreferences:
        return load_preferences(
            source, model.tokenizer, max_length=options.max_length, drop_invalid=options.drop_invalid
        )

    train, held_back = _train_and_held_back(options, load)
    steps = options.steps(len(train))
    agent = RewardTraining(model, train, batch_size=options.batch_size, **options.optimisation(steps))
    before = judge(margins(model, held_back))
    _train(agent, model, model.classifier, options, steps, resume, "pairs", len(train), len(held_back))
    after = margins(model, held_back)
    text = [
        _comparison(f"{len(held_back)} held-back pairs", before, judge(after), PAIRS_SHOWN),
        _reliability("surest side's probability", pair_calibration(after)),
    ]
    _finish(options, [*text, *_mistakes(options, model, held_back, after)])
    return 0


def _train_on_steps(options: RewardOptions, resume: bool) -> int:
    from aligngym.alignment.process_reward_model import ProcessRewardModel, ProcessRewardTraining
    from aligngym.alignment.step_labels import load_step_labels

    separator: dict[str, Any] = {} if options.adapter else {"separator": options.separator}
    model = ProcessRewardModel.for_training(options.model, **_model_options(options), **separator)

    def load(source: str) -> Any:
        return load_step_labels(source, model, max_length=options.max_length, drop_invalid=options.drop_invalid)

    train, held_back = _train_and_held_back(options, load)
    steps = options.steps(len(train))
    agent = ProcessRewardTraining(model, train, batch_size=options.batch_size, **options.optimisation(steps))
    before = agent.evaluate(held_back)
    _train(agent, model, model.classifier, options, steps, resume, "solutions", len(train), len(held_back))
    if agent.is_main_process:
        title = f"{len(held_back)} held-back solutions, {held_back.num_steps} steps"
        after = agent.evaluate(held_back)
        reliability = _reliability("probability of being right", agent.calibration(held_back))
        _finish(options, [_comparison(title, before, after, STEPS_SHOWN), reliability])
    return 0


def _model_options(options: RewardOptions) -> dict[str, Any]:
    from aligngym.alignment.language_policy import default_lora

    return {
        "lora": None if options.adapter else default_lora(options.lora_r, options.lora_dropout),
        "adapter": options.adapter,
        "dtype": options.dtype,
        "seed": options.seed,
        "trust_remote_code": options.trust_remote_code,
    }


def _train_and_held_back(options: RewardOptions, load: Any) -> tuple[Any, Any]:
    train = load(options.train)
    if options.eval:
        return train, load(options.eval)
    return train.hold_back(min(options.eval_size, max(1, len(train) // 5)), options.seed)


class _Trained:
    """What ``train_adapter`` asks of a policy, for a reward model."""

    packed = False

    def __init__(self, model: Any, weights: Any) -> None:
        self.save, self.device, self.parameters = model.save, model.device, weights.parameters


def _train(
    agent: Any, model: Any, weights: Any, options: RewardOptions, steps: int, resume: bool, unit: str, *counts: int
) -> None:
    options.dtype = str(next(weights.parameters()).dtype).removeprefix("torch.")
    train_adapter(
        agent,
        cast(Any, _Trained(model, weights)),
        options,
        steps,
        resume=resume,
        batch=f"{options.batch_size} {unit}",
        facts={
            "data": f"{counts[0]} {unit} to train on, {counts[1]} to judge by ({options.eval or 'held back'})",
        },
    )


def _comparison(
    title: str, before: Mapping[str, float], after: Mapping[str, float], shown: Mapping[str, tuple[str, str]]
) -> str:
    rows = []
    for name, (label, digits) in shown.items():
        rows.append([label, format(before[name], digits), format(after[name], digits)])
        if f"{name}_low" in after:
            rows[-1][2] += f" [{after[f'{name}_low']:{digits}}, {after[f'{name}_high']:{digits}}]"
    return str(Table([title, "before", "after"], rows))


def _reliability(label: str, found: Calibration) -> str:
    return str(Table([label, "how many", "said", "came true"], found.rows))


def _mistakes(options: RewardOptions, model: RewardModel, pairs: TokenPreferences, margin: Any) -> list[str]:
    from aligngym.alignment.reward_training import most_wrong

    def text(tokens: Any) -> str:
        words = " ".join(str(model.tokenizer.decode(tokens, skip_special_tokens=True)).split())
        return words if len(words) <= WIDTH else f"{words[: WIDTH - 1]}…"

    rows = most_wrong(margin, options.mistakes)
    blocks = [
        f"▸ … {text(pairs.prompts[row][-WIDTH // 3 :])}\n"
        f"  margin {float(margin[row]):.2f}\n"
        f"  people   {text(pairs.chosen[row])}\n"
        f"  model    {text(pairs.rejected[row])}"
        for row in rows
    ]
    return ["ranked most wrongly: what people preferred, and what the model prefers\n" + "\n".join(blocks)] * bool(rows)


def _finish(options: RewardOptions, parts: list[str]) -> None:
    text = "\n\n".join(parts)
    print(f"\n{text}")
    output = options.folder
    (output / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(
        f"\nadapter         {output / 'adapter'}  (peft's format, with the head and the tokenizer)\n"
        f"metrics         {output / 'metrics.jsonl'}, tensorboard --logdir {output}\n"
        f"the same again  aligngym reward --config {output / CONFIG} --output ANOTHER"
    )
