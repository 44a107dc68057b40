"""Types of the options of all methods, so that LightningCLI checks a callback's as it checks an optimizer's."""

from __future__ import annotations

from typing import Any, Union, get_type_hints

from typing_extensions import TypedDict, Unpack

from lightning_soo.config import option_defaults
from lightning_soo.optim.takeover import METHODS


def keyword_types() -> Any:
    """What stands behind ``**options`` where any method's are taken: an annotation of keywords (PEP 692)."""
    types: dict[str, Any] = {}
    for method, kind in METHODS.items():
        hints = get_type_hints(kind.__init__)
        for name in option_defaults(method):
            types[name] = Union[types[name], hints[name]] if name in types else hints[name]  # noqa: UP007
    return Unpack[TypedDict("Options", types, total=False)]  # type: ignore[operator,misc]
