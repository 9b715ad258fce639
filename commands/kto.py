"""``aligngym kto``: completions with thumbs up or down and a model in, an adapter and a before/after table out."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from aligngym.commands.adapter_run import TokenBatchOptions, report, run_options, train_adapter
from aligngym.commands.options import add_options, option

#: What the table of a finished run shows of :meth:`KTO.evaluate`, under which name and with how many digits.
SHOWN = {
    "accuracy": ("labels told apart [95 %]", ".3f"),
    "margin": ("implicit-reward margin", ".3f"),
    "loss": ("loss", ".4f"),
    "desirable": ("log π(desirable)", ".1f"),
    "undesirable": ("log π(undesirable)", ".1f"),
}


@dataclass
class KTOOptions(TokenBatchOptions):
    """Everything that a run depends on."""

    command = "kto"

    train: str | None = option(
        None, "rows of prompt, completion and label, or preference pairs: .json, .jsonl, .csv or .parquet, or a Hub id"
    )
    batch_size: int = option(16, "rows per optimiser step, on all devices together; at least 2")
    beta: float = option(0.1, "strength of the regularisation towards the reference")
    desirable_weight: float = option(1.0, "λ_D, how much a desirable completion counts")
    undesirable_weight: float = option(1.0, "λ_U, how much an undesirable one does; balances unequal numbers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")
    add_options(parser, KTOOptions)


def run(arguments: argparse.Namespace) -> int:
    """Train, save and report; everything that can be wrong with the input is found before the first step."""
    options = run_options(KTOOptions, arguments)
    from aligngym.alignment.data import load_labelled
    from aligngym.alignment.kto import KTO

    policy = options.load_policy()
    train, held_back = options.train_and_held_back(load_labelled, policy)
    steps = options.steps_over(train)
    agent = KTO(
        policy,
        train,
        beta=options.beta,
        desirable_weight=options.desirable_weight,
        undesirable_weight=options.undesirable_weight,
        batch_size=options.batch_size,
        tokens_per_batch=options.tokens_per_batch,
        **options.optimisation(steps),
    )
    train_adapter(
        agent,
        policy,
        options,
        steps,
        resume=arguments.resume,
        batch=options.batch("rows"),
        facts={"rows": options.counts(train, held_back)},
    )
    if agent.is_main_process:
        result = agent.evaluate(held_back)
        report(options, policy, f"{len(held_back)} held-back rows", result, SHOWN, held_back.prompts)
    return 0
