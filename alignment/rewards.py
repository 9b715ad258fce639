"""Rewards of completions: functions with trl's signature, weighted, summed, and watched while they judge."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aligngym.alignment.reward_specs import read_rewards
from aligngym.core.suggestions import closest

#: Text, or a conversation as a list of messages.
Text = str | list[dict[str, Any]]
#: Judges a batch: ``f(prompts=…, completions=…, completion_ids=…, **columns)``, a number or ``None`` a completion.
RewardFunction = Callable[..., Any]

#: What every reward function may ask for, whatever columns the data have.
PROVIDED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
#: Columns that are not handed on, as in trl: they would be confused with what was generated.
WITHHELD = ("prompt", "completion", "completion_ids")
#: Characters of a prompt or completion that an error quotes.
QUOTED = 300


class RewardError(ValueError):
    """A reward function failed, or returned what is no reward; the message names it and quotes the completion."""


class Rewards:
    """The weighted sum Σ_k w_k r_k of reward functions.

    Functions have trl's signature: they are called with ``prompts``, ``completions``, ``completion_ids`` (lists of
    token ids) and every column of the data, all by name and with a value for each completion, and return a number for
    each, or ``None`` where they do not apply. Prompts and completions are strings, or lists of messages. What a
    function does not name is kept from it, unless it takes ``**columns``. An asynchronous function runs in an event
    loop of its own.

    Args:
        functions: functions, or objects that can be called like one. An object whose columns are not parameters of
            its ``__call__`` names them in an attribute ``required_columns``.
        weights: w_k, 1 by default; 0 measures without rewarding.
        names: of the components; by default what the functions call themselves.

    Raises:
        TypeError: if something else than functions is given.
        ValueError: if there are none, or weights or names do not fit them.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        self.functions = [functions] if callable(functions) else list(functions)
        if not self.functions:
            raise ValueError("no reward functions: give at least one")
        for function in self.functions:
            if inspect.isclass(function) or not callable(function):
                remedy = f"give {function.__name__}(…)" if inspect.isclass(function) else "a function is needed"
                raise TypeError(f"{function!r} cannot judge completions: {remedy}")
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions) or not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights={self.weights}: one number for each of {len(self.functions)} reward functions")
        if names is not None and len(names) != len(self.functions):
            raise ValueError(f"names={list(names)}: one for each of {len(self.functions)} reward functions")
        self.names = _unique(names or [_name(function) for function in self.functions])

    @classmethod
    def parse(cls, specification: str) -> Rewards:
        """Return what a command line asks for, such as ``final_answer,think_format:0.2,my_rewards.py:brevity:-0.5``.

        See :mod:`aligngym.alignment.reward_specs`.

        Raises:
            ValueError: naming the reward that cannot be had, and why.
            FileNotFoundError: if a Python file does not exist.
        """
        found = read_rewards(specification)
        names, functions, weights = zip(*found, strict=True)
        return cls(functions, weights, names=names)

    @classmethod
    def together(cls, parts: Sequence[Rewards]) -> Rewards:
        """Return one sum of all functions of several."""
        functions = [function for part in parts for function in part.functions]
        weights = [weight for part in parts for weight in part.weights]
        return cls(functions, weights, names=[name for part in parts for name in part.names])

    def check(self, columns: Iterable[str]) -> None:
        """Stop before anything is generated if data with these columns cannot be judged.

        Raises:
            ValueError: naming the function, the column it needs, and what there is.
        """
        columns = list(columns)
        there = [column for column in columns if column not in WITHHELD]
        for column in there:
            if column in PROVIDED:
                raise ValueError(f"the data have a column {column!r}, which is what reward functions get: rename it")
        for name, function in zip(self.names, self.functions, strict=True):
            for needed in _parameters(function)[0]:
                if needed in PROVIDED or needed in there:
                    continue
                hint = closest(needed, [*there, *PROVIDED])
                has = ", ".join(map(repr, columns)) or "none"
                raise ValueError(f"reward {name!r} needs a column {needed!r}, and the data have {has}{hint}")

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int] | Tensor],
        columns: Mapping[str, Sequence[Any]],
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Judge B completions.

        Args:
            prompts: B prompts.
            completions: B completions.
            completion_ids: their tokens.
            columns: of the data, B values each.
            trainer_state: handed to functions that ask for it, as trl does with its own.
            log_extra: likewise; takes a name and B values to show beside the completions.
            log_metric: likewise; takes a name and a number.

        Returns:
            ``[B]`` the weighted sum, and by name ``[B]`` each component without its weight, NaN where the function
            returned ``None``; such a component adds nothing to the sum.

        Raises:
            RewardError: if a function raises, returns another number of values, or a value that is no finite number,
                or if no function applies to any completion.
            ValueError: if columns are missing, or lengths differ.
        """
        self.check(columns)
        given = {column: list(values) for column, values in columns.items() if column not in WITHHELD}
        tokens = [ids.tolist() if isinstance(ids, Tensor) else list(ids) for ids in completion_ids]
        batch = _Batch(list(prompts), list(completions), tokens, given)
        extras = {
            "trainer_state": trainer_state,
            "log_extra": log_extra or _ignore,
            "log_metric": log_metric or _ignore,
        }
        components = {
            name: _watched(name, function, batch, extras)
            for name, function in zip(self.names, self.functions, strict=True)
        }
        scores = torch.stack(list(components.values()))
        judged = ~scores.isnan().all(dim=0)
        if len(batch) and not judged.any():
            raise RewardError(f"no reward applies to any of {len(batch)} completions: all are None\n{batch.quote(0)}")
        if not judged.all():
            warnings.warn("no reward applies to some completions, whose reward is then 0", stacklevel=2)
        return torch.tensor(self.weights, dtype=torch.float32) @ scores.nan_to_num(0.0), components


def completion_text(completion: Text) -> str:
    """Return a completion, or a prompt, as text: itself, or what its last message says."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


@dataclass
class _Batch:
    prompts: list[Text]
    completions: list[Text]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]

    def __post_init__(self) -> None:
        values: dict[str, list[Any]] = {"prompts": self.prompts, "completion_ids": self.completion_ids, **self.columns}
        for name, column in values.items():
            if len(column) != len(self):
                raise ValueError(f"{len(self)} completions, but {len(column)} values of {name}")

    def __len__(self) -> int:
        return len(self.completions)

    def row(self, number: int) -> _Batch:
        """Return a batch of one completion."""
        one = slice(number, number + 1)
        columns = {column: values[one] for column, values in self.columns.items()}
        return _Batch(self.prompts[one], self.completions[one], self.completion_ids[one], columns)

    def quote(self, row: int) -> str:
        """Return how a prompt and its completion begin and end."""
        prompt, completion = (_shortened(completion_text(texts[row])) for texts in (self.prompts, self.completions))
        return f"prompt: {prompt}\ncompletion: {completion}"


class _Unfit(Exception):
    """What a function returned is no reward; in this row, if that is known."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def _watched(name: str, function: RewardFunction, batch: _Batch, extras: Mapping[str, Any]) -> Tensor:
    """Return ``[B]`` the rewards of one function, or say which completion it fails on."""
    try:
        return _scores(function, batch, extras)
    except ImportError:  # No completion is to blame.
        raise
    except Exception as error:
        unfit = isinstance(error, _Unfit)
        row = error.row if isinstance(error, _Unfit) and error.row is not None else _culprit(function, batch, error)
        quoted = f"no completion alone brings it about, only all {len(batch)}" if row is None else batch.quote(row)
        what = str(error) if unfit else _described(error)
        raise RewardError(f"reward {name!r} {what}\n{quoted}") from (None if unfit else error)


def _scores(function: RewardFunction, batch: _Batch, extras: Mapping[str, Any]) -> Tensor:
    arguments: dict[str, Any] = {
        **batch.columns,
        "prompts": batch.prompts,
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
        **extras,
    }
    accepted = _parameters(function)[1]
    output = function(**{name: value for name, value in arguments.items() if accepted is None or name in accepted})
    if inspect.isawaitable(output):
        # In a thread, because a notebook has an event loop running in this one.
        with ThreadPoolExecutor(1) as thread:
            output = thread.submit(asyncio.run, _awaited(output)).result()
    if hasattr(output, "tolist"):
        output = output.tolist()
    if not isinstance(output, Iterable) or isinstance(output, (str, Mapping)):
        raise _Unfit(f"returned {_shortened(output)} instead of a list with a reward for each completion")
    values = list(output)
    if len(values) != len(batch):
        raise _Unfit(f"returned {len(values)} rewards for {len(batch)} completions")
    return torch.tensor([_number(value, row) for row, value in enumerate(values)], dtype=torch.float32)


def _number(value: Any, row: int) -> float:
    if value is None:
        return math.nan
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise _Unfit(f"returned {_shortened(value)}, which is no number, for row {row}", row)
    number = float(value)
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise _Unfit(f"returned {value!r}, which is not finite, for row {row} (None says that it does not apply)", row)
    return number


def _culprit(function: RewardFunction, batch: _Batch, error: Exception) -> int | None:
    """Return the first completion that brings the same error about when it is judged alone."""
    silent = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
    for row in range(len(batch)):
        try:
            _scores(function, batch.row(row), silent)
        except type(error):
            return row
        except Exception:
            continue
    return None


def _parameters(function: RewardFunction) -> tuple[list[str], set[str] | None]:
    """Return the names that a function requires, and those that it accepts: ``None`` for all."""
    required = list(getattr(function, "required_columns", ()))
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # Written in C, and silent about its parameters.
        return required, None
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters)
    required += [each.name for each in named if each.default is each.empty]
    return required, None if takes_all else {each.name for each in named}


def _name(function: RewardFunction) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _unique(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        candidates = [name, *(f"{name}_{number}" for number in range(2, len(names) + 1))]
        found.append(next(candidate for candidate in candidates if candidate not in found))
    return found


def _described(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def _shortened(value: Any) -> str:
    """Return ``repr`` with the middle left out: how a text begins and ends says most."""
    shown = repr(value)
    return shown if len(shown) <= QUOTED else f"{shown[: QUOTED // 2]} … {shown[-QUOTED // 2 :]}"


def _ignore(*_: Any) -> None:
    pass


async def _awaited(output: Any) -> Any:
    return await output
