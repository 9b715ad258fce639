"""``aligngym dpo``: a preference file and a model in, an adapter and a before/after table out."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from aligngym.commands.adapter_run import TokenBatchOptions, report, run_options, train_adapter
from aligngym.commands.options import add_options, option

#: What the table of a finished run shows of :meth:`DPO.evaluate`, under which name and with how many digits.
SHOWN = {
    "accuracy": ("implicit-reward accuracy [95 %]", ".3f"),
    "margin": ("implicit-reward margin", ".3f"),
    "loss": ("loss", ".4f"),
    "chosen": ("log π(chosen)", ".1f"),
    "rejected": ("log π(rejected)", ".1f"),
}

#: The losses, which are defined where torch is needed; that these are all of them is tested.
LOSS_NAMES = (
    *("sigmoid", "robust", "ipo", "hinge", "simpo", "cpo", "orpo"),
    *("apo_zero", "apo_down", "bco_pair", "nca_pair", "nll"),
)


@dataclass
class DPOOptions(TokenBatchOptions):
    """Everything that a run depends on."""

    command = "dpo"

    train: str | None = option(None, "preference pairs: .json, .jsonl, .csv or .parquet file, or a Hub id")
    eval: str | None = option(None, "pairs to judge the adapter on; without it, some of --train are held back")
    batch_size: int = option(8, "pairs per optimiser step, on all devices together")
    loss: str = option("sigmoid", f"{', '.join(LOSS_NAMES)}, or a mix such as sigmoid:0.8,bco_pair:0.2,nll:1")
    beta: float = option(0.1, "strength of the regularisation towards the reference; ORPO's λ")
    label_smoothing: float = option(0.0, "share of labels believed to be flipped (sigmoid, robust, simpo, cpo)")
    target_margin: float = option(0.0, "SimPO's margin γ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")
    add_options(parser, DPOOptions)


def run(arguments: argparse.Namespace) -> int:
    """Train, save and report; everything that can be wrong with the input is found before the first step."""
    options = run_options(DPOOptions, arguments)
    from aligngym.alignment import DPO, load_preferences
    from aligngym.alignment.preference_losses import loss_weights

    loss_weights(options.loss)  # Before the model is loaded.
    policy = options.load_policy()
    train, held_back = options.train_and_held_back(load_preferences, policy)
    steps = options.steps_over(train)
    agent = DPO(
        policy,
        train,
        beta=options.beta,
        loss=options.loss,
        label_smoothing=options.label_smoothing,
        target_margin=options.target_margin,
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
        batch=options.batch("pairs"),
        facts={"pairs": options.counts(train, held_back)},
    )
    if agent.is_main_process:
        result = agent.evaluate(held_back)
        report(options, policy, f"{len(held_back)} held-back pairs", result, SHOWN, held_back.prompts)
    return 0
