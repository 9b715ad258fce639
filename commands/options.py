"""Options of a command as one dataclass: flags, a YAML file, and the complete record of a run come from it."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from aligngym.core.storage import replacing
from aligngym.core.suggestions import closest

Options = TypeVar("Options")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """Declare an option: its default, what ``--help`` says of it, and its choices if they are few."""
    return field(default=default, metadata={"help": help, "choices": choices})


def add_options(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Add a flag for every field of the dataclass ``options``, and ``--config`` for a YAML file of them."""
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from a YAML file; flags come before it")
    for name, (kind, default, help_text, choices) in _described(options).items():
        if default not in (None, False):
            help_text += f" (default: {default})"
        settings: dict[str, Any] = {"help": help_text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": kind, "choices": choices}
            if choices is None:
                settings["metavar"] = {int: "N", float: "X"}.get(kind, "…")
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)


def read_options(options: type[Options], arguments: argparse.Namespace) -> Options:
    """Return the options of a command: a flag if given, else the YAML file's value, else the default.

    Raises:
        FileNotFoundError: if the YAML file does not exist.
        ValueError: if it is not a mapping, has an unknown name, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if getattr(arguments, "config", None):
        values = _values_in(options, arguments.config)
    values |= {name: value for name, value in vars(arguments).items() if name in _described(options)}
    return options(**values)


def options_from_file(options: type[Options], path: str | Path) -> Options:
    """Return the options that a YAML file has, with defaults for what it does not say; see :func:`read_options`."""
    return options(**_values_in(options, path))


def _values_in(options: type[Any], path: str | Path) -> dict[str, Any]:
    described = _described(options)
    values = read_yaml(path)
    for name, value in values.items():
        if name not in described:
            raise ValueError(f"{path}: unknown option {name!r}{closest(str(name), described)}")
        values[name] = _checked(f"{path}: {name}", value, *described[name])
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML, or not a mapping.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a mapping of options is needed, such as 'beta: 0.1'")
    return values


def write_options(options: Any, path: str | Path) -> None:
    """Write every option with its value, so that ``--config`` on the file repeats the run."""
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(dataclasses.asdict(options), sort_keys=False), encoding="utf-8")


def _described(options: type[Any]) -> dict[str, tuple[type, Any, str, tuple[str, ...] | None]]:
    """Return type (without ``None``), default, help and choices of every field."""
    hints = typing.get_type_hints(options)
    result = {}
    for entry in dataclasses.fields(options):
        hint = hints[entry.name]
        if isinstance(hint, types.UnionType):
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        result[entry.name] = (hint, entry.default, entry.metadata["help"], entry.metadata["choices"])
    return result


def _checked(place: str, value: Any, kind: type, default: Any, _: str, choices: tuple[str, ...] | None) -> Any:
    if value is None and default is None:
        return None
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML reads 1e-4 as text.
        try:
            value = float(value)
        except ValueError as error:
            raise ValueError(f"{place} is {value!r}, and should be a number") from error
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{place} is {value!r}, and should be of type {kind.__name__}")
    if choices and value not in choices:
        raise ValueError(f"{place} is {value!r}: choose from {', '.join(choices)}")
    return value


@dataclass
class Table:
    """Rows of text in columns that line up: the first to the left, the others to the right."""

    header: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        text = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        return "\n".join([text[0], "─" * len(text[0]), *text[1:]])
