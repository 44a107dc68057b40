"""Exceptions by parameter name or module class; the first that matches wins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from lightning_soo.checks import require_choice
from lightning_soo.naming import nearest
from lightning_soo.placement.blocks import BlockRules

METHODS = ("shampoo", "soap", "sonew", "kfac", "none")
_KEYS = ("match", "method", *(f.name for f in fields(BlockRules) if f.name != "is_embedding"))


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """What placement needs to know of one parameter.

    Attributes:
        module_classes: names of the classes of the module that holds it, most derived first (``("Embedding",
            "Module")``); empty where no model was given.
        part: the call of ``step()`` that moves it, for engines that step group by group.
        requires_grad: a frozen parameter has no blocks until it is unfrozen.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    part: int = 0
    requires_grad: bool = True
    module_classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Override:
    """One entry of ``overrides``: ``{"match": pattern or module class, "method": ..., any block option: ...}``."""

    match: str
    method: str | None = None
    rules: Mapping[str, Any]

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> Override:
        unknown = [key for key in entry if key not in _KEYS]
        if unknown:
            raise ValueError(f"overrides: unknown key {unknown[0]!r}{nearest(unknown[0], _KEYS)}")
        match = entry.get("match")
        if isinstance(match, type):
            match = match.__name__
        if not isinstance(match, str) or not match:
            raise ValueError(f"overrides: 'match' must be a name pattern or a module class, not {entry.get('match')!r}")
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"overrides: match={match!r} is not a regular expression: {error}") from None
        method = entry.get("method")
        rules = {key: value for key, value in entry.items() if key not in ("match", "method")}
        try:
            if method is not None:
                require_choice("method", method, METHODS)
            BlockRules(**rules).check()
        except ValueError as error:
            raise ValueError(f"overrides, match={match!r}: {error}") from None
        return cls(match=match, method=method, rules=rules)

    def matches(self, spec: ParameterSpec) -> bool:
        return self.match in spec.module_classes or re.search(self.match, spec.name) is not None


def resolve(
    specs: Sequence[ParameterSpec], rules: BlockRules, overrides: Sequence[Override]
) -> list[tuple[str | None, BlockRules]]:
    """Return ``(method, rules)`` of each parameter; None is the optimizer's own method.

    Raises:
        ValueError: an override that matches no parameter, with the nearest names.
    """
    for override in overrides:
        if specs and not any(override.matches(spec) for spec in specs):
            names = [spec.name for spec in specs] + sorted({name for spec in specs for name in spec.module_classes})
            raise ValueError(
                f"overrides: match={override.match!r} matches none of {len(specs)} parameters"
                f"{nearest(override.match, names)}"
            )
    resolved: list[tuple[str | None, BlockRules]] = []
    for spec in specs:
        method: str | None = None
        own = replace(rules, is_embedding="Embedding" in spec.module_classes)
        for override in overrides:
            if override.matches(spec):
                method, own = override.method, replace(own, **override.rules)
                break
        resolved.append((method, own))
    return resolved
