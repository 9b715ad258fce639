"""Loops that Python is too slow for, compiled where numba is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

try:
    import numba
except ImportError:  # pragma: no cover (everything runs without, slower)
    numba = None  # type: ignore[assignment]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function on numbers and arrays at its first call; leave it as it is where there is no numba.

    It must be written so that Python runs it to the same result: what is compiled is an acceleration, never another
    algorithm. ``NUMBA_DISABLE_JIT=1`` in the environment switches compilation off. Generators of random numbers may be
    arguments; they give the same numbers either way.
    """
    return function if numba is None else _kept_on_disk(numba.njit, function)


@cache
def function_pointer(function: Callable[..., Any], signature: str) -> Callable[..., Any]:
    """Return a compiled function as a pointer that other compiled functions can take as an argument.

    All pointers of one signature have the same type, so what takes them is compiled once for all. Each function that
    :func:`compiled` returns has its own type, and its callers would be compiled for it again in every process.

    Args:
        function: what :func:`compiled` returned; there is numba.
        signature: in numba's notation, such as ``"float64(float64[::1], int64)"``.
    """
    return _kept_on_disk(lambda cache=False: numba.cfunc(signature, cache=cache), interpreted(function))


def _kept_on_disk(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    try:
        return compiler(cache=True)(function)
    except RuntimeError:
        # A function that was typed at a prompt has no file beside which its code could be kept.
        return compiler()(function)


def interpreted(function: Function) -> Function:
    """Return the Python function behind a compiled one, or the function itself."""
    return getattr(function, "py_func", function)
