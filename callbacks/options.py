"""Types of the options of all methods, so that LightningCLI checks a callback's as it checks an optimizer's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Union, get_type_hints

from typing_extensions import TypedDict, Unpack

from lightning_soo.optim.takeover import METHODS


def keyword_types() -> Any:
    """What stands behind ``**options`` where any method's are taken."""
    return keyword_types_of(METHODS.values())


def keyword_types_of(kinds: Iterable[type]) -> Any:
    """What stands behind ``**options`` where those of any of these optimizers are taken: an annotation of keywords
    (PEP 692)."""
    types: dict[str, Any] = {}
    for kind in kinds:
        constructor = kind.__init__  # type: ignore[misc]
        hints = get_type_hints(constructor)
        for name in inspect.signature(constructor).parameters:
            if name not in ("self", "params"):
                types[name] = Union[types[name], hints[name]] if name in types else hints[name]  # noqa: UP007
    return Unpack[TypedDict("Options", types, total=False)]  # type: ignore[operator,misc]
