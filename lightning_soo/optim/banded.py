"""The step of an optimizer whose preconditioner is a band along chains of neighbouring elements (SONew)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_soo.linalg import banded
from lightning_soo.linalg.norms import squared_norm
from lightning_soo.optim.banded_work import NOTHING, Work
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.members import Member
from lightning_soo.optim.options import SONewOptions
from lightning_soo.optim.runs import Run, band_buffer, band_names, exchange_halos
from lightning_soo.placement.chains import Halos
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.plan import Plan
from lightning_soo.preconditioners.banded import direction
from lightning_soo.preconditioners.banded_fused import FusedRuns


class BandedOptimizer(SecondOrderOptimizer):
    """Elementwise on fragments; only where a cut falls inside a chain do a few neighbours travel."""

    options: SONewOptions
    _halos: Mapping[int, Halos] = MappingProxyType({})

    def _prepare_members(self, plan: Plan, layout: Layout, members: list[Member]) -> None:
        runs = {member.name: member.run for member in self._members}
        lengths = [parameter.chain for parameter in plan.parameters]
        reach = banded.halo(self.options.bandwidth)
        self._reach = reach
        self._halos = halos = {}
        for part in sorted({spec.part for spec in layout.specs}):
            own = [index for index, spec in enumerate(layout.specs) if spec.part == part]
            halos[part] = Halos.plan(plan.table, lengths, own, reach)
        for member in members:
            if member.planned.chain is not None:
                member.run = runs.get(member.name) or Run()
                state = self.state[member.tensor]
                band_buffer(
                    member.tensor, state, self.options.bandwidth, self.options.dtype_of_bands(member.planned.spec.dtype)
                )
                # in row-major order, as the bands are; also where betas[0] is 0: then it is the gradient
                moment = state.get("exp_avg", torch.zeros_like(member.tensor))
                state["exp_avg"] = moment.contiguous()

    def _work(self, member: Member) -> Work:
        # memory for one parameter at a time: a fresh array costs more than what is computed in it
        return Work(member, self.state[member.tensor], self.options, self._scratch_like(member.gradient).view(-1))

    def plan_table(self, plan: Plan | None = None) -> str:
        """The plan in words; once attached, also what travels where chains are cut."""
        table = super().plan_table(plan)
        cut = sum(len(halos.cut) for halos in self._halos.values())
        if not cut:
            return table
        rows = len(band_names(self.options.bandwidth)) + 2
        wide = any(member.planned.spec.dtype == torch.float64 for member in self._members)
        size = sum(halos.elements for halos in self._halos.values()) * rows * (8 if wide else 4)
        return f"{table}\n{cut} chains are cut: at most {size:,} bytes of neighbours travel from or to a rank in a step"

    def _observe(self, part: int, members: list[Member]) -> None:
        """Nothing by itself: statistics and direction share one pass."""

    def _refresh(self, part: int) -> None:
        """Nothing is refreshed: no root is taken."""

    def _precondition(self, part: int, members: list[Member]) -> None:
        chained = [member for member in members if member.run is not None]
        plain = [member for member in members if member.run is None]
        super()._precondition(part, plain)
        works = self._extend(part, chained)
        peaks = self._peaks(part, works)
        squares: list[Tensor] = []
        moved: list[tuple[Member, float]] = []  # and the units of its graft's square
        starts = self.steps >= self.options.start
        separate = self._carry_out(works, peaks, squares, moved) if starts else works
        for work in separate:
            work.member.scale = 1.0
            ridge = work.ridge(peaks, self.options)
            if starts and work.is_one_sweep:
                squares += work.sweep(ridge, self.options)
                moved.append((work.member, 1.0))
                continue
            work.observe()
            graft = work.graft()
            if not starts:
                work.member.gradient.copy_(graft.view_as(work.member.gradient))
                continue
            counted = work.member.counts and graft.numel() > 0
            squares.append(squared_norm(graft) if counted else NOTHING)
            found = direction(work.statistics.bands, work.vector, ridge=ridge, gamma=self.options.edge_gamma)[work.own]
            squares.append(squared_norm(found) if counted else NOTHING)
            work.member.gradient.copy_(found.view_as(work.member.gradient))
            moved.append((work.member, 1.0))
        values = self._totals(squares)
        for (member, units), graft_square, square in zip(moved, values[::2], values[1::2], strict=True):
            member.scale = (graft_square * units / square) ** 0.5 if 0.0 < square < float("inf") else 0.0

    def _carry_out(
        self,
        works: list[Work],
        peaks: dict[tuple[str, int], float],
        squares: list[Tensor],
        moved: list[tuple[Member, float]],
    ) -> list[Work]:
        """Take the steps for which there is compiled code, those of a device together; return the other works.

        Args:
            squares: receives sums of squares of the graft and of the direction; not waited for.
            moved: receives the members, and the units of their grafts' squares.
        """
        together: dict[tuple[torch.device, type[FusedRuns]], tuple[FusedRuns, list[Work]]] = {}
        separate = []
        for work in works:
            kind = work.kind_of_runs(self.options)
            if kind is None:
                separate.append(work)
                continue
            runs, joined = together.setdefault((work.bands.device, kind), (kind(), []))
            work.member.scale = 1.0
            work.join(runs, peaks, self.options)
            joined.append(work)
        for runs, joined in together.values():
            sums = torch.as_tensor(runs.carry_out(), dtype=torch.float64)
            for work, (square, graft_square) in zip(joined, sums, strict=True):
                squares += [graft_square, square]
                moved.append((work.member, work.leave()))
        return separate

    def _extend(self, part: int, members: list[Member]) -> list[Work]:
        """Each member's gradient, momentum and bands, with the neighbours that a cut has taken away."""
        assert self._assembly is not None
        numbers = {id(member): number for number, member in enumerate(self._members)}
        halos = self._halos[part]
        works = [self._work(member) for member in members]
        if halos.is_empty:
            return works
        cut = {parameter for parameter, _ in halos.cut}
        rows = {
            numbers[id(work.member)]: work.rows()
            for work in works
            if numbers[id(work.member)] in cut and not work.member.is_empty
        }
        arrived = exchange_halos(
            self._assembly.transport, halos, self._members, rows, len(band_names(self.options.bandwidth)) + 2
        )
        for work in works:
            work.extend(arrived.get(numbers[id(work.member)], []), self._reach)
        return works

    def _peaks(self, part: int, works: list[Work]) -> dict[tuple[str, int], float]:
        """The largest diagonal of every cut chain, over all ranks, before this step's gradient is added."""
        for work in works:
            work.rescale()
        cut = self._halos[part].cut
        if not cut or not self.options.relative_eps:
            return {}
        by_name = {work.member.name: work for work in works}
        values = torch.zeros(len(cut), dtype=torch.float64)
        names = [(self._members[parameter].name, chain) for parameter, chain in cut]
        for index, (name, chain) in enumerate(names):
            if name in by_name:
                values[index] = by_name[name].peak_of(chain)
        return dict(zip(names, self._transport.largest(values).tolist(), strict=True))
