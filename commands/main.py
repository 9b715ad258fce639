"""``aligngym COMMAND``: finds the command, and turns an expected error into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = {
    "solve": "solve a grid world exactly; print and draw its values and policy",
    "draw": "draw a grid world in the terminal and walk through it",
    "train": "train a policy in an environment, and compare it with the optimum",
    "play": "watch a trained policy in the terminal, a window or a GIF",
    "sft": "train a LoRA adapter on a language model from demonstrations",
    "dpo": "train a LoRA adapter on a language model from a preference file",
    "kto": "train a LoRA adapter on a language model from thumbs up and down",
    "reward": "train a reward model from preferences, or from labelled steps",
    "ppo": "train a LoRA adapter with rewards and a critic: RLHF",
    "grpo": "train a LoRA adapter with rewards of groups of completions",
    "generate": "let a language model complete prompts",
    "evaluate": "evaluate finished runs, policies and language models alike",
}


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; only the command that is asked for is imported, so that help comes at once."""
    parser = argparse.ArgumentParser(prog="aligngym", description="Reinforcement learning and alignment.")
    parser.add_argument("--version", action="version", version=f"aligngym {version('aligngym')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        asked = name in arguments
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if asked:
            module = importlib.import_module(f"aligngym.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for bad input, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = build_parser(arguments).parse_args(arguments)
    warnings.showwarning = _one_line
    # Messages of the libraries below that say nothing about the user's data.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return int(parsed.run(parsed))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"aligngym: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aligngym: interrupted", file=sys.stderr)
        return 130


def _one_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, (FutureWarning, DeprecationWarning)):
        print(f"aligngym: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
