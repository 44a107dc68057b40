"""One parameter during a step, and the pieces of it that this rank works on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_soo.optim import grafting
from lightning_soo.optim.options import ShampooOptions
from lightning_soo.placement.boxes import Box, flat_span, pieces, slices, strides
from lightning_soo.placement.fragments import Fragment, to_local
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.overrides import ParameterSpec
from lightning_soo.placement.plan import Plan, PlannedParameter, Unit
from lightning_soo.preconditioners.diagonal_rows import DiagonalRows
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics

if TYPE_CHECKING:
    from lightning_soo.optim.runs import Run


@dataclass(eq=False)
class Member:
    """One parameter on one rank; the same list on every rank.

    Attributes:
        fragment: what this rank holds of it; may be nothing.
        blocks: all of its blocks, wherever they live.
        whole_blocks: those preconditioned here that lie completely in the fragment.
        joined: blocks of other parameters that it is preconditioned with.
        run: of a parameter with chains (SONew).
        rows: of a parameter whose rows have a diagonal preconditioner.
        graft: whose step size it has, or moves it alone; None where the direction has its own.
        counts: whether this rank adds its elements to sums over all ranks (each element is added once).
        counter: steps of the graft where several parameters share one optimizer tensor, whose state has room for one.
        gradient: laid out like the moments; the direction overwrites it.
        magnitude: largest absolute element of the whole gradient.
        scale: what the direction is multiplied by when it is applied.
    """

    fragment: Fragment
    group: dict[str, Any]
    group_number: int
    planned: PlannedParameter
    blocks: list[KroneckerBlock]
    whole_blocks: list[KroneckerBlock]
    graft: str | None
    joined: list[KroneckerBlock] = field(default_factory=list)
    run: Run | None = None
    rows: DiagonalRows | None = None
    counts: bool = True
    counter: Tensor | None = None
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    magnitude: float = 0.0
    scale: float = 1.0

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def tensor(self) -> Tensor:
        """What the optimizer's state is kept for."""
        return self.fragment.tensor

    @property
    def is_empty(self) -> bool:
        return self.fragment.stop == self.fragment.start

    @property
    def is_ready(self) -> bool:
        """Whether all roots are in, wherever they live; before, the graft moves the whole parameter."""
        needed = (*self.blocks, *self.joined)
        return bool(needed) and all(block.ready for block in needed)

    @property
    def watches_signal(self) -> bool:
        """Whether the exponent of its roots depends on its gradients."""
        return any(block.watches_signal for block in self.blocks)

    @property
    def merged_shape(self) -> tuple[int, ...]:
        if not self.blocks and self.joined:
            bias = getattr(self.joined[0].block, "bias")  # noqa: B009
            return tuple(bias.merged_shape)
        return self.blocks[0].block.merged_shape

    def weights(self, interval: int = 1) -> tuple[float, float]:
        """Decay of the statistics over ``interval`` steps, and the weight of a new gradient.

        ``betas[1]`` is the decay of one step, whatever the interval; at 1 the statistics are a plain sum.
        """
        decay = float(self.group["betas"][1]) ** interval
        return decay, 1.0 - decay if decay < 1.0 else 1.0

    def parameter(self) -> Tensor:
        """The local elements of the parameter."""
        return self.fragment.local(self.tensor)

    def local_gradient(self) -> Tensor | None:
        """The local elements of the gradient, as the engine left it; None where it is missing."""
        return None if self.tensor.grad is None else self.fragment.local(self.tensor.grad)

    def local_state(self, state: dict[str, Any]) -> grafting.State:
        """Views of this parameter's moments in the optimizer's state of its tensor."""
        local = {name: self.fragment.local(state[name]) for name in grafting.MOMENTS if name in state}
        local["step"] = state["step"] if self.counter is None else self.counter
        return local

    def local_pieces(self, block: KroneckerBlock) -> list[Box]:
        """The boxes of ``block`` that lie in the fragment."""
        if self.fragment.is_whole:
            return [block.block.ranges]
        return pieces(self.merged_shape, block.block.ranges, self.fragment.start, self.fragment.stop)

    def view(self, local: Tensor, box: Box) -> Tensor:
        """The elements of ``box`` in a contiguous local tensor, as a view of the box's shape.

        Args:
            box: in coordinates of the merged shape; inside the fragment.
        """
        if self.fragment.is_whole:
            return local.view(self.merged_shape)[slices(box)]
        first, _ = flat_span(self.merged_shape, box)
        return local.as_strided(
            [stop - start for start, stop in box],
            strides(self.merged_shape),
            local.storage_offset() + first - self.fragment.start,
        )


def make_members(
    plan: Plan,
    layout: Layout,
    groups: Sequence[dict[str, Any]],
    states: MutableMapping[Tensor, grafting.State],
    options: ShampooOptions,
    *,
    rank: int,
    previous: Sequence[Member],
    block_class: type[KroneckerBlock] = KroneckerBlock,
    fast_bfloat16: bool = False,
) -> list[Member]:
    """The members of a plan on one rank; blocks and counters of an earlier plan go on.

    Args:
        groups: parameter groups, as ``layout`` numbers them.
        states: the optimizer's state; what the graft needs is created in it now, so that every engine saves it.
        fast_bfloat16: see :meth:`ShampooOptions.root_dtype`.
    """
    old = {block.block.key: block for member in previous for block in member.blocks}
    counters = {member.name: member.counter for member in previous if member.counter is not None}
    sharing = Counter(id(fragment.tensor) for fragment in layout.fragments)

    def kept_or_new(unit: Unit, fragment: Fragment, spec: ParameterSpec) -> KroneckerBlock:
        kept = old.get(unit.key)
        if kept is not None and kept.block == unit.block:  # a module's class may have changed what is preconditioned
            return kept
        return _new_block(block_class, unit, fragment, spec, options, fast_bfloat16)

    members = []
    for index, (fragment, planned) in enumerate(zip(layout.fragments, plan.parameters, strict=True)):
        blocks = [kept_or_new(unit, fragment, planned.spec) for unit in planned.units]
        for unit, block in zip(planned.units, blocks, strict=True):
            if unit.place.keeper == rank and block.statistics is None:
                block.statistics = KroneckerStatistics.zeros(
                    block_class.statistics_layouts(unit.block), dtype=block.statistics_dtype, device=block.device
                )
        here = [rank in unit.homes and not unit.place.travels for unit in planned.units]
        group = groups[layout.groups[index]]
        graft = options.grafting if planned.is_preconditioned else options.fallback
        if planned.spec.requires_grad:
            grafting.initialise(states[fragment.tensor], fragment.tensor, graft, group)
        member = Member(
            fragment=fragment,
            group=group,
            group_number=layout.groups[index],
            planned=planned,
            blocks=blocks,
            whole_blocks=[block for block, is_here in zip(blocks, here, strict=True) if is_here],
            graft=graft,
            counts=plan.table.counts(rank, index, math.prod(fragment.shape)),
        )
        if blocks and blocks[0].has_diagonal_rows:
            columns = math.prod(member.merged_shape[1:])
            member.rows = DiagonalRows.of(fragment, columns, plan.table.cut_rows(index, columns))
        if sharing[id(fragment.tensor)] > 1:
            step = states[fragment.tensor].get("step", torch.tensor(0.0))
            member.counter = counters.get(member.name, step.clone())
        members.append(member)
    made = {block.block.key: block for member in members for block in member.blocks}
    for member in members:
        member.joined = [made[key] for key in member.planned.joined]
    return members


def _new_block(
    block_class: type[KroneckerBlock],
    unit: Unit,
    fragment: Fragment,
    spec: ParameterSpec,
    options: ShampooOptions,
    fast_bfloat16: bool,
) -> KroneckerBlock:
    return block_class(
        block=unit.block,
        exponent=options.exponent(unit.block),
        has_diagonal_rows=options.has_diagonal_rows(unit.block),
        compute_dtype=options.root_dtype(spec.dtype, unit.block, fast_bfloat16=fast_bfloat16),
        statistics_dtype=options.statistics_dtype(spec.dtype),
        device=to_local(fragment.tensor).device,
    )
