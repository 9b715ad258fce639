"""``aligngym sft``: demonstrations and a model in, an adapter and a before/after table out."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from aligngym.commands.adapter_run import ComparisonOptions, report, run_options, train_adapter
from aligngym.commands.options import add_options, option

#: What the table of a finished run shows, under which name and with how many digits.
SHOWN = {"loss": ("loss, nats a token", ".4f"), "perplexity": ("perplexity", ".3f")}


@dataclass
class SFTOptions(ComparisonOptions):
    """Everything that a run depends on."""

    command = "sft"

    train: str | None = option(
        None, "demonstrations (prompt and completion, messages, or text): .jsonl, … file, or a Hub id"
    )
    eval: str | None = option(None, "demonstrations to judge the adapter on; without it, some of --train are held back")
    batch_size: int = option(8, "demonstrations per optimiser step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")
    add_options(parser, SFTOptions)


def run(arguments: argparse.Namespace) -> int:
    """Train, save and report; everything that can be wrong with the input is found before the first step."""
    options = run_options(SFTOptions, arguments)
    from aligngym.alignment.demonstrations import load_demonstrations
    from aligngym.alignment.supervised import SupervisedFineTuning

    policy = options.load_policy()
    train, held_back = options.train_and_held_back(load_demonstrations, policy)
    steps = options.steps(len(train))
    agent = SupervisedFineTuning(policy, train, batch_size=options.batch_size, **options.optimisation(steps))
    counts = (
        f"{len(train)} to train on ({train.num_learned / len(train):.0f} learned tokens each), "
        f"{len(held_back)} to judge by ({options.eval or 'held back'})"
    )
    train_adapter(
        agent,
        policy,
        options,
        steps,
        resume=arguments.resume,
        batch=f"{options.batch_size} rows",
        facts={"rows": counts},
    )
    result = agent.evaluate(held_back)
    report(options, policy, f"{len(held_back)} held-back rows", result, SHOWN, held_back.prompts)
    return 0
