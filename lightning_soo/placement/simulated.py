"""What every rank would hold under an engine that is not here: the table that adapters and ranks would report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from lightning_soo.naming import nearest
from lightning_soo.placement.layout import FragmentTable
from lightning_soo.placement.overrides import ParameterSpec

ENGINES = ("single", "ddp", "fsdp1", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
Range = tuple[int, int]
# FSDP1 aligns every parameter of a flat one to so many bytes (torch.distributed.fsdp, with use_orig_params=True)
_FLAT_ALIGNMENT = 16
# DeepSpeed pads a group's flat copy to this many elements for each rank (its nccl_start_alignment_factor)
_ZERO_ALIGNMENT = 2


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """The parameters as an engine gives them to an optimizer, and who holds what.

    Attributes:
        specs: in the engine's dtype (ZeRO's masters are float32) and parts; without those that the engine keeps from
            the optimizer (ZeRO: frozen ones).
        groups: number of the parameter group of each.
    """

    specs: tuple[ParameterSpec, ...]
    groups: tuple[int, ...]
    table: FragmentTable


def simulate(
    engine: str,
    specs: Sequence[ParameterSpec],
    *,
    ranks: int,
    groups: Sequence[int] | None = None,
    shard_size: int | None = None,
    units: Collection[str] = (),
    sub_group_size: int = 10**9,
) -> Simulated:
    """Divide parameters as ``engine`` does. Pure.

    Args:
        specs: all parameters, in the order of ``named_parameters()``.
        groups: number of each one's parameter group; None is one group.
        shard_size: ranks that share one copy of the model (HSDP, and FSDP1 with ``HYBRID_SHARD``); None is all.
        units: names of the modules that FSDP1 wraps, below the root.
        sub_group_size: ZeRO-3's, in elements of a rank.

    Raises:
        ValueError: an unknown engine, ranks that cannot be divided so, FSDP1 units of several dtypes.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}{nearest(engine, ENGINES)}")
    if ranks < 1 or (engine == "single" and ranks != 1):
        raise ValueError(
            f"world size {ranks}: engine {engine!r} has {'one rank' if ranks > 0 else 'at least one rank'}"
        )
    numbers = list(groups) if groups is not None else [0] * len(specs)
    size = _shard_size(engine, ranks, shard_size)
    if engine in ("single", "ddp"):
        table = FragmentTable.whole([math.prod(spec.shape) for spec in specs], ranks)
        return Simulated(specs=tuple(specs), groups=tuple(numbers), table=table)
    given = list(zip(specs, numbers, strict=True))
    if engine.startswith("zero"):
        given = [(replace(spec, dtype=torch.float32), number) for spec, number in given if spec.requires_grad]
        given.sort(key=lambda pair: pair[1])
    columns: list[list[Range]]
    if engine in ("zero1", "zero2"):
        given = [(replace(spec, part=number), number) for spec, number in given]
        columns = [
            column
            for _, members in itertools.groupby(given, key=lambda pair: pair[1])
            for column in _flat([spec for spec, _ in members], size, 1, _ZERO_ALIGNMENT * size)
        ]
    elif engine == "zero3":
        given = _sub_groups(given, size, sub_group_size)
        columns = [_slices(math.prod(spec.shape), size) for spec, _ in given]
    elif engine == "fsdp1":
        columns = _flat_units([spec for spec, _ in given], size, units)
    else:
        columns = [_rows(spec.shape, size) for spec, _ in given]
    by_place = list(zip(*columns, strict=True)) if columns else [()] * size
    table = FragmentTable(
        ranges=tuple(by_place[rank % size] for rank in range(ranks)),
        shard=tuple(rank % size for rank in range(ranks)),
        replica=tuple(rank // size for rank in range(ranks)),
    )
    return Simulated(specs=tuple(spec for spec, _ in given), groups=tuple(number for _, number in given), table=table)


def _shard_size(engine: str, ranks: int, asked: int | None) -> int:
    if asked is None:
        if engine == "hsdp":
            raise ValueError("engine='hsdp': say how many ranks share one copy of the model (shard_size)")
        return ranks
    if engine not in ("hsdp", "fsdp1"):
        raise ValueError(f"shard_size={asked}: engine {engine!r} has none; 'hsdp' and 'fsdp1' have")
    if asked < 1 or ranks % asked:
        raise ValueError(f"shard_size={asked}: world size {ranks} is no multiple of it")
    return asked


def _rows(shape: tuple[int, ...], ranks: int) -> list[Range]:
    """FSDP2: rows as ``torch.chunk`` divides them."""
    inner, height = math.prod(shape[1:]), shape[0] if shape else 1
    most = -(-height // ranks)
    edges = [(min(place * most, height) * inner, min((place + 1) * most, height) * inner) for place in range(ranks)]
    return [(start, stop) if start < stop else (0, 0) for start, stop in edges]


def _slices(numel: int, ranks: int) -> list[Range]:
    """ZeRO-3: every parameter by itself, wherever the cut falls."""
    most = -(-numel // ranks)
    return [(min(place * most, numel), min((place + 1) * most, numel)) for place in range(ranks)]


def _flat(specs: Sequence[ParameterSpec], ranks: int, alignment: int, multiple: int) -> list[list[Range]]:
    """Parameters end to end, each at a multiple of ``alignment``, the whole padded and divided evenly."""
    starts, end = [], 0
    for spec in specs:
        begin = -(-end // alignment) * alignment
        starts.append(begin)
        end = begin + math.prod(spec.shape)
    size = -(-end // multiple) * multiple // ranks if multiple > 1 else -(-end // ranks)
    columns = []
    for spec, begin in zip(specs, starts, strict=True):
        numel = math.prod(spec.shape)
        column = [(0, 0)] * ranks
        for place in range(begin // size, min(ranks, -(-(begin + numel) // size))) if numel else ():
            column[place] = max(place * size - begin, 0), min((place + 1) * size - begin, numel)
        columns.append(column)
    return columns


def _flat_units(specs: Sequence[ParameterSpec], ranks: int, units: Collection[str]) -> list[list[Range]]:
    """FSDP1: one flat parameter for each wrapped module, of what no wrapped module inside it has."""
    chosen = set(units)
    members: dict[str, list[int]] = {}
    for index, spec in enumerate(specs):
        parts = spec.name.split(".")[:-1]
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        members.setdefault(next((prefix for prefix in prefixes if prefix in chosen), ""), []).append(index)
    columns: list[list[Range]] = [[] for _ in specs]
    for unit, indices in members.items():
        dtypes = {specs[index].dtype for index in indices}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"FSDP1 flattens parameters of one dtype, and {unit or 'the root'} has {names}")
        alignment = max(1, _FLAT_ALIGNMENT // dtypes.pop().itemsize)
        for index, column in zip(indices, _flat([specs[i] for i in indices], ranks, alignment, ranks), strict=True):
            columns[index] = column
    return columns


def _sub_groups(
    given: Sequence[tuple[ParameterSpec, int]], ranks: int, sub_group_size: int
) -> list[tuple[ParameterSpec, int]]:
    """ZeRO-3 steps sub-groups one after the other: each is closed by the parameter that fills it."""
    found, part = [], -1
    for _, members in itertools.groupby(given, key=lambda pair: pair[1]):
        part, held = part + 1, 0
        for spec, number in members:
            if held >= sub_group_size:
                part, held = part + 1, 0
            found.append((replace(spec, part=part), number))
            held += -(-math.prod(spec.shape) // ranks)
    return found
