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
from lightning_soo.preconditioners import banded_host
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
        def scratch() -> Tensor:
            # memory for one parameter at a time: a fresh array costs more than what is computed in it
            (buffer,) = self._scratch_like([member.gradient])
            return buffer.view(-1)

        return Work(member, self.state[member.tensor], self.options, scratch)

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

    def diagnostics(self) -> dict[str, float]:
        """As of every optimizer here; ``graft_ratio`` is what directions were multiplied by in the last step."""
        figures = super().diagnostics()
        scales = [member.scale for member in self._members if member.run is not None]
        if scales and self.steps >= self.options.start:
            figures["graft_ratio"] = sum(scales) / len(scales)
        return figures

    def _move(self, parameter: Tensor, direction: Tensor, *, shrink: float, alpha: float) -> None:
        fused = self.options.fused is not False and not self.options.compiled
        if not fused or not banded_host.move(parameter, direction, shrink=shrink, alpha=alpha):
            super()._move(parameter, direction, shrink=shrink, alpha=alpha)

    def _collect(self, members: list[Member]) -> None:
        super()._collect(members)
        for member in members:
            if member.run is not None and member.gradient.dtype == torch.float16:
                # before it has its length a direction is as large as gradients are small: above what float16 has
                member.gradient = member.gradient.float()

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
        starts = self.steps >= self.options.start
        found = self._carry_out(works, peaks) if starts else {}
        squares: list[Tensor] = []
        # in the same order and units on every rank, whichever code took the step there
        for work in works:
            work.member.scale = 1.0
            squares += found[id(work)] if id(work) in found else self._step_alone(work, peaks, starts=starts)
        if not starts:
            return
        values = self._totals(squares)
        for work, graft_square, square in zip(works, values[::2], values[1::2], strict=True):
            work.member.scale = (graft_square / square) ** 0.5 if 0.0 < square < float("inf") else 0.0

    def _carry_out(self, works: list[Work], peaks: dict[tuple[str, int], float]) -> dict[int, list[Tensor]]:
        """Take the steps for which there is compiled code, those of a device together.

        Returns:
            ``id(work)`` -> sums of squares of the graft and of the direction, where the direction is; not waited for.
        """
        together: dict[tuple[torch.device, type[FusedRuns]], tuple[FusedRuns, list[Work]]] = {}
        for work in works:
            kind = work.kind_of_runs(self.options)
            if kind is not None:
                runs, joined = together.setdefault((work.bands.device, kind), (kind(), []))
                work.join(runs, peaks, self.options)
                joined.append(work)
        found = {}
        for (device, _), (runs, joined) in together.items():
            sums = torch.as_tensor(runs.carry_out(), dtype=torch.float64)
            units = torch.tensor([[1.0, work.leave()] for work in joined], dtype=torch.float64)
            sums = sums * units.to(device, non_blocking=True)
            for work, (square, graft_square) in zip(joined, sums, strict=True):
                found[id(work)] = [graft_square, square]
        return found

    def _step_alone(self, work: Work, peaks: dict[tuple[str, int], float], *, starts: bool) -> list[Tensor]:
        """One parameter's step in separate calls; the squares of the graft and of the direction once it has started."""
        ridge = work.ridge(peaks, self.options)
        if starts and work.is_one_sweep:
            return work.sweep(ridge, self.options)
        work.observe()
        graft = work.graft()
        gradient = work.member.gradient
        if not starts:
            gradient.copy_(graft.view_as(gradient))
            return []
        found = direction(work.statistics.bands, work.vector, ridge=ridge, gamma=self.options.edge_gamma)[work.own]
        gradient.copy_(found.view_as(gradient))
        if not work.member.counts or graft.numel() == 0:
            return [NOTHING, NOTHING]
        return [squared_norm(graft), squared_norm(found)]

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
        return dict(
            zip(names, self._transport.largest(values, "the largest diagonals of cut chains").tolist(), strict=True)
        )
