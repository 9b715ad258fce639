"""``aligngym generate``: what a language model says to prompts, to be read, or to be trained on."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligngym.commands.language_model_options import (
    Chosen,
    add_decoding_arguments,
    add_model_arguments,
    decoding_options,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aligngym.alignment import LanguagePolicy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description = (
        "Complete prompts with a language model, and print the completions, or write them to a file that aligngym sft "
        "can train on."
    )
    parser.add_argument(
        "text", metavar="PROMPT", nargs="*", help="a prompt; a message if the model has a chat template"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="rows with a prompt: .json, .jsonl, .csv, .parquet, or a Hub id"
    )
    parser.add_argument("--output", metavar="FILE.jsonl", type=Path, help="write rows there, instead of printing them")
    add_model_arguments(parser)
    add_decoding_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Complete every prompt, print or write the completions, and return 0.

    Raises:
        FileNotFoundError: for a missing file.
        FileExistsError: if the output exists.
        ValueError: for bad options or prompts.
    """
    if bool(arguments.text) == bool(arguments.prompts):
        raise ValueError("give either prompts on the command line or --prompts FILE")
    output = arguments.output
    if output is not None and output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: a .jsonl file is written")
    if output is not None and output.exists():
        raise FileExistsError(f"--output {output} exists already: choose another")
    decoding = decoding_options(arguments)
    chosen = Chosen.of(arguments.model, arguments.adapter)
    from aligngym.alignment.prompts import load_prompts

    rows = load_prompts(arguments.prompts, system_prompt=arguments.system_prompt) if arguments.prompts else []
    policy = chosen.load(arguments)
    rows = rows or [spoken(text, policy.tokenizer, arguments.system_prompt) for text in arguments.text]
    written = complete(policy, rows, arguments.samples, arguments.batch_size, arguments.seed, decoding)
    if output is None:
        width = min(shutil.get_terminal_size().columns, 100)
        groups = [written[start : start + arguments.samples] for start in range(0, len(written), arguments.samples)]
        print("\n\n".join(readable(group, width) for group in groups))
    else:
        write(written, output)
    return 0


def spoken(text: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> dict[str, Any]:
    """Return a row with a prompt from the command line: a message, if the model takes messages.

    Raises:
        ValueError: for an empty prompt, or a system prompt where there are no messages.
    """
    if not text.strip():
        raise ValueError("the prompt is empty")
    if tokenizer.chat_template:
        system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        return {"prompt": [*system, {"role": "user", "content": text}]}
    if system_prompt is not None:
        raise ValueError("--system-prompt goes before messages, and this model's tokenizer has no chat template")
    return {"prompt": text}


@dataclass(frozen=True)
class Written:
    """One completion.

    Attributes:
        row: with the prompt and its other columns.
        text: what was written.
        log_prob: of all its tokens together, under what they were drawn from.
        tokens: how many.
        finished: whether it came to an end before ``max_new_tokens``.
    """

    row: dict[str, Any]
    text: str
    log_prob: float
    tokens: int
    finished: bool


def complete(
    policy: LanguagePolicy,
    rows: Sequence[dict[str, Any]],
    samples: int,
    batch_size: int,
    seed: int,
    decoding: dict[str, Any],
) -> list[Written]:
    """Return ``samples`` completions of every row's prompt, those of one prompt adjacent.

    Raises:
        ValueError: for a prompt that leaves no room.
    """
    from aligngym.alignment.prompts import Problems

    problems = Problems.of(rows, policy.tokenizer, decoding["max_new_tokens"], policy.context_length)
    drawn = policy.generate(problems.tokens, completions=samples, seed=seed, rows_at_once=batch_size, **decoding)
    ids = [actions[mask].tolist() for actions, mask in zip(drawn.actions, drawn.mask, strict=True)]
    texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        Written(rows[number // samples], text, log_prob, len(tokens), finished)
        for number, (text, tokens, log_prob, finished) in enumerate(
            zip(texts, ids, drawn.log_probs.sum(dim=1).tolist(), drawn.terminated.any(dim=1).tolist(), strict=True)
        )
    ]


def readable(completions: Sequence[Written], width: int) -> str:
    """Return a prompt and its completions as text of at most ``width`` columns."""
    from aligngym.alignment.prompts import prompt_text

    blocks = ["\n".join(_wrapped(prompt_text(completions[0].row), width, "▸ "))]
    for number, each in enumerate(completions, start=1):
        label = f"{number} " if len(completions) > 1 else "  "
        unfinished = "" if each.finished else ", not finished"
        facts = f"({each.tokens} tokens, log-probability {each.log_prob:.2f}{unfinished})"
        blocks.append("\n".join([*_wrapped(each.text or "(empty)", width, label), f"  {facts}"]))
    return "\n\n".join(blocks)


def _wrapped(text: str, width: int, label: str) -> Iterator[str]:
    indent = " " * len(label)
    for number, line in enumerate(text.strip().splitlines()):
        begin = indent if number else label
        yield from textwrap.wrap(line, width, initial_indent=begin, subsequent_indent=indent) or [""]


def write(completions: Sequence[Written], path: Path) -> None:
    """Write rows of prompt, completion, log_prob, tokens, finished, and the columns that the prompts came with."""
    from aligngym.alignment.prompts import as_completion
    from aligngym.core.storage import replacing

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for each in completions:
            made = {"prompt": each.row["prompt"], "completion": as_completion(each.row, each.text)}
            made |= {"log_prob": each.log_prob, "tokens": each.tokens, "finished": each.finished}
            # In ASCII: some readers take other characters than a line feed for the end of a line.
            file.write(json.dumps({**each.row, **made}) + "\n")
    unfinished = sum(not each.finished for each in completions)
    print(f"{len(completions)} completions in {path}, {unfinished} of them not finished")
