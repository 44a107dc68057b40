"""The step that every preconditioned optimizer takes, and its state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soo.linalg.norms import largest_magnitude, squared_norm
from lightning_soo.optim import grafting
from lightning_soo.optim.members import Member
from lightning_soo.optim.stateful import StatefulOptimizer
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics
from lightning_soo.refresh.jobs import Job

_ZERO = torch.tensor(0.0, dtype=torch.float64)  # of ranks that have nothing to add


class SecondOrderOptimizer(StatefulOptimizer):
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
        if self._plan is None or self._signature != self._current_signature():
            self.attach()
        if self._awaits_blocks:
            self._refuse_missing_blocks()
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
        return loss

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
        values = self._transport.largest(flags).tolist()
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
                warnings.warn(f"{text}: step skipped, nothing changed (said once)", stacklevel=5)
            return
        for member, value in zip(self._members, values, strict=True):
            member.magnitude = value
        self._moves = any(values)
        self.steps += self._moves

    def _local_flags(self) -> tuple[Tensor, str | None]:
        """Largest magnitude of every parameter's local gradient and whether one is sparse; that one's name."""
        assert self._layout is not None
        pending, scale = self._layout.pending_gradients() if self._layout.pending_gradients else ({}, 1.0)
        flags = torch.zeros(len(self._members) + 1, dtype=torch.float64)
        positions, found = [], []
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
            largest = largest_magnitude(gradient)
            found.append(largest if pending.get(index) is None else largest / scale)
            positions.append(index)
        if found:
            flags[positions] = torch.stack([value.to(found[0].device) for value in found]).cpu()
        return flags, None

    def _collect(self, members: list[Member]) -> None:
        """Bring gradients into the layout of the moments, and add L2 decay where it is not decoupled."""
        for member in members:
            state, group, parameter = self.state[member.tensor], member.group, member.parameter()
            grafting.initialise(state, member.tensor, self.options.grafting, group)
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
        interval = self.steps - self._refresher.schedule.observed_before(self.steps)
        for member in members:
            # betas[1] is the decay of one step, whatever the interval
            decay = float(member.group["betas"][1]) ** interval
            weight = 1.0 - decay if decay < 1.0 else 1.0
            for block in member.blocks:
                block.count(decay=decay, weight=weight)
            kept = [block for block in member.whole_blocks if block.statistics is not None]
            gradient = member.gradient.contiguous() if kept else member.gradient
            for block in kept:
                block.observe(
                    member.view(gradient, block.block.ranges), decay=decay, weight=weight, magnitude=member.magnitude
                )

        def source(member: Member) -> Tensor | None:
            return member.gradient if member.magnitude > 0 else None

        for bucket, units in self._assembly.arrive(part, lambda member: member.magnitude > 0, source):
            for traveller in bucket.travellers:
                member = self._members[traveller.parameter]
                if traveller.key not in units or not member.magnitude > 0:
                    continue
                block = self._refresher.blocks[traveller.key]
                decay = float(member.group["betas"][1]) ** interval
                weight = 1.0 - decay if decay < 1.0 else 1.0
                if block.statistics is not None:
                    block.observe(units[traveller.key], decay=decay, weight=weight, magnitude=member.magnitude)

    def _refresh(self, part: int) -> None:
        assert self._refresher is not None and self._layout is not None
        keys = None
        if self._layout.part_of:
            keys = {b.block.key for m in self._members if m.planned.spec.part == part for b in m.blocks}
        self._refresher.advance(self.steps, self._root_job, keys)

    def _root_job(self, block: KroneckerBlock, statistics: KroneckerStatistics) -> Job:
        return statistics.root_job(
            correction=block.weight if self.options.use_bias_correction else 1.0,
            exponent=block.exponent,
            eps=self.options.preconditioner_eps,
            relative_eps=self.options.relative_eps,
        )

    def _precondition(self, part: int, members: list[Member]) -> None:
        """Write each parameter's direction over its gradient and find its scale; one host synchronisation in all."""
        options = self.options
        gradient_norms = self._gradient_norms(members)
        grafts: dict[tuple[str, str], Tensor] = {}
        filtered_of: dict[int, Tensor] = {}
        for member in members:
            local = member.local_state(self.state[member.tensor])
            graft = self._scratch_like(member.gradient)
            filtered, correction = grafting.update(
                options.grafting,
                member.gradient,
                local,
                member.group,
                beta2=float(member.group["betas"][1]) if options.grafting_beta2 is None else options.grafting_beta2,
                use_bias_correction=options.use_bias_correction,
                gradient_norm=gradient_norms.get(member.name, 0.0),
                out=graft,
            )
            if member.counter is not None:
                step = self.state[member.tensor]["step"]
                step.copy_(torch.maximum(step, member.counter))
            member.scale = 1.0
            if not member.is_ready:
                member.gradient.copy_(graft)
                continue
            if options.grafting is None:
                member.scale = correction
            else:
                grafts |= self._squares(member, graft)
            filtered_of[id(member)] = filtered
            self._precondition_whole_blocks(member, filtered)
        self._precondition_travellers(part, filtered_of)
        if options.grafting is not None:
            self._graft([member for member in members if member.is_ready], grafts)

    def _precondition_whole_blocks(self, member: Member, filtered: Tensor) -> None:
        """Blocks that lie in this rank's fragment: straight from the filter to the gradient's storage."""
        source = filtered.contiguous()
        in_place = member.gradient.is_contiguous()
        target = member.gradient if in_place else torch.empty_like(source, memory_format=torch.contiguous_format)
        for block in member.whole_blocks:
            box = block.block.ranges
            member.view(target, box).copy_(block.precondition(member.view(source, box)))
        if not in_place:
            member.gradient.copy_(target)

    def _precondition_travellers(self, part: int, filtered_of: dict[int, Tensor]) -> None:
        """Blocks in pieces: assembled at their homes, and their directions brought back."""
        assert self._assembly is not None and self._refresher is not None

        def moves(member: Member) -> bool:
            return member.magnitude > 0 and member.is_ready

        def target(member: Member) -> Tensor:
            return member.gradient

        for bucket, units in self._assembly.arrive(part, moves, lambda member: filtered_of.get(id(member))):
            directions = {
                traveller.key: self._refresher.blocks[traveller.key].precondition(units[traveller.key])
                for traveller in bucket.travellers
                if traveller.key in units and moves(self._members[traveller.parameter])
            }
            self._assembly.give_back(bucket, directions, target)
        self._assembly.finish(target)

    def _squares(self, member: Member, local: Tensor) -> dict[tuple[str, str], Tensor]:
        """Sums of squares of this rank's elements, of the parameter or of each of its blocks."""
        if self.options.grafting_norm == "parameter":
            return {(member.name, ""): squared_norm(local) if member.counts and local.numel() else _ZERO}
        local = local.contiguous()
        found: dict[tuple[str, str], Tensor] = {}
        for block in member.blocks:
            squares = [squared_norm(member.view(local, box)) for box in member.local_pieces(block)]
            found[member.name, block.block.key] = sum(squares, _ZERO) if member.counts else _ZERO
        return found

    def _totals(self, squares: Sequence[Tensor]) -> list[float]:
        """Sums over the ranks that share one copy of the model; the same bits on all ranks."""
        if not squares:
            return []
        device = next((value.device for value in squares if value is not _ZERO), _ZERO.device)
        values = torch.stack([value.to(device) for value in squares])
        if self._plan is not None and self._plan.table.shards > 1:
            values = self._transport.total(values)
        return values.tolist()

    def _gradient_norms(self, members: list[Member]) -> dict[str, float]:
        """Norms of whole gradients, for the grafts that divide by them."""
        if not grafting.normalizes(self.options.grafting):
            return {}
        squares = [squared_norm(m.gradient) if m.counts and m.gradient.numel() else _ZERO for m in members]
        return {member.name: value**0.5 for member, value in zip(members, self._totals(squares), strict=True)}

    def _graft(self, members: list[Member], grafts: dict[tuple[str, str], Tensor]) -> None:
        """Give each direction the size of the graft's step."""
        directions: dict[tuple[str, str], Tensor] = {}
        for member in members:
            directions |= self._squares(member, member.gradient)
        values = self._totals([*grafts.values(), *directions.values()])
        ratios = {
            key: _ratio(graft**0.5, direction**0.5)
            for key, graft, direction in zip(grafts, values, values[len(grafts) :], strict=False)
        }
        for member in members:
            if self.options.grafting_norm == "parameter":
                member.scale = ratios[member.name, ""]
                continue
            in_place = member.gradient.is_contiguous()
            target = member.gradient if in_place else member.gradient.contiguous()
            for block in member.blocks:
                for box in member.local_pieces(block):
                    member.view(target, box).mul_(ratios[member.name, block.block.key])
            if not in_place:
                member.gradient.copy_(target)

    def _apply(self, members: list[Member]) -> None:
        for member in members:
            group, parameter, direction = member.group, member.parameter(), member.gradient
            lr, momentum, scale = float(group["lr"]), group["momentum"], member.scale
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                parameter.mul_(1.0 - lr * float(group["weight_decay"]))
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
            parameter.add_(direction, alpha=-lr * scale)
            member.gradient = torch.empty(0)

    def _scratch_like(self, tensor: Tensor) -> Tensor:
        """Memory for one graft direction at a time, of the largest parameter's size."""
        key = (tensor.device, tensor.dtype)
        buffer = self._scratch.get(key)
        if buffer is None or buffer.numel() < tensor.numel():
            largest = max(m.fragment.stop - m.fragment.start for m in self._members)
            buffer = self._scratch[key] = torch.empty(largest, dtype=tensor.dtype, device=tensor.device)
        return buffer[: tensor.numel()].as_strided(tensor.shape, tensor.stride())

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


def _ratio(graft: float, direction: float) -> float:
    """``||d|| / ||D||``; a direction without a finite size does not move."""
    if not direction > 0.0 or direction == float("inf"):
        return 0.0
    return graft / direction
