"""From gradients to directions: filter, precondition where blocks live, and give each direction the graft's size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soo.linalg.norms import inner_product, squared_norm
from lightning_soo.optim import grafting
from lightning_soo.optim.assembly import Source
from lightning_soo.optim.members import Member
from lightning_soo.optim.stateful import StatefulOptimizer
from lightning_soo.placement.boxes import Box
from lightning_soo.preconditioners.kronecker import KroneckerBlock
from lightning_soo.preconditioners.stacks import Stack

_LARGEST_RATIO = 1e30  # of a graft's size to a direction's; float32 must hold it
# of one parameter whose graft advances with others', and of all of these at once
_SMALL, TOGETHER = 1 << 17, 1 << 20
_ZERO = torch.tensor(0.0, dtype=torch.float64)  # of ranks that have nothing to add


class DirectedOptimizer(StatefulOptimizer):
    """An optimizer that turns the members' gradients into directions, in place."""

    def _precondition(self, part: int, members: list[Member]) -> None:
        """Write each parameter's direction over its gradient and find its scale; one host synchronisation in all."""
        squares: dict[int, dict[tuple[str, str], Tensor]] = {}
        filtered_of: dict[int, Tensor] = {}
        left_to_graft: list[tuple[Member, list[tuple[Box, Tensor]]]] = []
        for member, graft, filtered, correction in self._advance_grafts(members):
            if member.counter is not None:
                step = self.state[member.tensor]["step"]
                step.copy_(torch.maximum(step, member.counter))
            member.scale = 1.0
            if not member.is_ready:
                member.gradient.copy_(graft)
                continue
            if any(block.is_blank for block in member.blocks):
                graft, parts = _without_blank_blocks(member, graft)
                left_to_graft.append((member, parts))
            if member.graft is None:
                member.scale = correction
            else:
                squares[id(member)] = self._squares(member, graft)
            filtered_of[id(member)] = filtered
        # in the members' order, which is that of all ranks
        grafts = {key: value for member in members for key, value in squares.get(id(member), {}).items()}
        moving = [(member, filtered_of[id(member)]) for member in members if id(member) in filtered_of]
        arriving = self._send_travellers(part, filtered_of)
        self._precondition_whole_blocks(moving)
        self._precondition_travellers(arriving, filtered_of)
        self._scale_rows([member for member, _ in moving if member.rows is not None])
        self._graft([member for member in members if member.is_ready and member.graft is not None], grafts)
        for member, parts in left_to_graft:
            _put_back(member, parts)

    def _advance_grafts(self, members: Sequence[Member]) -> Iterator[tuple[Member, Tensor, Tensor, float]]:
        """Advance the moments; of each member the graft's direction, which the next one may overwrite, the filtered
        gradient, and the factor that corrects its bias. Small ones go together, so not in the members' order.
        """
        options = self.options
        gradient_norms = self._gradient_norms(members)

        def beta2(member: Member) -> float:
            return float(member.group["betas"][1]) if options.grafting_beta2 is None else options.grafting_beta2

        for batch in _batches(members):
            states = [member.local_state(self.state[member.tensor]) for member in batch]
            buffers = self._scratch_like([member.gradient for member in batch])
            if len(batch) > 1:
                found = grafting.update_adam(
                    [member.gradient for member in batch],
                    states,
                    batch[0].group,
                    beta2=beta2(batch[0]),
                    use_bias_correction=options.use_bias_correction,
                    out=buffers,
                )
                for member, graft, (filtered, correction) in zip(batch, buffers, found, strict=True):
                    yield member, graft, filtered, correction
                continue
            (member,), (graft,) = batch, buffers
            filtered, correction = grafting.update(
                member.graft,
                member.gradient,
                states[0],
                member.group,
                beta2=beta2(member),
                use_bias_correction=options.use_bias_correction,
                gradient_norm=gradient_norms.get(member.name, 0.0),
                out=graft,
            )
            yield member, graft, filtered, correction

    def _precondition_whole_blocks(self, moving: Sequence[tuple[Member, Tensor]]) -> None:
        """Blocks that lie in this rank's fragments: straight from the filter to the gradient's storage."""
        left = {id(member): list(self._stacks.alone[id(member)]) for member, _ in moving}
        rows = [(m, filtered) for m, filtered in moving if m.gradient.is_contiguous() and filtered.is_contiguous()]
        sources = {id(member): filtered for member, filtered in rows}
        targets = {id(member): member.gradient for member, _ in rows}
        for stack in self._stacks.tiled:
            if not stack.precondition(sources, targets):
                for tile in stack.tiles:
                    if id(tile.member) in left:
                        left[id(tile.member)] += tile.blocks
        for member, filtered in moving:
            self._precondition_alone(member, filtered, left[id(member)])

    def _precondition_alone(self, member: Member, filtered: Tensor, blocks: Sequence[KroneckerBlock]) -> None:
        """One block after the other."""
        if not blocks:
            return
        source = filtered.contiguous()
        in_place = member.gradient.is_contiguous()
        target = member.gradient if in_place else member.gradient.contiguous()
        for block in blocks:
            view = member.view(target, block.block.ranges)  # the gradient, until the direction overwrites it
            view.copy_(block.precondition(member.view(source, block.block.ranges), view, member.group))
        if not in_place:
            member.gradient.copy_(target)

    def _send_travellers(self, part: int, filtered_of: Mapping[int, Tensor]) -> Iterator[tuple[Any, ...]]:
        """Blocks in pieces: begin to bring them to their homes."""
        assert self._assembly is not None

        def moves(member: Member) -> bool:
            return id(member) in filtered_of

        sources: list[Source] = [lambda member: filtered_of.get(id(member))]
        if self.block_class.needs_gradient:
            sources.append(lambda member: member.gradient if moves(member) else None)
        return self._assembly.arrive(part, moves, sources)

    def _precondition_travellers(self, arriving: Iterator[tuple[Any, ...]], filtered_of: Mapping[int, Tensor]) -> None:
        """Precondition them as they arrive, and bring their directions back."""
        assert self._assembly is not None and self._refresher is not None

        def target(member: Member) -> Tensor:
            return member.gradient

        for bucket, *units in arriving:
            here = {t.key: self._members[t.parameter] for t in bucket.travellers if t.key in units[0]}
            stacks = self._stacks.of_units(bucket, [(self._refresher.blocks[key], m) for key, m in here.items()])
            moving = {key: member for key, member in here.items() if id(member) in filtered_of}
            self._assembly.give_back(bucket, self._directions_of(moving, stacks, units), target)
        self._assembly.finish(target)

    def _directions_of(
        self, moving: Mapping[str, Member], stacks: Sequence[Stack], units: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Of units that were assembled here, by key.

        Args:
            units: running means, and gradients where they are needed.
        """
        assert self._refresher is not None
        found: dict[str, Tensor] = {}
        for stack in stacks:
            keys = [block.block.key for block in stack.blocks]
            if all(key in moving for key in keys) and stack.gather():
                given = [torch.stack([assembled[key] for key in keys]) for assembled in units]
                directions = stack.precondition(
                    given[0], given[-1] if self.block_class.needs_gradient else None, moving[keys[0]].group
                )
                found |= dict(zip(keys, directions, strict=True))
        for key, member in moving.items():
            if key in found:
                continue
            block = self._refresher.blocks[key]
            given = [assembled[key] for assembled in units]
            found[key] = block.precondition(given[0], given[-1] if block.needs_gradient else None, member.group)
        return found

    def _scale_rows(self, members: Sequence[Member]) -> None:
        """The diagonal preconditioners of rows that have no matrix."""
        moments = [member.local_state(self.state[member.tensor])["exp_avg_sq"].contiguous() for member in members]
        sums: list[Tensor] = []
        for member, second in zip(members, moments, strict=True):
            assert member.rows is not None
            sums += member.rows.cut_sums(second, member.counts).unbind()
        totals = iter(self._totals(sums, "the rows that sharding cuts"))
        for member, second in zip(members, moments, strict=True):
            assert member.rows is not None
            own = [next(totals) for _ in member.rows.cut]
            target = member.gradient.contiguous()
            exponent, eps = member.blocks[0].root_exponent, float(member.group["eps"])
            member.rows.scale_(target, second, own, exponent=exponent, eps=eps)
            if target is not member.gradient:
                member.gradient.copy_(target)

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

    def _watch_signal(self, members: Sequence[Member]) -> None:
        """Compare gradients with the running means of those before them, where an exponent depends on it."""
        watched = [member for member in members if member.watches_signal]
        sums: list[Tensor] = []
        for member in watched:
            local, gradient = member.local_state(self.state[member.tensor]), member.gradient
            mean, step = local.get("exp_avg"), float(local["step"])
            if mean is None or step == 0.0 or not member.counts or gradient.numel() == 0:
                sums += [_ZERO, _ZERO]
                continue
            correction = 1.0 - float(member.group["betas"][0]) ** step
            sums += [inner_product(mean, gradient) / correction, squared_norm(gradient)]
        totals = self._totals(sums, "the gradients' signal")
        for member, common, energy in zip(watched, totals[::2], totals[1::2], strict=True):
            for block in member.blocks:
                block.signal.observe(common, energy)

    def _totals(self, squares: Sequence[Tensor], purpose: str = "the norms") -> list[float]:
        """Sums over the ranks that share one copy of the model; the same bits on all ranks."""
        if not squares:
            return []
        # zeros of what this rank lacks lie on the host, and bringing the others there would wait for each of them
        device = next((value.device for value in squares if value.device != _ZERO.device), _ZERO.device)
        values = torch.stack([value.to(device) for value in squares])
        if self._plan is not None and self._plan.table.shards > 1:
            values = self._transport.total(values, purpose)
        return values.tolist()

    def _gradient_norms(self, members: Sequence[Member]) -> dict[str, float]:
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
                if member.scale == 0.0:
                    member.gradient.zero_()
                continue
            in_place = member.gradient.is_contiguous()
            target = member.gradient if in_place else member.gradient.contiguous()
            for block in member.blocks:
                ratio = ratios[member.name, block.block.key]
                for box in member.local_pieces(block):
                    part = member.view(target, box)
                    part.mul_(ratio) if ratio > 0.0 else part.zero_()  # Inf and NaN times zero are NaN
            if not in_place:
                member.gradient.copy_(target)

    def _scratch_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Memory for one batch of graft directions at a time: of the largest parameter's size, or of small ones."""
        key = (tensors[0].device, tensors[0].dtype)
        needed = sum(tensor.numel() for tensor in tensors)
        buffer = self._scratch.get(key)
        if buffer is None or buffer.numel() < needed:
            sizes = [m.fragment.stop - m.fragment.start for m in self._members]
            enough = max(*sizes, min(sum(sizes), TOGETHER))
            buffer = self._scratch[key] = torch.empty(enough, dtype=tensors[0].dtype, device=tensors[0].device)
        parts = torch.split(buffer[:needed], [tensor.numel() for tensor in tensors])
        return [part.as_strided(tensor.shape, tensor.stride()) for part, tensor in zip(parts, tensors, strict=True)]


def _batches(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members whose grafts advance together: small ones of one group, since a call takes longer than their elements."""
    batches: dict[tuple[object, ...], list[Member]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for member in members:
        gradient = member.gradient
        size = gradient.numel()
        if member.graft != "adam" or not 0 < size <= _SMALL:
            yield [member]
            continue
        key = id(member.group), gradient.dtype, gradient.device
        if sizes.get(key, 0) + size > TOGETHER:
            yield batches.pop(key)
            sizes[key] = 0
        batches.setdefault(key, []).append(member)
        sizes[key] = sizes.get(key, 0) + size
    yield from batches.values()


def _ratio(graft: float, direction: float) -> float:
    """``||d|| / ||D||``; a direction without a finite size, or of none in comparison, does not move."""
    if not direction > 0.0 or direction == float("inf"):
        return 0.0
    ratio = graft / direction
    return ratio if ratio < _LARGEST_RATIO else 0.0


def _without_blank_blocks(member: Member, graft: Tensor) -> tuple[Tensor, list[tuple[Box, Tensor]]]:
    """The graft with zeros in blocks that it moves alone, so that the others do not get their share of its size.

    Returns:
        That, and the parts left out: their boxes, and copies.
    """
    rest = graft.contiguous()
    boxes = [box for block in member.blocks if block.is_blank for box in member.local_pieces(block)]
    parts = [(box, member.view(rest, box).clone()) for box in boxes]
    for box in boxes:
        member.view(rest, box).zero_()
    return rest, parts


def _put_back(member: Member, parts: Sequence[tuple[Box, Tensor]]) -> None:
    """Give the parts that the graft moves their place in the direction, which is scaled now."""
    target = member.gradient.contiguous().mul_(member.scale)
    member.scale = 1.0
    for box, part in parts:
        member.view(target, box).copy_(part)
    if target is not member.gradient:
        member.gradient.copy_(target)
