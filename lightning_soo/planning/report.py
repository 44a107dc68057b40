"""A plan's figures as a table for people, as plain data for programs, and what to change where it cannot work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lightning_soo.optim.planned import PlannedOptimizer
from lightning_soo.placement.table import format_bytes
from lightning_soo.planning.advice import Refreshes, traffic, uneven_statistics
from lightning_soo.planning.estimates import ByRank, Estimate, refresh_seconds
from lightning_soo.planning.machine import Machine
from lightning_soo.planning.traffic import INTERVAL, STATISTICS, STEP, collectives_per_step


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that ``lightning-soo plan`` says.

    Attributes:
        engine: name for the table.
        step_seconds: of the first-order run; None where it was not given.
    """

    optimizer: PlannedOptimizer
    found: Estimate
    machine: Machine
    engine: str
    step_seconds: float | None = None

    def seconds(self) -> dict[str, float]:
        """Of a step on the slowest rank, by what it does, with the wait for refreshes where there is one."""
        parts = self.found.seconds(self.machine)
        slowest = int(np.argmax(sum(parts.values(), np.zeros(self.found.plan.ranks))))
        times = {name: float(values[slowest]) for name, values in parts.items()}
        return {**times, "waiting for refreshes": self._wait()}

    @cached_property
    def refreshes(self) -> Refreshes:
        return Refreshes(optimizer=self.optimizer, plan=self.found.plan, machine=self.machine)

    def _wait(self) -> float:
        """Seconds of a step that wait for roots."""
        if not self.found.plan.units or (self.step_seconds is None and not self.refreshes.holds_training):
            return 0.0
        return self.refreshes.settled_wait(self.step_seconds or 0.0)

    def early_wait(self) -> float:
        """Seconds in all that training waits for the first roots, and while intervals are still short."""
        if self.step_seconds is None or not self.found.plan.units or self.refreshes.holds_training:
            return 0.0
        return self.refreshes.early_wait(self.step_seconds)

    def warnings(self) -> list[str]:
        """What cannot work, with the option to change and a value that is enough."""
        if self.step_seconds is None or not self.found.plan.units:
            return []
        found, step = self.found, self.step_seconds
        seconds = found.seconds(self.machine)
        return [
            *self.refreshes.late(step),
            *uneven_statistics(found.plan, found.statistics_flops, seconds["statistics"], step),
            *traffic(found.plan, float(seconds["collectives"].max()), step, self.optimizer.without_traffic(found.plan)),
        ]

    def data(self) -> dict[str, Any]:
        """All figures as plain data; bytes, flops and seconds."""
        plan, found = self.found.plan, self.found
        seconds = self.seconds()
        total = sum(seconds.values())
        core = refresh_seconds(found, self.machine)
        return {
            "engine": self.engine,
            "method": self.optimizer.method,
            "world_size": plan.ranks,
            "shard_size": plan.table.shards,
            "parameters": sum(math.prod(parameter.spec.shape) for parameter in plan.parameters),
            "blocks": len(plan.units),
            "preconditioned_share": plan.preconditioned_share,
            "memory": {name: _both(values) for name, values in self._memory().items()},
            "refresh": {
                "interval": found.interval,
                "flops_per_interval": _both(found.refresh_flops),
                "core_seconds_per_interval": _both(core),
                "core_seconds_per_step": _both(core / found.interval),
                "balance": plan.balance,
                "least_balance": plan.least_balance,
                "early_wait_seconds": self.early_wait(),
            },
            "flops_per_step": {
                "statistics": None if plan.adds_up else _both(found.statistics_flops / found.statistics_frequency),
                "directions": _both(found.apply_flops),
            },
            "bytes": [
                {
                    "purpose": flow.purpose,
                    "axis": flow.axis,
                    "when": flow.when,
                    **_both(flow.bytes),
                    "collectives": flow.collectives,
                }
                for flow in found.flows
            ],
            "collectives_per_step": collectives_per_step(found.flows),
            "seconds_per_step": {**seconds, "total": total},
            "step_seconds": self.step_seconds,
            "overhead": total / self.step_seconds if self.step_seconds else None,
            "machine": vars(self.machine),
            "warnings": self.warnings(),
        }

    def _memory(self) -> dict[str, ByRank]:
        parts = dict(self.found.memory)
        return {**parts, "total": sum(parts.values(), np.zeros(self.found.plan.ranks))}

    def text(self) -> str:
        """The same in words, with the plan's table."""
        plan, found = self.found.plan, self.found
        lines = [
            self.optimizer.table_of(plan, self.engine),
            "",
            f"{self.optimizer.method} on {plan.ranks} rank{'s' * (plan.ranks > 1)}, {self.engine}"
            + (f", {plan.table.shards} to a copy of the model" if 1 < plan.table.shards < plan.ranks else ""),
            "",
            *_table(("memory of a rank", "largest", "mean"), self._memory_rows()),
        ]
        if plan.units:
            lines += ["", *self._refresh_lines()]
        if found.flows:
            lines += ["", *_table(("sent by a rank", "axis", "when", "largest", "collectives"), self._flow_rows())]
        lines += ["", *self._second_lines()]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings())])

    def _memory_rows(self) -> list[tuple[str, ...]]:
        rows = [
            (name, *(format_bytes(round(v)) for v in _both(values).values())) for name, values in self._memory().items()
        ]
        return [row for row in rows if row[1] != "0 B"]

    def _refresh_lines(self) -> list[str]:
        plan, found = self.found.plan, self.found
        core = refresh_seconds(found, self.machine)
        flops = "from activations, not counted" if plan.adds_up else _flops(found.statistics_flops.max())
        return [
            f"refreshes, every {found.interval} steps, on the slowest rank: {core.max():.3g} core-seconds, "
            f"{core.max() / found.interval:.3g} for a step, mean {core.mean():.3g}; float64 products would "
            f"be {_flops(found.refresh_flops.max())} in that time"
            if core.any()
            else f"refreshes, every {found.interval} steps, on the slowest rank: "
            f"{_flops(found.refresh_flops.max())} on its device, while training waits",
            f"balance of refreshes: {plan.balance:.3f} times the mean; no plan has less than {plan.least_balance:.3f}",
            f"products of a step: statistics {flops} every {found.statistics_frequency} steps, directions "
            f"{_flops(found.apply_flops.max())}",
        ]

    def _flow_rows(self) -> list[tuple[str, ...]]:
        when = {
            STEP: "step",
            STATISTICS: f"every {self.found.statistics_frequency} steps"
            if self.found.statistics_frequency > 1
            else "step",
            INTERVAL: f"{self.found.interval} steps",
        }
        return [
            (flow.purpose, flow.axis, when[flow.when], format_bytes(int(flow.bytes.max())), str(flow.collectives))
            for flow in self.found.flows
        ]

    def _second_lines(self) -> list[str]:
        seconds = self.seconds()
        total = sum(seconds.values())
        parts = ", ".join(f"{name} {1000 * value:.3g}" for name, value in seconds.items() if value)
        lines = [f"predicted optimizer step: {1000 * total:.3g} ms ({parts})"]
        if self.step_seconds:
            lines.append(
                f"that is {total / self.step_seconds:.1%} of a first-order step of {self.step_seconds:g} s, "
                "whose own optimizer's share is not taken off"
            )
            if self.early_wait():
                interval = self.optimizer.options.precondition_frequency
                growing = f", and refreshes while the interval grows ({interval})," if interval.grows else ""
                lines.append(f"the first roots{growing} hold training up for {self.early_wait():.3g} s in all")
        elif self.found.plan.units and not self.refreshes.holds_training:
            lines.append(
                f"refreshes keep up with steps of {self.refreshes.shortest_step():.3g} s or more (--step-seconds)"
            )
        return lines


def _both(values: Any) -> dict[str, float]:
    return {"largest": float(values.max()), "mean": float(values.mean())}


def _flops(count: float) -> str:
    power = min(int(math.log10(max(count, 1.0))) // 3, 5)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}flop"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines
