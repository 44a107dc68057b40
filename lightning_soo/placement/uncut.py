"""The blocks that sharding would not cut: found from the edges of shards, without making the blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_soo.placement.blocks import BlockRules, cut
from lightning_soo.placement.holders import Holders, holders_of
from lightning_soo.placement.layout import FragmentTable
from lightning_soo.placement.overrides import Override, ParameterSpec, resolve

_SMALLEST = 16


def largest_uncut_dim(
    specs: Sequence[ParameterSpec], rules: BlockRules, overrides: Sequence[Override], table: FragmentTable
) -> int | None:
    """The largest halved ``max_preconditioner_dim``, of at least 16, with which no block is cut by sharding."""
    holders = holders_of(table)
    size = rules.max_preconditioner_dim // 2
    while size >= _SMALLEST:
        smaller = replace(rules, max_preconditioner_dim=size)
        resolved = resolve(specs, smaller, overrides)
        kinds = {
            (spec.shape, own, held)
            for spec, (method, own), held in zip(specs, resolved, holders, strict=True)
            if spec.requires_grad and method != "none"
        }
        if not any(_is_cut(shape, own, held) for shape, own, held in kinds):
            return size
        size //= 2
    return None


def _is_cut(shape: tuple[int, ...], rules: BlockRules, held: Holders) -> bool:
    cuts, _ = cut(shape, rules)
    numel = math.prod(shape)
    return cuts is not None and any(cuts.divided_at(stop) for start, stop in held.ranges if start < stop < numel)
