"""What one parameter of SONew has to do in one step, and the ways to do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_soo.linalg import banded
from lightning_soo.optim.members import Member
from lightning_soo.optim.options import SONewOptions
from lightning_soo.optim.runs import band_buffer
from lightning_soo.placement.chains import extended
from lightning_soo.preconditioners.banded import BandedStatistics
from lightning_soo.preconditioners.banded_fused import FusedRuns, kind_of_runs
from lightning_soo.preconditioners.tridiagonal import compiler_works, tridiagonal_step

NOTHING = torch.tensor(0.0, dtype=torch.float64)


class Work:
    """One parameter during one step, perhaps with a halo."""

    def __init__(
        self, member: Member, state: dict[str, Any], options: SONewOptions, scratch: Callable[[], Tensor]
    ) -> None:
        run = member.run
        assert run is not None and member.planned.chain is not None
        self.member, self.run, self.use_correction = member, run, options.use_bias_correction
        dtype = options.dtype_of_bands(member.planned.spec.dtype)
        buffer = band_buffer(member.tensor, state, options.bandwidth, dtype)
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
        self._scratch = scratch

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
        return [graft, moved] if counts else [NOTHING, NOTHING]

    def kind_of_runs(self, options: SONewOptions) -> type[FusedRuns] | None:
        """Compiled code that takes this step with all others of its device at once, if there is any."""
        if options.fused is False or (options.compiled and self.is_one_sweep):
            return None
        return kind_of_runs(self.gradient, self.filtered, self.statistics.bands)

    def join(self, together: FusedRuns, peaks: dict[tuple[str, int], float], options: SONewOptions) -> None:
        """Put this step with the others'."""
        statistics = self.statistics
        # the statistics are still those before this step
        is_cut = any(name == self.member.name for name, _ in peaks)
        chains = self._chain_ridges(peaks, options) if is_cut or not options.relative_eps else None
        self._count()
        together.add(
            self.gradient,
            self.filtered,
            statistics.bands,
            start=statistics.start,
            chain_length=statistics.chain_length,
            # others count these elements: zeros, where what is added up lies
            owned=(self.left, self.left + (self.size if self.member.counts else 0)),
            beta1=self.member.group["betas"][0],
            decay=self.decay,
            weight=self.weight,
            scale=statistics.scale,
            graft_eps=self._unit * float(self.member.group["eps"]),
            ridge=options.preconditioner_eps if chains is None else chains,
            gamma=options.edge_gamma,
        )

    @property
    def _unit(self) -> float:
        """What the graft's ratio is multiplied by: ``sqrt(d / correction) / scale = sqrt(d) / unit``."""
        return self.statistics.scale * (self.run.weight**0.5 if self.use_correction else 1.0)

    def leave(self) -> float:
        """Take what is this rank's back from a run with a halo; what the graft's sum of squares is multiplied by."""
        if self.statistics.bands is not self.bands:
            self.bands.copy_(self.statistics.bands[:, self.own])
            self.moment.copy_(self.filtered[self.own])
        if self.gradient.data_ptr() != self.member.gradient.data_ptr():
            self.member.gradient.copy_(self.gradient[self.own].view_as(self.member.gradient))
        correction = 1.0 - self.member.group["betas"][0] ** float(self.step) if self.use_correction else 1.0
        return (self._unit / correction) ** 2

    def ridge(self, peaks: dict[tuple[str, int], float], options: SONewOptions) -> Tensor | float:
        """What is added to the diagonal, in its units: one number, or one for each element."""
        if self.gradient.shape[0] == 0:
            return 0.0
        if not options.relative_eps:
            return self._absolute_ridge(options)
        ridge = self._chain_ridges(peaks, options)
        return ridge.view(()) if ridge.numel() == 1 else self._expand(ridge)

    def _absolute_ridge(self, options: SONewOptions) -> Tensor | float:
        weight = self.run.weight * self.decay + self.weight if self.decay < 1.0 else 1.0  # with this step's gradient
        return self.statistics.ridge(options.preconditioner_eps, correction=weight if self.use_correction else 1.0)

    def _chain_ridges(self, peaks: dict[tuple[str, int], float], options: SONewOptions) -> Tensor:
        """The ridge of every chain that the run touches, where a chain is cut with the other ranks' peaks."""
        statistics, length = self.statistics, self.statistics.chain_length
        if not options.relative_eps:
            last = statistics.start + statistics.bands.shape[1] - 1
            count = last // length - statistics.start // length + 1 if statistics.bands.shape[1] else 0
            return statistics.bands.new_full(
                (count,), float(self._absolute_ridge(options)), dtype=statistics.compute_dtype
            )
        tops = banded.chain_peaks(statistics.bands, statistics.start, length).to(statistics.compute_dtype)
        first = statistics.start // length
        for (name, chain), value in peaks.items():
            if name == self.member.name and first <= chain < first + tops.numel():
                tops[chain - first] = value
        return tops * options.preconditioner_eps

    def _expand(self, ridge: Tensor) -> Tensor:
        statistics, n = self.statistics, self.gradient.shape[0]
        scratch = self._scratch()
        out = scratch[:n] if scratch.dtype == ridge.dtype and scratch.numel() >= n else None
        return banded.expand_chains(ridge, n, statistics.start, statistics.chain_length, out=out)
