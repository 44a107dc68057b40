"""Preconditioner state by name, whoever holds it: gathered for saving, handed back to its holders after loading."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch

from lightning_soo.checkpoint.manifest import FORMAT
from lightning_soo.preconditioners.eigenbasis import EigenbasisBlock
from lightning_soo.preconditioners.kronecker import KroneckerBlock
from lightning_soo.preconditioners.signal import GradientSignal
from lightning_soo.preconditioners.stacks import apart
from lightning_soo.transport import Transport

if TYPE_CHECKING:
    from lightning_soo.optim.members import Member
    from lightning_soo.optim.refreshing import Refresher

logger = logging.getLogger(__name__)
_ARRAYS = ("statistics", "roots", "moments")  # of a block; the rest every rank knows


class BlockStore:
    """The blocks of one optimizer as plain data.

    Every rank knows every block's counters; roots are at its homes, statistics and results still in flight elsewhere.
    """

    def __init__(self) -> None:
        self._members: Sequence[Member] = ()
        self._blocks: dict[str, KroneckerBlock] = {}
        self._refresher: Refresher | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._consolidated: tuple[int, dict[str, Any]] | None = None
        self._everywhere = False

    def is_everywhere(self, step: int) -> bool:
        """Whether every rank has gathered everything, of this step."""
        return self._everywhere and self._consolidated is not None and self._consolidated[0] == step

    def install(self, members: Sequence[Member], refresher: Refresher) -> None:
        """Take over the blocks of a plan, and give them what was loaded before it existed."""
        self._members = members
        self._blocks = {block.block.key: block for member in members for block in member.blocks}
        self._refresher, self._consolidated = refresher, None
        if self._loaded is not None:
            self._restore(self._loaded, refresher)
            self._loaded = None

    def drain(self) -> None:
        if self._refresher is not None:
            self._refresher.drain()

    def _local(self) -> dict[str, Any]:
        """What this rank holds; refreshes in flight are finished and stored as result and swap step."""
        blocks = {}
        for key, block in self._blocks.items():
            entry: dict[str, Any] = {
                "weight": block.weight,
                "observations": block.observations,
                "refreshed_observations": block.refreshed_observations,
                "failures": block.failures,
                "ready": block.ready,
                "signal": {"common": block.signal.common, "energy": block.signal.energy},
                "diagnostics": dict(block.diagnostics),
            }
            if block.roots is not None:
                entry["roots"] = [apart(root) for root in block.roots]
            if block.statistics is not None:
                entry["statistics"] = block.statistics.state_dict()
            if isinstance(block, EigenbasisBlock) and block.second_moment is not None:
                entry["moments"] = {"second": apart(block.second_moment), "weight": block.second_moment_weight}
            blocks[key] = entry
        flights = []
        for flight in self._refresher.in_flight if self._refresher is not None else ():
            row: dict[str, Any] = {"key": flight.key, "started": flight.started, "swap": flight.swap}
            outcome = flight.known
            if outcome is not None:
                row["outcome"] = {field.name: getattr(outcome, field.name) for field in fields(outcome)}
            flights.append(row)
        counters = {member.name: float(member.counter) for member in self._members if member.counter is not None}
        runs = {member.name: asdict(member.run) for member in self._members if member.run is not None}
        return {"blocks": blocks, "in_flight": flights, "counters": counters, "runs": runs}

    def consolidate(self, transport: Transport, to: int | None, step: int) -> None:
        """Gather statistics and results in flight from their refreshers; see ``SecondOrderOptimizer.consolidate``."""
        self.drain()
        if transport.size == 1:
            return
        self._everywhere = to is None
        local = self._local()
        mine = {
            name: {
                key: entry[name] for key, entry in local["blocks"].items() if name in entry and self._sends(key, name)
            }
            for name in _ARRAYS
        }
        mine |= {
            "outcomes": {
                (row["key"], row["started"]): row["outcome"]
                for row in local["in_flight"]
                # what was delivered, or read from a checkpoint, is known everywhere, but its roots only to homes
                if "outcome" in row and (row["outcome"]["roots"] is not None or not row["outcome"]["ok"])
            },
        }
        buffer = io.BytesIO()
        torch.save(mine, buffer)
        parts = transport.gather_bytes(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8), to)
        if to is not None and transport.rank != to:
            return
        for part in parts:
            theirs = torch.load(io.BytesIO(part.numpy().tobytes()), weights_only=True, map_location="cpu")
            for name in _ARRAYS:
                for key, value in theirs[name].items():
                    local["blocks"][key][name] = value
            for row in local["in_flight"]:
                outcome = theirs["outcomes"].get((row["key"], row["started"]))
                if outcome is not None:
                    row["outcome"] = outcome
        self._consolidated = step, local

    def share(self, step: int) -> dict[str, Any]:
        """As :meth:`state_dict`, of a checkpoint that all ranks write: each array on one rank alone. Local."""
        self.drain()
        local = self._local() if self._refresher is not None else self.state_dict(step, complete=True)
        if self._refresher is None:
            return local
        for key, entry in local["blocks"].items():
            for name in _ARRAYS:
                if not self._writes(key, name):
                    entry.pop(name, None)
        for row, flight in zip(local["in_flight"], self._refresher.in_flight, strict=True):
            place = self._refresher.places[flight.key]
            # roots that were delivered, or read from a checkpoint, are at homes; before, the refresher alone has them
            holder = place.refresher if flight.delivered is None else place.homes[0]
            if holder != self._refresher.rank:
                row.pop("outcome", None)
        return {"format": FORMAT, "complete": True, **local}

    def _writes(self, key: str, name: str) -> bool:
        assert self._refresher is not None
        place, rank = self._refresher.places[key], self._refresher.rank
        if name == "statistics":
            return place.keeper == rank
        return rank == (place.refresher if place.refresher in place.homes else place.homes[0])

    def needed(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """What this rank keeps of the blocks of a checkpoint, before its arrays are read."""
        assert self._refresher is not None
        rank, places = self._refresher.rank, self._refresher.places
        blocks = {}
        for key, entry in saved["blocks"].items():
            unwanted = {"roots", "moments"} if rank not in places[key].homes else set()
            unwanted |= {"statistics"} if rank != places[key].keeper else set()
            blocks[key] = {name: value for name, value in entry.items() if name not in unwanted}
        flights = []
        for row in saved["in_flight"]:
            outcome = row["outcome"]
            if rank not in places[row["key"]].homes:
                outcome = {**outcome, "roots": None}
            flights.append({**row, "outcome": outcome})
        return {**saved, "blocks": blocks, "in_flight": flights}

    def _sends(self, key: str, name: str) -> bool:
        """Whether this rank is the one that gives a block's statistics or roots to the others."""
        assert self._refresher is not None
        place, rank = self._refresher.places[key], self._refresher.rank
        if name == "statistics":
            return place.keeper == rank
        return len(place.homes) < self._refresher.ranks and place.homes[0] == rank

    def state_dict(self, step: int, *, complete: bool) -> dict[str, Any]:
        """The gathered state where there is one of this step, else what this rank holds, marked incomplete."""
        if self._loaded is not None:
            return {
                key: self._loaded[key]
                for key in ("format", "complete", "blocks", "in_flight", "counters", "runs")
                if key in self._loaded
            }
        if self._consolidated is not None and self._consolidated[0] == step:
            return {"format": FORMAT, "complete": True, **self._consolidated[1]}
        self.drain()
        return {"format": FORMAT, "complete": complete, **self._local()}

    def restart(self) -> None:
        """As if no gradient had been seen: what was loaded, kept or is in flight goes."""
        self._loaded = self._consolidated = None
        for block in self._blocks.values():
            block.restart()
        for member in self._members:
            if member.run is not None:
                member.run = type(member.run)()
        if self._refresher is not None:
            self._refresher.restore([])

    def load(self, saved: Mapping[str, Any]) -> None:
        """Keep checked state until :meth:`install` hands it to the blocks."""
        self._loaded, self._consolidated = saved, None

    def _restore(self, saved: Mapping[str, Any], refresher: Refresher) -> None:
        changed: dict[tuple[torch.dtype, torch.dtype], int] = {}
        for key, block in self._blocks.items():
            entry = saved["blocks"].get(key)
            if entry is None:
                block.restart()
                continue
            block.weight = float(entry["weight"])
            block.observations = int(entry["observations"])
            block.refreshed_observations = int(entry["refreshed_observations"])
            block.failures = int(entry["failures"])
            block.diagnostics = dict(entry["diagnostics"])
            has_roots, is_home = "roots" in entry, refresher.rank in refresher.places[key].homes
            block.ready = bool(entry["ready"])
            block.signal = GradientSignal(**entry.get("signal", {}))  # format 1 began without
            block.roots = None
            if isinstance(block, EigenbasisBlock):
                block.second_moment, block.second_moment_weight = None, 0.0
                if is_home and "moments" in entry:
                    block.second_moment = entry["moments"]["second"].to(
                        device=block.device, dtype=block.statistics_dtype, copy=True
                    )
                    block.second_moment_weight = float(entry["moments"]["weight"])
            if has_roots and is_home:
                dtypes = entry["roots"][0].dtype, block.compute_dtype
                if dtypes[0] != dtypes[1]:
                    changed[dtypes] = changed.get(dtypes, 0) + 1
                block.roots = [
                    root.to(device=block.device, dtype=block.compute_dtype, copy=True) for root in entry["roots"]
                ]
            if block.statistics is not None and "statistics" in entry:
                block.statistics.load_state_dict(entry["statistics"])
        for member in self._members:
            if member.run is not None and member.name in saved.get("runs", {}):
                member.run = type(member.run)(**saved["runs"][member.name])
            count = saved.get("counters", {}).get(member.name)
            if member.counter is not None and count is not None:
                member.counter.fill_(count)
        for (there, here), count in changed.items():
            logger.warning(
                "roots of %d blocks were %s in the checkpoint and are %s here: set compute_dtype, which is measured on "
                "each machine where it is 'auto', to go on in the same numbers",
                count,
                str(there).removeprefix("torch."),
                str(here).removeprefix("torch."),
            )
        refresher.restore([row for row in saved["in_flight"] if row["key"] in self._blocks])
