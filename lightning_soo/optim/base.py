"""The step that every preconditioned optimizer takes, and its state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_soo.linalg.norms import largest_magnitude, squared_norm
from lightning_soo.optim import grafting
from lightning_soo.optim.planned import Member
from lightning_soo.optim.stateful import StatefulOptimizer
from lightning_soo.preconditioners.kronecker import KroneckerBlock
from lightning_soo.refresh.jobs import Job


class SecondOrderOptimizer(StatefulOptimizer):
    """Base of the preconditioned optimizers; construct a subclass.

    ``step()`` overwrites ``.grad`` with the direction (no copy of the parameters is needed for it), so read gradients
    before it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Raises:
            TypeError: a sparse gradient.
            FloatingPointError: a gradient that is not finite, with ``nonfinite="raise"``.
            RefreshError: the roots of one block failed too often.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._signature != self._current_signature():
            self.attach()
        members = self._flag()
        if members:
            self.steps += 1
            self._collect(members)
            self._observe(members)
            self._refresh()
            self._precondition(members)
            self._apply(members)
        return loss

    def _flag(self) -> list[Member]:
        """Agree on what moves: nothing has changed yet, and every rank decides the same.

        Missing and all-zero gradients are the same thing: such a parameter, its moments and its statistics stand
        still. One non-finite gradient anywhere skips the step for all.
        """
        present = [
            member
            for member in self._members
            if member.parameter.grad is not None and member.parameter.grad.numel() > 0
        ]
        sparse = next((m for m in present if m.parameter.grad.layout != torch.strided), None)  # type: ignore[union-attr]
        flags = torch.zeros(len(self._members) + 1, dtype=torch.float64)
        if sparse is not None:
            flags[-1] = 1.0
        elif present:
            index = {id(member): position for position, member in enumerate(self._members)}
            found = [largest_magnitude(m.parameter.grad) for m in present]  # type: ignore[arg-type]
            flags[[index[id(member)] for member in present]] = torch.stack(found).cpu()
        values = self._transport.largest(flags).tolist()
        if values.pop():
            where = f"parameter {sparse.planned.name!r}" if sparse is not None else "a parameter on another rank"
            raise TypeError(f"{where} has a sparse gradient: build its Embedding with sparse=False")
        nonfinite = [m.planned.name for m, value in zip(self._members, values, strict=True) if value == float("inf")]
        if nonfinite:
            text = f"gradient of {', '.join(map(repr, nonfinite[:3]))}{' and others' * (len(nonfinite) > 3)} not finite"
            if self.options.nonfinite == "raise":
                raise FloatingPointError(f"{text} at step {self.steps + 1}; nothing was changed")
            self.skipped_steps += 1
            if self.skipped_steps == 1:
                warnings.warn(f"{text}: step skipped, nothing changed (said once)", stacklevel=4)
            return []
        for member, value in zip(self._members, values, strict=True):
            member.magnitude = value
        return [member for member in self._members if member.magnitude > 0]

    def _collect(self, members: list[Member]) -> None:
        """Bring gradients into the layout of the moments, and add L2 decay where it is not decoupled."""
        for member in members:
            state, group, parameter = self.state[member.parameter], member.group, member.parameter
            grafting.initialise(state, parameter, self.options.grafting, group)
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            like = state.get("exp_avg", state.get("exp_avg_sq", parameter))
            if gradient.stride() != like.stride() or gradient.dtype != like.dtype:
                gradient = torch.empty_like(like, memory_format=torch.preserve_format).copy_(gradient)
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                gradient.add_(parameter, alpha=float(group["weight_decay"]))
            member.gradient = gradient

    def _observe(self, members: list[Member]) -> None:
        assert self._refresher is not None
        if not self._refresher.schedule.observes(self.steps):
            return
        interval = self.steps - self._refresher.schedule.observed_before(self.steps)
        for member in members:
            if not member.blocks:
                continue
            # betas[1] is the decay of one step, whatever the interval
            decay = float(member.group["betas"][1]) ** interval
            weight = 1.0 - decay if decay < 1.0 else 1.0
            gradient = member.gradient.reshape(member.blocks[0].block.merged_shape)
            for block in member.blocks:
                block.count(decay=decay, weight=weight)
                if block.statistics is not None:
                    block.statistics.observe(
                        block.block,
                        gradient[block.block.slices],
                        decay=decay,
                        weight=weight,
                        magnitude=member.magnitude,
                    )

    def _refresh(self) -> None:
        assert self._refresher is not None
        self._refresher.advance(self.steps, self._root_job)

    def _root_job(self, block: KroneckerBlock) -> Job:
        assert block.statistics is not None
        return block.statistics.root_job(
            correction=block.weight if self.options.use_bias_correction else 1.0,
            exponent=block.exponent,
            eps=self.options.preconditioner_eps,
            relative_eps=self.options.relative_eps,
        )

    def _precondition(self, members: list[Member]) -> None:
        """Write each parameter's direction over its gradient and find its scale; one host synchronisation in all."""
        options = self.options
        norms: list[Tensor] = []
        for member in members:
            state = self.state[member.parameter]
            graft = self._scratch_like(member.gradient)
            filtered, correction = grafting.update(
                options.grafting,
                member.gradient,
                state,
                member.group,
                beta2=float(member.group["betas"][1]) if options.grafting_beta2 is None else options.grafting_beta2,
                use_bias_correction=options.use_bias_correction,
                out=graft,
            )
            member.scale = 1.0
            if not member.is_ready:
                member.gradient.copy_(graft)
                continue
            norms += self._direction(member, filtered, graft)
            if options.grafting is None:
                member.scale = correction
        if norms:
            values = torch.stack(norms).sqrt().tolist()
            self._graft(members, values)

    def _direction(self, member: Member, filtered: Tensor, graft: Tensor) -> list[Tensor]:
        """Precondition block by block; return pairs of squared norms (graft, direction), per parameter or per block."""
        shape = member.blocks[0].block.merged_shape
        source, graft = filtered.reshape(shape), graft.reshape(shape)
        in_place = member.gradient.is_contiguous()
        target = member.gradient.view(shape) if in_place else torch.empty_like(source)
        per_block = self.options.grafting_norm == "block"
        pairs: list[Tensor] = []
        squares: Tensor | float = 0.0
        for block in member.blocks:
            slices = block.block.slices
            direction = block.precondition(source[slices])
            target[slices].copy_(direction)
            if self.options.grafting is None:
                continue
            square = squared_norm(target[slices])
            if per_block:
                pairs += [squared_norm(graft[slices]), square]
            else:
                squares = squares + square
        if not in_place:
            member.gradient.copy_(target.view(member.gradient.shape))
        if self.options.grafting is None or per_block:
            return pairs
        assert isinstance(squares, Tensor)
        return [squared_norm(graft), squares]

    def _graft(self, members: list[Member], values: list[float]) -> None:
        """Give each direction the size of the graft's step."""
        pairs = iter(zip(values[::2], values[1::2], strict=True))
        for member in members:
            if not member.is_ready:
                continue
            if self.options.grafting_norm == "parameter":
                member.scale = _ratio(*next(pairs))
                continue
            shape = member.blocks[0].block.merged_shape
            in_place = member.gradient.is_contiguous()
            target = member.gradient.view(shape) if in_place else member.gradient.reshape(shape).clone()
            for block in member.blocks:
                target[block.block.slices].mul_(_ratio(*next(pairs)))
            if not in_place:
                member.gradient.copy_(target.view(member.gradient.shape))

    def _apply(self, members: list[Member]) -> None:
        for member in members:
            group, parameter, direction = member.group, member.parameter, member.gradient
            lr, momentum, scale = float(group["lr"]), group["momentum"], member.scale
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                parameter.mul_(1.0 - lr * float(group["weight_decay"]))
            if momentum:
                state = self.state[parameter]
                buffer = state.get("momentum_buffer")
                if buffer is None:  # as torch.optim.SGD: the first direction enters whole
                    buffer = state["momentum_buffer"] = direction.mul(scale)
                else:
                    buffer.mul_(momentum).add_(direction, alpha=scale * (1.0 - group["dampening"]))
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
            largest = max(m.parameter.numel() for m in self._members)
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
