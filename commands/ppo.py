"""``aligngym ppo``: RLHF as it was first done, with a critic, a KL penalty in the reward, and a reward model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from aligngym.commands.adapter_run import run_options
from aligngym.commands.options import add_options, option
from aligngym.commands.reinforcement_run import ReinforcementOptions, run_reinforcement


@dataclass
class PPOOptions(ReinforcementOptions):
    """Everything that a run depends on; ``config.yaml`` in the output folder has all of it.

    The defaults are those of trl's last PPO trainer, after S. Huang et al., *The N+ implementation details of RLHF with
    PPO*, 2024.
    """

    command = "ppo"

    batch_size: int = option(32, "prompts per iteration, on all devices together; --group-size completions of each")
    group_size: int = option(1, "completions of each prompt")
    beta: float = option(0.05, "strength of the KL penalty towards the reference, reward per nat")
    passes: int = option(4, "how often an iteration goes over its completions")
    missing_end_penalty: float = option(1.0, "taken off the reward of completions that come to no end")
    trace: float = option(0.95, "λ of the advantages")
    clip: float = option(0.2, "ε of the clipped objective")
    value_clip: float | None = option(0.2, "ignore what moves the critic's values further than this")
    value_coefficient: float = option(0.1, "weight of the critic's loss")
    whiten_rewards: bool = option(False, "scale rewards to variance 1 in each batch, the mean staying")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")
    add_options(parser, PPOOptions)


def run(arguments: argparse.Namespace) -> int:
    """Train, save and report; everything that can be wrong with the input is found before the first step."""
    options = run_options(PPOOptions, arguments)
    from aligngym.agents import PPO

    return run_reinforcement(
        options,
        PPO,
        resume=arguments.resume,
        critic=True,
        trace=options.trace,
        clip=options.clip,
        value_clip=options.value_clip,
        value_coefficient=options.value_coefficient,
        whiten_rewards=options.whiten_rewards,
        normalise_advantages="batch",
    )
