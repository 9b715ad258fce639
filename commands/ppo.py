"""``aligngym ppo``: RLHF as it was first done, with a critic, a KL penalty in the reward, and a reward model.

What the equations leave open, and whom we follow. Z: D. Ziegler et al., *Fine-tuning language models from human
preferences*, 2019. S: N. Stiennon et al., *Learning to summarize from human feedback*, 2020. O: L. Ouyang et al.,
*Training language models to follow instructions with human feedback*, 2022. H: S. Huang et al., *The N+ implementation
details of RLHF with PPO*, 2024, whose defaults trl's last PPO trainer had.

- The score is paid with the last real token, the end-of-sequence token included, and never with padding (Z, H).
- −β log π/π_ref is paid with every token (Z, S, O), from the log-probabilities of the policy that acted; β is fixed, or
  follows a target (Z: :class:`~aligngym.agents.AdaptiveKL`).
- A completion without an end pays ``--missing-end-penalty`` (H: "EOS trick", there a score of −1 in place of the
  model's; here the penalty is taken off it, as in trl).
- γ = 1, λ = 0.95 (Z, S, O, H). Nothing follows the last token, also where a completion was cut off at its largest
  length, which is part of the task: its value is 0.
- The critic is an adapter of its own, so actor and critic share no trained weights (S); its head starts at 0. Its
  values are clipped to ±0.2 of where they were, and its loss counts 0.1 (H).
- Advantages are standardised over the whole batch (H); rewards only on request, and then their mean stays (Z, H).
- Dropout of the model is off (Z, H), because the policy's reference, behaviour and update must be one function; the
  temperature is part of the policy, so that what is drawn from is what is trained.
- Completions are drawn anew for every iteration, gone over four times (H), and clipped at ±0.2 as PPO has it.
- AdamW without weight decay, gradients shortened to 1; the learning rate rises over a tenth of the steps and falls
  linearly to 0 from there.
"""

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
