"""Names in error messages: what was probably meant, and a constructor that says so."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def nearest(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest choice, else the whole list where it is short."""
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose one of {', '.join(map(repr, names))}" if len(names) <= 12 else ""


def suggest_names(function: Function) -> Function:
    """Answer an unknown keyword with the nearest valid one. The signature stays visible to type checkers."""
    known = list(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            owner = type(args[0]).__name__ if args else function.__qualname__
            raise TypeError(f"{owner} has no option {unknown[0]!r}{nearest(unknown[0], known)}")
        return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
