"""Loops that Python is too slow for, compiled where numba is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    import numba
except ImportError:  # pragma: no cover (everything runs without, slower)
    numba = None

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function on numbers and arrays at its first call; leave it as it is where there is no numba.

    It must be written so that Python runs it to the same result: what is compiled is an acceleration, never another
    algorithm. ``NUMBA_DISABLE_JIT=1`` in the environment switches compilation off. Generators of random numbers may be
    arguments; they give the same numbers either way.
    """
    return function if numba is None else numba.njit(cache=True)(function)


def interpreted(function: Function) -> Function:
    """Return the Python function behind a compiled one, or the function itself."""
    return getattr(function, "py_func", function)
