"""Rewards by name, for command lines and YAML files.

A list with commas between, each ``REWARD[:WEIGHT]``, where the reward is

- the name of a built-in one: ``final_answer``;
- a function in a Python file, or in a module that can be imported: ``my_rewards.py:brevity``,
  ``trl.rewards:think_format_reward``;
- either with settings in parentheses, if it is made by a class or a function: ``length_penalty(per_token=0.01)``,
  ``my_rewards.py:make_judge(strict=True)``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aligngym.core.suggestions import closest


class BuiltIn(NamedTuple):
    """A reward that has a name.

    Attributes:
        source: the module and the function or class in it, which is imported when it is asked for.
        help: one line.
        settings: which it takes, as ``--help`` shows them; empty for a plain function.
    """

    source: str
    help: str
    settings: str = ""


_OURS = "aligngym.alignment"
_COLUMN = "column=answer"

BUILT_IN: dict[str, BuiltIn] = {
    "final_answer": BuiltIn(f"{_OURS}.verifiers:final_answer", "1 if the final answer equals the column answer"),
    "multiple_choice": BuiltIn(f"{_OURS}.verifiers:multiple_choice", "1 if the letter chosen is the column answer's"),
    "think_format": BuiltIn(f"{_OURS}.verifiers:think_format", "1 for <think>…</think> <answer>…</answer>, once each"),
    "length_penalty": BuiltIn(
        f"{_OURS}.verifiers:LengthPenalty",
        "minus so much for every token beyond the free ones",
        "per_token=0.001,free=0",
    ),
    "soft_overlong": BuiltIn(
        "trl.rewards:get_soft_overlong_punishment",
        "falls from 0 to -1 over the last tokens before the longest completion (DAPO)",
        "max_completion_len=N,soft_punish_cache=N",
    ),
    "repetition_penalty": BuiltIn(
        "trl.rewards:get_repetition_penalty_reward",
        "penalty times the share of n-grams of tokens that repeat others",
        "ngram_size=3,max_penalty=-1.0",
    ),
    "exact_match": BuiltIn(f"{_OURS}.text_metrics:ExactMatch", "1 if the text is the reference, as in SQuAD", _COLUMN),
    "token_f1": BuiltIn(f"{_OURS}.text_metrics:TokenF1", "F1 of the words shared with the reference, SQuAD", _COLUMN),
    "bleu": BuiltIn(f"{_OURS}.text_metrics:BLEU", "sentence BLEU against the reference, by sacrebleu", _COLUMN),
    "rouge": BuiltIn(
        f"{_OURS}.text_metrics:ROUGE", "ROUGE F1 against the reference, by rouge-score", "variant=rougeL,column=answer"
    ),
}

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_ITEM = re.compile(rf"(?P<source>[^()]+?)(?P<settings>\(.*\))?(?::(?P<weight>{_NUMBER}))?")


def describe_rewards() -> str:
    """Return the built-in rewards with a line of help each."""
    written = {name: f"{name}({found.settings})" if found.settings else name for name, found in BUILT_IN.items()}
    return "\n".join(f"  {written[name]}\n      {found.help}" for name, found in BUILT_IN.items())


def read_rewards(specification: str) -> list[tuple[str, Callable[..., Any], float]]:
    """Return name, function and weight (1 by default) of each reward in a list; see the top of this file.

    Raises:
        ValueError: naming the reward that cannot be had, and why.
        FileNotFoundError: if a Python file does not exist.
    """
    return [_read(item.strip()) for item in re.split(r",(?![^()]*\))", specification)]


def _read(item: str) -> tuple[str, Callable[..., Any], float]:
    parts = _ITEM.fullmatch(item)
    if parts is None:
        raise ValueError(f"{item!r} is no reward: write NAME, FILE.py:FUNCTION, or either with :WEIGHT behind it")
    source, settings, weight = parts["source"], parts["settings"], float(parts["weight"] or 1)
    built_in = BUILT_IN.get(source)
    found = _load(built_in.source if built_in else source)
    if settings or inspect.isclass(found) or (built_in and built_in.settings):
        usage = f" (it takes {built_in.settings or 'no settings'})" if built_in else ""
        try:
            positional, named = _settings(settings or "()")
            found = found(*positional, **named)
        except (TypeError, ValueError, ImportError) as error:
            raise ValueError(f"{item!r}: {error}{usage}") from error
    if not callable(found):
        raise ValueError(f"{item!r} is {found!r}, which cannot be called")
    return source if built_in else source.rpartition(":")[2], found, weight


def _settings(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments in ``(0.5, name=word)``: Python's literals, and bare words as text."""

    def value(node: ast.expr) -> Any:
        return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)

    try:
        call = ast.parse(f"_{text}", mode="eval").body
        assert isinstance(call, ast.Call)
        return [value(node) for node in call.args], {str(word.arg): value(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(f"settings are written (name=value,…), not {text}") from error


def _load(source: str) -> Any:
    """Return the function or class that ``FILE.py:NAME`` or ``MODULE:NAME`` names."""
    place, _, name = source.rpartition(":")
    if not place or place in BUILT_IN:
        problem = f"the weight {name!r} is no number" if place else "no reward has this name"
        raise ValueError(
            f"{source!r}: {problem}{closest(source, BUILT_IN)}. There are {', '.join(BUILT_IN)}, and FILE.py:FUNCTION"
        )
    module = _run_file(Path(place).expanduser()) if place.endswith(".py") else _import(place)
    if not hasattr(module, name):
        raise ValueError(f"{place} has no {name!r}{closest(name, dir(module))}")
    return getattr(module, name)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module!r} is neither a .py file nor a module that can be imported: {error}") from error


def _run_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    description = importlib.util.spec_from_file_location(f"rewards_of_{path.stem}", path)
    assert description is not None
    assert description.loader is not None
    # Dataclasses look their module up there.
    module = sys.modules[description.name] = importlib.util.module_from_spec(description)
    try:
        description.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module
