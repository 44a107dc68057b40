"""The step of an optimizer whose preconditioner is a band along chains of neighbouring elements (SONew)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_soo.linalg import banded
from lightning_soo.linalg.norms import squared_norm
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.members import Member
from lightning_soo.optim.options import SONewOptions
from lightning_soo.optim.runs import Run, band_buffer, band_names, exchange_halos
from lightning_soo.placement.chains import Halos, extended
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.plan import Plan
from lightning_soo.preconditioners.banded import BandedStatistics, direction
from lightning_soo.preconditioners.tridiagonal import compiler_works, tridiagonal_step

_NONE = torch.tensor(0.0, dtype=torch.float64)


class BandedOptimizer(SecondOrderOptimizer):
    """Elementwise on fragments; only where a cut falls inside a chain do a few neighbours travel."""

    options: SONewOptions

    def _prepare_members(self, plan: Plan, layout: Layout, members: list[Member]) -> None:
        runs = {member.name: member.run for member in self._members}
        lengths = [parameter.chain for parameter in plan.parameters]
        reach = banded.halo(self.options.bandwidth)
        self._reach = reach
        self._halos: dict[int, Halos] = {}
        for part in sorted({spec.part for spec in layout.specs}):
            own = [index for index, spec in enumerate(layout.specs) if spec.part == part]
            self._halos[part] = Halos.plan(plan.table, lengths, own, reach)
        for member in members:
            if member.planned.chain is not None:
                member.run = runs.get(member.name) or Run()
                state = self.state[member.tensor]
                band_buffer(member.tensor, state, self.options.bandwidth, self._band_dtype(member))
                # in row-major order, as the bands are; also where betas[0] is 0: then it is the gradient
                moment = state.get("exp_avg", torch.zeros_like(member.tensor))
                state["exp_avg"] = moment.contiguous()

    def _band_dtype(self, member: Member) -> torch.dtype:
        parameter = member.planned.spec.dtype
        return self.options.band_dtype or self.options.statistics_dtype(parameter)

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
        moved: list[Member] = []
        starts = self.steps >= self.options.start
        for work in works:
            work.member.scale = 1.0
            ridge = work.ridge(peaks, self.options)
            if starts and work.is_one_sweep:
                squares += work.sweep(ridge, self.options)
                moved.append(work.member)
                continue
            work.observe()
            graft = work.graft()
            if not starts:
                work.member.gradient.copy_(graft.view_as(work.member.gradient))
                continue
            counted = work.member.counts and graft.numel() > 0
            squares.append(squared_norm(graft) if counted else _NONE)
            found = direction(work.statistics.bands, work.vector, ridge=ridge, gamma=self.options.edge_gamma)[work.own]
            squares.append(squared_norm(found) if counted else _NONE)
            work.member.gradient.copy_(found.view_as(work.member.gradient))
            moved.append(work.member)
        values = self._totals(squares)
        for member, graft_square, square in zip(moved, values[::2], values[1::2], strict=True):
            member.scale = (graft_square / square) ** 0.5 if 0.0 < square < float("inf") else 0.0

    def _extend(self, part: int, members: list[Member]) -> list[_Work]:
        """Each member's gradient, momentum and bands, with the neighbours that a cut has taken away."""
        assert self._assembly is not None
        numbers = {id(member): number for number, member in enumerate(self._members)}
        halos = self._halos[part]
        works = [_Work(member, self) for member in members]
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

    def _peaks(self, part: int, works: list[_Work]) -> dict[tuple[str, int], float]:
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


class _Work:
    """One parameter during one step, perhaps with a halo."""

    def __init__(self, member: Member, optimizer: BandedOptimizer) -> None:
        options, run = optimizer.options, member.run
        assert run is not None and member.planned.chain is not None
        self.member, self.run, self.use_correction = member, run, options.use_bias_correction
        state = optimizer.state[member.tensor]
        buffer = band_buffer(member.tensor, state, options.bandwidth, optimizer._band_dtype(member))
        offset, size = member.fragment.offset, member.fragment.stop - member.fragment.start
        self.bands = buffer[:, offset : offset + size]
        state["exp_avg"] = state["exp_avg"].contiguous()
        self.moment = member.fragment.local(state["exp_avg"]).view(-1)
        self.step = member.local_state(state)["step"]
        self.statistics = BandedStatistics(
            self.bands,
            start=member.fragment.start,
            chain_length=member.planned.chain,
            scale=run.scale,
            peak=run.peak,
            observations=run.observations,
        )
        self.decay, self.weight = member.weights()
        self.gradient = member.gradient.reshape(-1)
        self.filtered = self.moment
        self.left, self.size = 0, size
        self._state = state
        # memory for one parameter at a time: a fresh array costs more than what is computed in it
        self._scratch = optimizer._scratch_like(self.gradient).view(-1)

    @property
    def own(self) -> slice:
        return slice(self.left, self.left + self.size)

    def rows(self) -> Tensor:
        """Gradient, momentum and bands as they were: ``(b + 3, n)``."""
        dtype = self.statistics.compute_dtype
        return torch.cat([self.gradient.to(dtype)[None], self.moment.to(dtype)[None], self.bands.to(dtype)])

    def extend(self, strips: list[tuple[Any, Tensor]], reach: tuple[int, int]) -> None:
        """Work on copies with the neighbours on both sides."""
        if not strips:
            return
        fragment, length = self.member.fragment, self.statistics.chain_length
        begin, end = extended(fragment.start, fragment.stop, length, reach)
        rows = self.rows()
        whole = rows.new_zeros(rows.shape[0], end - begin)
        self.left = fragment.start - begin
        whole[:, self.own] = rows
        for strip, values in strips:
            whole[:, strip.start - begin : strip.stop - begin] = values
        self.gradient, self.filtered = whole[0], whole[1].to(self.moment.dtype)
        self.statistics.bands, self.statistics.start = whole[2:].to(self.bands.dtype), begin

    def rescale(self) -> None:
        self.statistics.rescale(decay=self.decay, magnitude=self.member.magnitude)

    def _count(self) -> None:
        run, statistics = self.run, self.statistics
        self.step += 1
        if self.member.counter is not None:
            self._state["step"].copy_(torch.maximum(self._state["step"], self.step))
        run.weight = run.weight * self.decay + self.weight if self.decay < 1.0 else 1.0
        run.scale, run.peak, run.observations = statistics.scale, statistics.peak, statistics.observations + 1

    def observe(self) -> None:
        """Advance moments and statistics."""
        self._count()
        statistics, beta1 = self.statistics, self.member.group["betas"][0]
        statistics.observe(self.gradient, decay=self.decay, weight=self.weight, magnitude=self.member.magnitude)
        run = self.run
        self.filtered.lerp_(self.gradient.to(self.filtered.dtype), 1.0 - beta1)
        run.scale, run.peak, run.observations = statistics.scale, statistics.peak, statistics.observations
        if self.statistics.bands is not self.bands:
            self.bands.copy_(statistics.bands[:, self.own])
            self.moment.copy_(self.filtered[self.own])
        self.vector = self.filtered.to(statistics.compute_dtype)
        if self.use_correction:
            self.vector = self.vector / (1.0 - beta1 ** float(self.step))

    def graft(self) -> Tensor:
        """Adam's direction: its second moment is the diagonal of the statistics."""
        correction = self.run.weight if self.use_correction else 1.0
        second = self.statistics.bands[0, self.own].to(self.vector.dtype)
        root = (second / correction).sqrt_().div_(self.statistics.scale).add_(float(self.member.group["eps"]))
        return self.vector[self.own] / root

    def peak_of(self, chain: int) -> float:
        """Largest diagonal element here of one chain."""
        statistics = self.statistics
        begin = max(chain * statistics.chain_length - statistics.start, 0)
        end = min((chain + 1) * statistics.chain_length - statistics.start, statistics.bands.shape[1])
        return float(statistics.bands[0, begin:end].amax()) if begin < end else 0.0

    @property
    def is_one_sweep(self) -> bool:
        """Whether one neighbour, one dtype and no halo allow everything in one pass over memory."""
        return (
            self.bands.shape[0] == 2
            and self.size > 1
            and self.statistics.bands is self.bands
            and self.gradient.dtype == self.moment.dtype == self.bands.dtype
            and self.gradient.data_ptr() == self.member.gradient.data_ptr()
        )

    def sweep(self, ridge: Tensor | float, options: SONewOptions) -> list[Tensor]:
        """Write the direction over the gradient; return the squares of the graft and of the direction.

        The direction may take the gradient's place: it lags behind, and nobody reads what it overwrites any more.
        """
        self._count()
        beta1, counts = self.member.group["betas"][0], self.member.counts
        moved, graft = tridiagonal_step(
            self.statistics,
            self.gradient,
            self.moment,
            beta1=beta1,
            decay=self.decay,
            weight=self.weight,
            magnitude=self.member.magnitude,
            correction=self.run.weight if self.use_correction else 1.0,
            eps=float(self.member.group["eps"]),
            ridge=ridge,
            gamma=options.edge_gamma,
            out=self.gradient,
            compiled=options.compiled and compiler_works(),
        )
        if self.use_correction:
            graft = graft / (1.0 - beta1 ** float(self.step)) ** 2
        return [graft, moved] if counts else [_NONE, _NONE]

    def ridge(self, peaks: dict[tuple[str, int], float], options: SONewOptions) -> Tensor | float:
        """What is added to the diagonal, in its units: one number, or one for each element."""
        statistics, n = self.statistics, self.gradient.shape[0]
        if n == 0:
            return 0.0
        if options.relative_eps:
            tops = banded.chain_peaks(statistics.bands, statistics.start, statistics.chain_length)
            first = statistics.start // statistics.chain_length
            for (name, chain), value in peaks.items():
                if name == self.member.name and first <= chain < first + tops.numel():
                    tops[chain - first] = value
            ridge = tops.to(statistics.compute_dtype) * options.preconditioner_eps
            return ridge.view(()) if tops.numel() == 1 else self._expand(ridge)
        weight = self.run.weight * self.decay + self.weight if self.decay < 1.0 else 1.0  # with this step's gradient
        return statistics.ridge(options.preconditioner_eps, correction=weight if self.use_correction else 1.0)

    def _expand(self, ridge: Tensor) -> Tensor:
        statistics, n = self.statistics, self.gradient.shape[0]
        out = self._scratch[:n] if self._scratch.dtype == ridge.dtype and self._scratch.numel() >= n else None
        return banded.expand_chains(ridge, n, statistics.start, statistics.chain_length, out=out)
