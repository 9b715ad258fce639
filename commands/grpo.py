"""``aligngym grpo``: reinforcement learning from verifiable rewards, with groups of completions instead of a critic."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from aligngym.commands.adapter_run import run_options
from aligngym.commands.options import add_options, option
from aligngym.commands.reinforcement_run import ReinforcementOptions, run_reinforcement

#: The class of each algorithm and what makes it that one.
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("GRPO", {}),
    "dr-grpo": ("GRPO", {"scale": False, "normalise": "trajectories"}),
    "dapo": ("DAPO", {}),
    "gspo": ("GSPO", {}),
    "cispo": ("CISPO", {}),
    "rloo": ("RLOO", {}),
    "reinforce++": ("ReinforcePlusPlus", {}),
    "best-of-n": ("RejectionSampling", {}),
}


@dataclass
class GRPOOptions(ReinforcementOptions):
    """Everything that a run depends on; ``config.yaml`` in the output folder has all of it."""

    command = "grpo"

    algorithm: str = option("grpo", "what makes an advantage of a group's rewards, and a loss", tuple(ALGORITHMS))
    clip: float | None = option(None, "ε of the clipped objective; default: the algorithm's own")
    clip_high: float | None = option(None, "its upper side, if that is another")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(f"--group-size {self.group_size}: a completion is compared with others, so at least 2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")
    add_options(parser, GRPOOptions)


def run(arguments: argparse.Namespace) -> int:
    """Train, save and report; everything that can be wrong with the input is found before the first step."""
    options = run_options(GRPOOptions, arguments)
    from aligngym import agents

    name, settings = ALGORITHMS[options.algorithm]
    clips = {"clip": options.clip, "clip_high": options.clip_high}
    given = {side: value for side, value in clips.items() if value is not None}
    if given and name in ("RLOO", "RejectionSampling", "CISPO"):
        raise ValueError(
            f"--{next(iter(given)).replace('_', '-')} would be ignored: {options.algorithm} has no such clip"
        )
    return run_reinforcement(options, getattr(agents, name), resume=arguments.resume, **{**settings, **given})
