"""The step that every preconditioned optimizer takes, and its state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lightning_soo.linalg.norms import largest_magnitudes
from lightning_soo.optim import grafting
from lightning_soo.optim.directions import DirectedOptimizer
from lightning_soo.optim.members import Member
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics
from lightning_soo.refresh.jobs import Job, JobResult

_CHUNK = 1 << 17


class SecondOrderOptimizer(DirectedOptimizer):
    """Base of the preconditioned optimizers; construct a subclass.

    ``step()`` overwrites ``.grad`` with the direction (no copy of the parameters is needed for it), so read gradients
    before it.
    """

    _moves = False  # whether this step changes anything

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or one part of it where the engine steps group by group (ZeRO).

        Raises:
            TypeError: a sparse gradient.
            FloatingPointError: a gradient that is not finite, with ``nonfinite="raise"``.
            RefreshError: the roots of one block failed too often.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @_disable_dynamo  # torch.compile(optimizer.step) runs it as it is, as torch's own do with what they do not capture
    def _take_step(self) -> None:
        if self._plan is None or self._signature != self._current_signature():
            self.attach()
        if self._awaits_blocks:
            self._refuse_missing_blocks()
        self._has_loaded_blocks = False
        part = self._part()
        if part == 0:
            self._begin_step()
        members = [member for member in self._members if member.planned.spec.part == part and member.magnitude > 0]
        if self._moves:
            self._collect(members)
            self._observe(part, members)
            self._refresh(part)
            self._precondition(part, members)
            self._apply(members)
        self._end_step(part)

    def _part(self) -> int:
        """Which part of the step the engine asks for."""
        assert self._layout is not None
        if not self._layout.part_of:
            return 0
        shown = [parameter for group in self.param_groups for parameter in group["params"]]
        return self._layout.part_of[id(shown[0])]

    def _begin_step(self) -> None:
        """Agree on what moves: nothing has changed yet, and every rank decides the same, for all parts.

        Missing and all-zero gradients are the same thing: such a parameter, its moments and its statistics stand
        still. One non-finite gradient anywhere skips the step for all.
        """
        flags, sparse = self._local_flags()
        marks = self._marks()
        self._transport.begin_step(self.steps + 1)
        own = torch.cat([flags, torch.tensor(marks, dtype=flags.dtype)])
        agreed = self._transport.largest(own, "the flags").tolist()
        values, marks = agreed[: len(flags)], agreed[len(flags) :]
        if values.pop():
            where = f"parameter {sparse!r}" if sparse is not None else "a parameter on another rank"
            raise TypeError(f"{where} has a sparse gradient: build its Embedding with sparse=False")
        nonfinite = [member.name for member, value in zip(self._members, values, strict=True) if value == float("inf")]
        if nonfinite:
            self._moves = False
            text = f"gradient of {', '.join(map(repr, nonfinite[:3]))}{' and others' * (len(nonfinite) > 3)} not finite"
            if self.options.nonfinite == "raise":
                raise FloatingPointError(f"{text} at step {self.steps + 1}; nothing was changed")
            self.skipped_steps += 1
            if self.skipped_steps == 1:
                warnings.warn(f"{text}: step skipped, nothing changed (said once)", stacklevel=8)
            return
        for member, value in zip(self._members, values, strict=True):
            member.magnitude = value
        self._take_marks(marks)
        self._moves = any(values)
        self.steps += self._moves

    def _marks(self) -> list[float]:
        """What else ranks have to agree on before anything changes: the largest counts."""
        return []

    def _take_marks(self, marks: Sequence[float]) -> None:
        """What all ranks have agreed on of :meth:`_marks`."""

    def _end_step(self, part: int) -> None:
        """A part of the step is over, or it was skipped."""

    def _local_flags(self) -> tuple[Tensor, str | None]:
        """Largest magnitude of every parameter's local gradient and whether one is sparse; that one's name."""
        assert self._layout is not None
        pending, scale = self._layout.pending_gradients() if self._layout.pending_gradients else ({}, 1.0)
        flags = torch.zeros(len(self._members) + 1, dtype=torch.float64)
        positions: list[int] = []
        found: list[Tensor] = []
        scales: list[float] = []
        for index, member in enumerate(self._members):
            if member.is_empty:
                continue
            gradient = pending.get(index)
            if gradient is None:
                if member.tensor.grad is None:
                    continue
                if member.tensor.grad.layout != torch.strided:
                    flags[-1] = 1.0
                    return flags, member.name
                gradient = member.local_gradient()
            assert gradient is not None
            found.append(gradient)
            scales.append(1.0 if pending.get(index) is None else float(scale))
            positions.append(index)
        if found:
            flags[positions] = largest_magnitudes(found).cpu() / torch.tensor(scales, dtype=torch.float64)
        return flags, None

    def _collect(self, members: list[Member]) -> None:
        """Bring gradients into the layout of the moments, and add L2 decay where it is not decoupled."""
        for member in members:
            state, group, parameter = self.state[member.tensor], member.group, member.parameter()
            grafting.initialise(state, member.tensor, member.graft, group)
            local = member.local_state(state)
            found = member.local_gradient()
            gradient = torch.zeros_like(parameter) if found is None else found
            like = next((local[name] for name in grafting.MOMENTS if name in local), parameter)
            if gradient.stride() != like.stride() or gradient.dtype != like.dtype:
                gradient = torch.empty_like(like, memory_format=torch.preserve_format).copy_(gradient)
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                gradient.add_(parameter, alpha=float(group["weight_decay"]))
            member.gradient = gradient

    def _observe(self, part: int, members: list[Member]) -> None:
        assert self._refresher is not None and self._assembly is not None
        if not self._refresher.schedule.observes(self.steps):
            return
        self._refresher.background.fence()
        self._watch_signal(members)
        interval = self.steps - self._refresher.schedule.observed_before(self.steps)

        def source(member: Member) -> Tensor | None:
            return member.gradient if member.magnitude > 0 else None

        arriving = self._assembly.arrive(part, lambda member: member.magnitude > 0, [source])
        for member in members:
            decay, weight = member.weights(interval)
            for block in member.blocks:
                block.count(decay=decay, weight=weight)
            kept = [block for block in member.whole_blocks if block.statistics is not None]
            gradient = member.gradient.contiguous() if kept else member.gradient
            for block in kept:
                block.observe(
                    member.view(gradient, block.block.ranges), decay=decay, weight=weight, magnitude=member.magnitude
                )
        for bucket, units in arriving:
            for traveller in bucket.travellers:
                member = self._members[traveller.parameter]
                if traveller.key not in units or not member.magnitude > 0:
                    continue
                block = self._refresher.blocks[traveller.key]
                decay, weight = member.weights(interval)
                if block.statistics is not None:
                    block.observe(units[traveller.key], decay=decay, weight=weight, magnitude=member.magnitude)

    def _refresh(self, part: int) -> None:
        assert self._refresher is not None and self._layout is not None
        keys = None
        if self._layout.part_of:
            keys = {b.block.key for m in self._members if m.planned.spec.part == part for b in m.blocks}
        self._refresher.advance(self.steps, self._make_job, keys)

    def _make_job(self, block: KroneckerBlock, statistics: KroneckerStatistics) -> Job | JobResult:
        return block.refresh_in_place(statistics, self.options) or block.job(statistics, self.options)

    def _apply(self, members: list[Member]) -> None:
        for member in members:
            group, parameter, direction = member.group, member.parameter(), member.gradient
            lr, momentum, scale = float(group["lr"]), group["momentum"], member.scale
            decay = float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0
            if momentum:
                buffer = member.local_state(self.state[member.tensor])["momentum_buffer"]
                # as torch.optim.SGD: the first direction enters whole
                first = bool(group["dampening"]) and not buffer.any()
                buffer.mul_(momentum).add_(direction, alpha=scale * (1.0 if first else 1.0 - group["dampening"]))
                if group["nesterov"]:
                    direction.mul_(scale).add_(buffer, alpha=momentum)
                else:
                    direction = buffer
                scale = 1.0
            self._move(parameter, direction, shrink=1.0 - lr * decay, alpha=-lr * scale)
            member.gradient = torch.empty(0)

    def _move(self, parameter: Tensor, direction: Tensor, *, shrink: float, alpha: float) -> None:
        """``parameter <- shrink parameter + alpha direction``."""
        move(parameter, direction, shrink=shrink, alpha=alpha)

    def diagnostics(self) -> dict[str, float]:
        """Figures for a logger, equal on all ranks; empty of refresh figures before the first roots are in."""
        blocks = [block for member in self._members for block in member.blocks if block.diagnostics]
        figures = {
            "preconditioned_share": self._plan.preconditioned_share if self._plan else 0.0,
            "skipped_steps": float(self.skipped_steps),
        }
        scales = [member.scale for member in self._members if member.is_ready]
        if scales and self.options.grafting_norm == "parameter" and self.options.grafting is not None:
            figures["graft_ratio"] = sum(scales) / len(scales)
        shares = [member.blocks[0].signal.share for member in self._members if member.watches_signal]
        if shares:
            figures["signal_share"] = sum(shares) / len(shares)
        if blocks:
            figures |= {
                "condition_number": max(block.diagnostics["condition_number"] for block in blocks),
                "root_residual": max(block.diagnostics["residual"] for block in blocks),
                "refresh_seconds": sum(block.diagnostics["seconds"] for block in blocks),
                "refresh_wait_seconds": max(block.diagnostics.get("waited", 0.0) for block in blocks),
                "worker_restarts": max(block.diagnostics.get("restarts", 0.0) for block in blocks),
                "refreshes_in_flight": float(len(self._refresher.in_flight)) if self._refresher else 0.0,
                "staleness": self.steps - min(block.diagnostics["started"] for block in blocks),
            }
        return figures


def move(parameter: Tensor, direction: Tensor, *, shrink: float, alpha: float) -> None:
    """``parameter <- shrink parameter + alpha direction``; on a CPU in pieces that stay in cache between the two."""
    if shrink == 1.0:
        parameter.add_(direction, alpha=alpha)
    elif parameter.device.type != "cpu" or not (parameter.is_contiguous() and direction.is_contiguous()):
        parameter.mul_(shrink).add_(direction, alpha=alpha)
    else:
        pieces = torch.split(parameter.view(-1), _CHUNK), torch.split(direction.view(-1), _CHUNK)
        for piece, towards in zip(*pieces, strict=True):
            piece.mul_(shrink).add_(towards, alpha=alpha)
