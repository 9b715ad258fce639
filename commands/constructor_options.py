"""Options of a command that are the arguments of constructors: their types, defaults and help come from there."""

from __future__ import annotations

import argparse
import collections.abc
import inspect
import re
import sys
import types
import typing
from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from aligngym.core.schedules import Constant, Decay, Power, Schedule

#: What a value may be, in the order in which a text is tried, and how an error says so.
KINDS: dict[Any, str] = {
    type(None): "none",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Schedule: "linear:NUMBER or cosine:NUMBER (falls to 0 over the run)",
    list: "whole numbers with commas between",
    str: "a word",
}


@dataclass(frozen=True)
class Option:
    """One argument of a constructor, as an option.

    Attributes:
        name: of the option, as a YAML file has it; the flag has hyphens.
        argument: the name that the constructor gives it.
        kinds: which of :data:`KINDS` its value may be.
        default: the value if none is given.
        help: a sentence.
    """

    name: str
    argument: str
    kinds: tuple[Any, ...]
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """How it is written on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def expected(self) -> str:
        """What a value may be, in words."""
        return ", or ".join(KINDS[kind] for kind in KINDS if kind in self.kinds)

    def read(self, value: Any, place: str) -> Any:
        """Return a flag's text or a YAML value as what the constructor takes; schedules stay text.

        Raises:
            ValueError: naming the place, the value and what is expected.
        """
        for kind in KINDS:
            if kind in self.kinds:
                try:
                    return _READERS[kind](value)
                except (ValueError, TypeError):
                    continue
        raise ValueError(f"{place} is {value!r}: {self.expected} is expected")

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Add the flag; it leaves its text, which :meth:`read` reads, and nothing if it is not given."""
        default = "" if self.default in (None, "") else f" (default: {shown(self.default)})"
        settings: dict[str, Any] = {"help": f"{self.help}{default}".replace("%", "%%"), "default": argparse.SUPPRESS}
        if self.kinds == (bool,):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            letters = {int: "N", Schedule: "X|linear:X", float: "X", list: "N,N"}
            settings["metavar"] = next((letter for kind, letter in letters.items() if kind in self.kinds), "…")
        group.add_argument(self.flag, dest=self.name, **settings)


def constructor_options(
    kind: type[Any], leave_out: Container[str] = (), rename: Mapping[str, str] = MappingProxyType({})
) -> list[Option]:
    """Return the options that the constructor of a class has, those it passes on to its base classes included.

    An argument becomes one if its type is one of :data:`KINDS`, or a union with some of them; its help is the first
    sentence of its docstring.

    Args:
        kind: the class.
        leave_out: arguments that are no options.
        rename: options whose names are not their arguments'.
    """
    found: dict[str, Option] = {}
    constructors = [cls for cls in kind.__mro__ if "__init__" in vars(cls) and cls is not object]
    for number, cls in enumerate(constructors):
        hints = typing.get_type_hints(vars(cls)["__init__"])
        passes_on = False
        for name, parameter in inspect.signature(cls).parameters.items():
            passes_on |= parameter.kind is parameter.VAR_KEYWORD
            kinds = _kinds(hints.get(name))
            if name in found or name in leave_out or not kinds or parameter.kind is parameter.VAR_KEYWORD:
                continue
            default = None if parameter.default is parameter.empty else as_text(parameter.default)
            found[name] = Option(rename.get(name, name), name, kinds, default, _help(name, constructors[number:]))
        if not passes_on:
            break
    return list(found.values())


def schedule_of(value: Any, iterations: int | None) -> Any:
    """Return the schedule that a text such as ``linear:0.001`` stands for, and any other value as it is.

    Raises:
        ValueError: if it falls over a run whose number of iterations is not known.
    """
    match = _SCHEDULE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    shape, number = match[1], float(match[2])
    if shape == "power":
        return Power(exponent=number)
    if iterations is None:
        raise ValueError(f"{value} falls over the iterations of a run, and nobody knows how many whole episodes make")
    return Decay(number, iterations, shape=shape)


def as_text(value: Any) -> Any:
    """Return a default as YAML can hold it."""
    if isinstance(value, Power) and value == Power(exponent=value.exponent):
        return f"power:{value.exponent:g}"
    if isinstance(value, Constant):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """Return a value as one would write it after a flag."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


_SCHEDULE = re.compile(r"(linear|cosine|power):(\d*\.?\d+(?:e[-+]?\d+)?)")


def _read_bool(value: Any) -> bool:
    return {"True": True, "true": True, "False": False, "false": False}[str(value)]


def _read_int(value: Any) -> int:
    if isinstance(value, (bool, float)):
        raise TypeError
    return int(value)


def _read_float(value: Any) -> float:
    # YAML reads 1e-4 as text.
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _read_schedule(value: Any) -> str:
    if not _SCHEDULE.fullmatch(value):
        raise ValueError
    return str(value)


def _read_list(value: Any) -> list[int]:
    parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
    return [_read_int(part) for part in parts]


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _read_none(value: Any) -> None:
    if value not in (None, "none", "None"):
        raise ValueError


_READERS: dict[Any, Any] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    Schedule: _read_schedule,
    list: _read_list,
    str: _read_text,
    type(None): _read_none,
}


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return which of :data:`KINDS` an annotation allows; nothing if there are none but ``None``."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(list if part == collections.abc.Sequence[int] else part for part in parts)
    kinds = tuple(kind for kind in KINDS if kind in kinds)
    return () if kinds == (type(None),) else kinds


def _help(name: str, classes: list[type[Any]]) -> str:
    """Return the first sentence that a class's docstring has for an argument, or one of the classes it refers to."""
    for cls in classes:
        _, _, arguments = (inspect.getdoc(cls) or "").partition("Args:\n")
        found = re.search(rf"^    {name}: (.*(?:\n     .*)*)", arguments.split("\n\n")[0], re.MULTILINE)
        if found and (other := re.match(r"see :class:`(\w+)`", found[1])):
            elsewhere: Any = getattr(sys.modules[cls.__module__], other[1], None)
            if elsewhere not in (None, *classes) and (text := _help(name, [elsewhere])):
                return text
        elif found:
            text = re.sub(r":\w+:`[~.\w]*?(\w+)`", r"\1", " ".join(found[1].split())).replace("`", "")
            # A full stop ends a sentence, and not the initial of a name.
            return re.split(r"(?<![A-Z])\.(?: (?=[A-Z])|$)", text)[0]
    return ""
