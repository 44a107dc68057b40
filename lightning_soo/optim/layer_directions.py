"""From gradients to directions layer by layer: a weight together with its bias, and a bound on the whole step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soo.optim.adaptive_damping import AdaptiveDamping
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.kfac_options import KFACOptions
from lightning_soo.optim.members import Member
from lightning_soo.optim.repetition import RandomState, repeating
from lightning_soo.placement.blocks import Block
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.plan import Plan
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics
from lightning_soo.preconditioners.layer_factors import LayerFactorsBlock
from lightning_soo.refresh.jobs import Job, JobResult


class LayerDirections(SecondOrderOptimizer):
    """Preconditions layers where they live."""

    options: KFACOptions
    block_class = LayerFactorsBlock

    def _reset_runtime(self) -> None:
        super()._reset_runtime()
        # of every layer that is counted here: lr^2 <D, G> and lr <D, G>
        self._products: list[Tensor] = []
        self._slopes: list[Tensor] = []
        self._total = 0.0  # of the parts of this step so far
        self._last_total: float | None = None  # of the step before
        self._clip_factor = 1.0
        self._predicted = 0.0  # change of the quadratic model by this step
        self._damping: float | None = None
        self.evaluate: Callable[[], Tensor] | None = None
        self._by_name: dict[str, Member] = {}

    def _install_plan(self, plan: Plan, layout: Layout) -> None:
        super()._install_plan(plan, layout)
        self._by_name = {member.name: member for member in self._members}

    @property
    def damping(self) -> float:
        """``lambda``, as it is now."""
        return self._damping if self._damping is not None else self.options.damping

    @property
    def _parts(self) -> int:
        """In how many parts the engine takes a step."""
        assert self._layout is not None
        return len(set(self._layout.part_of.values())) or 1

    @staticmethod
    def _blocks_of(member: Member) -> Iterator[LayerFactorsBlock]:
        """Blocks that precondition some of a parameter."""
        for block in (*member.blocks, *member.joined):
            assert isinstance(block, LayerFactorsBlock)
            yield block

    def _make_job(self, block: KroneckerBlock, statistics: KroneckerStatistics) -> Job | JobResult:
        assert isinstance(block, LayerFactorsBlock)
        block.damping = self.damping
        return super()._make_job(block, statistics)

    def _precondition(self, part: int, members: list[Member]) -> None:
        self._products, self._slopes = [], []
        for member in members:
            for block in self._blocks_of(member):
                block.damping = self.damping
        super()._precondition(part, members)
        self._clip(part, [member for member in members if member.is_ready and member.graft is None])

    def _precondition_whole_blocks(self, moving: Sequence[tuple[Member, Tensor]]) -> None:
        """Layers that lie completely in this rank's fragments."""
        members = {member.name: member for member, _ in moving}
        assert self._plan is not None and self._refresher is not None
        sources = {member.name: filtered.contiguous() for member, filtered in moving}
        targets = {name: member.gradient.contiguous() for name, member in members.items()}
        for unit in self._plan.units:
            if unit.place.travels or self._transport.rank not in unit.homes:
                continue
            block = self._refresher.blocks[unit.key]
            assert isinstance(block, LayerFactorsBlock)
            bias = block.layer.bias
            if block.block.parameter not in members and (bias is None or bias.parameter not in members):
                continue

            def view(box: Block, tensors: Mapping[str, Tensor]) -> Tensor | None:
                name = box.parameter
                return members[name].view(tensors[name], box.ranges) if name in members else None

            weight = view(block.block, sources)
            of_bias = view(bias, sources) if bias is not None else None
            found = self._direction(block, weight, of_bias)
            for box, direction in zip((block.block, bias), found, strict=True):
                target = view(box, targets) if box is not None else None
                if target is not None and direction is not None:
                    target.copy_(direction)
        for name, member in members.items():
            if targets[name] is not member.gradient:
                member.gradient.copy_(targets[name])

    def _precondition_travellers(self, arriving: Iterator[tuple[Any, ...]], filtered_of: Mapping[int, Tensor]) -> None:
        """Layers in pieces, whose directions are brought back."""
        assert self._refresher is not None and self._assembly is not None
        moving = {member.name for member in self._members if id(member) in filtered_of}

        def target(member: Member) -> Tensor:
            return member.gradient

        for bucket, units in arriving:
            directions: dict[str, Tensor] = {}
            for traveller in bucket.travellers:
                block = self._refresher.blocks.get(traveller.key)
                if block is None or traveller.key not in units or block.roots is None:
                    continue  # a bias comes with its weight
                assert isinstance(block, LayerFactorsBlock)
                bias = block.layer.bias
                if block.block.parameter not in moving and (bias is None or bias.parameter not in moving):
                    continue
                found = self._direction(block, units[traveller.key], units[bias.key] if bias is not None else None)
                directions[traveller.key] = found[0]
                if bias is not None and found[1] is not None:
                    directions[bias.key] = found[1]
            self._assembly.give_back(bucket, directions, target)
        self._assembly.finish(target)

    def _direction(
        self, block: LayerFactorsBlock, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Of a layer; what does not move counts as zero."""
        if weight is None:
            assert bias is not None
            weight = torch.zeros(block.block.shape, dtype=bias.dtype, device=bias.device)
        if bias is None and block.layer.bias is not None:
            bias = torch.zeros(block.layer.bias.shape, dtype=weight.dtype, device=weight.device)
        of_weight, of_bias, product = block.direction(weight, bias)
        if self._counts(block):
            member = self._by_name[block.block.parameter]
            if not member.magnitude > 0 and block.layer.bias is not None:  # its scale is that of an earlier step
                member = self._by_name[block.layer.bias.parameter]
            factor = float(member.group["lr"]) * member.scale
            self._products.append(product.to(torch.float64) * factor**2)
            self._slopes.append(product.to(torch.float64) * factor)
        return of_weight, of_bias

    def _counts(self, block: LayerFactorsBlock) -> bool:
        """Whether this rank adds a layer's product to the sum over all ranks: each is added once."""
        assert self._plan is not None and self._refresher is not None
        table, rank = self._plan.table, self._transport.rank
        if table.shards == 1:
            return True
        everywhere = len(self._refresher.places[block.block.key].homes) == table.ranks
        return rank == 0 if everywhere else table.replica[rank] == 0

    def _clip(self, part: int, members: list[Member]) -> None:
        """Bound ``lr^2 <D, G>``, the square of the step in the metric of the Fisher matrix, by ``kl_clip``.

        ``nu = min(1, sqrt(kl_clip / sum lr^2 <D, G>))`` (Ba, Grosse and Martens 2017, section 5): one reduction, one
        host synchronisation. Where the engine steps in parts the sum is that of the step before.
        """
        options = self.options
        if (options.kl_clip is None and options.adaptive_damping is None) or options.grafting is not None:
            return
        zero = torch.zeros((), dtype=torch.float64)
        total, slope = self._totals([sum(self._products, zero), sum(self._slopes, zero)])
        self._total = total if part == 0 else self._total + total
        if self._parts > 1:
            total = self._last_total if self._last_total is not None else 0.0
            if part == self._parts - 1:
                self._last_total = self._total
        self._clip_factor = 1.0
        if options.kl_clip is not None and total > 0:
            bound = options.kl_clip * options.kl_clip_decay ** (self.steps - 1)
            self._clip_factor = min(1.0, math.sqrt(bound / total))
        for member in members:
            member.scale *= self._clip_factor
        # of the quadratic model: its gradient along the step, and its curvature, which is the damped Fisher matrix's
        self._predicted = -self._clip_factor * slope + 0.5 * self._clip_factor**2 * total

    def _apply(self, members: list[Member]) -> None:
        adaptive = self.options.adaptive_damping
        if adaptive is not None and self.steps % adaptive.interval == 0 and not self._adapt(adaptive, members):
            for member in members:
                member.gradient = torch.empty(0)
            return
        super()._apply(members)

    def _adapt(self, adaptive: AdaptiveDamping, members: list[Member]) -> bool:
        """Compare the loss with its prediction along the preconditioned step alone, without momentum; collective.

        Returns:
            Whether the loss is still finite there; else the step is not taken.
        """
        tried = [member for member in members if member.is_ready and member.graft is None]
        if not tried or self.options.grafting is not None:
            return True
        if self.evaluate is None:
            raise RuntimeError(
                "adaptive_damping needs the loss of the step's batch: set optimizer.evaluate to a function that "
                "returns it (the SecondOrder callback and our strategies do; with Accelerate a model that returns its "
                "own loss is enough, else call lightning_soo.integrations.accelerate.evaluate_with), or leave "
                "adaptive_damping out"
            )
        if self._layout is not None and self._layout.updates_model_later:
            raise TypeError(
                "adaptive_damping: this engine updates the model only after the step (ZeRO), so none can be tried"
            )
        state = RandomState.capture(_computing_device(tried[0].parameter().device))
        before = self._loss(state)
        kept = [member.parameter().clone() for member in tried]
        for member in tried:
            member.parameter().add_(member.gradient, alpha=-float(member.group["lr"]) * member.scale)
        after = self._loss(state)
        for member, values in zip(tried, kept, strict=True):
            member.parameter().copy_(values)
        torch.clear_autocast_cache()
        losses = torch.tensor([before, after], dtype=torch.float64)
        before, after = (self._transport.total(losses, "the losses tried") / self._transport.size).tolist()
        self._damping = adaptive.adapted(self.damping, actual=after - before, predicted=self._predicted)
        if math.isfinite(after) or not math.isfinite(before):
            return True
        self.skipped_steps += 1
        return False

    def _loss(self, state: RandomState) -> float:
        """This rank's loss with the parameters as they are, and the random numbers of ``state``; generators and buffers
        stay as they were."""
        assert self.evaluate is not None
        model = self._model() if self._model is not None else None
        torch.clear_autocast_cache()  # a context around the step would go on with copies of other parameters
        with repeating(state, model.buffers() if model is not None else ()):
            loss = float(self.evaluate())
        if model is not None and self._layout is not None and self._layout.forget_gathered is not None:
            self._layout.forget_gathered(model)  # or the next pass would see parameters as they are now
        return loss


def _computing_device(device: torch.device) -> torch.device:
    """Where losses are computed: a parameter may be offloaded."""
    if device.type == "cpu" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.device("cuda", torch.cuda.current_device())
    return device
