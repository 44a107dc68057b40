"""Parameters, their names and their plan: what an optimizer knows before and between steps."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_soo.checkpoint.block_store import BlockStore
from lightning_soo.optim.agreed_layout import TrainingRanks, agree_on_layout, group_entries
from lightning_soo.optim.assembly import Assembly
from lightning_soo.optim.members import Member, make_members
from lightning_soo.optim.options import GROUP_OPTIONS, ShampooOptions, refuse_plain_sum, refuse_repeated, validate_group
from lightning_soo.optim.plannable import PlannableOptimizer
from lightning_soo.optim.refreshing import Refresher, make_schedule
from lightning_soo.optim.stacking import Stacks
from lightning_soo.placement.adapters.names import group_parameters
from lightning_soo.placement.costs import refresh_milliseconds
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.plan import Plan
from lightning_soo.preconditioners.kronecker import KroneckerBlock
from lightning_soo.refresh.background import Background
from lightning_soo.refresh.executors import Executor
from lightning_soo.refresh.workers import Machine, make_executor
from lightning_soo.transport import Transport, agree, entries_of


class PlannedOptimizer(PlannableOptimizer):
    """A torch optimizer whose parameters are laid out by a plan."""

    data_workers = 0  # data loading processes of this rank, which front doors know: their cores are not spare

    def __init__(self, params: Any, defaults: dict[str, Any], options: ShampooOptions) -> None:
        model = params if isinstance(params, nn.Module) else None
        self.options = options
        self._reset_runtime()
        super().__init__(list(model.named_parameters()) if model is not None else params, defaults)
        self._all_groups = self.param_groups
        if model is not None:
            self.remember(model)

    def _reset_runtime(self) -> None:
        """What a copy or a pickle does not carry: process groups, threads, the plan built from them."""
        self._model: weakref.ref[nn.Module] | None = None
        self._constructed = set()
        self._ranks = TrainingRanks()
        self._transport = Transport(enabled=False)
        self._layout: Layout | None = None
        self._plan: Plan | None = None
        self._members: list[Member] = []
        self._assembly: Assembly | None = None
        self._stacks = Stacks()
        self._signature: tuple[object, ...] = ()
        self._refresher: Refresher | None = None
        self._executor_reason = ""
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._store = BlockStore()
        self._all_groups = []
        self._fast_bfloat16: bool | None = None  # not measured yet
        self._awaits_blocks = False  # moments were loaded, preconditioners not yet
        self._has_loaded_blocks = False  # since the last step
        self.steps = 0
        self.skipped_steps = 0

    def attach(
        self,
        model: nn.Module | None = None,
        engine: str | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> Plan:
        """Build the plan for the parameters as they are now. Collective: every rank calls it.

        Front doors call it after wrapping; without it the first step does. Called again by itself after
        ``add_param_group`` and after parameters were frozen or unfrozen; blocks that exist keep their state and rank.
        How parameters are sharded is read from them and from ``model``.

        Args:
            model: the model as the engine has wrapped it (DDP, FSDP1, what ``deepspeed.initialize`` returned), or as
                it is (FSDP2, one device). FSDP1 is only recognised by its wrapper.
            engine: ``"single"`` is this process alone, whatever is initialised; None is all ranks of
                ``process_group``.
            process_group: all ranks that train this model; None is the model's (DDP) or the default group.

        Raises:
            AgreementError: ranks differ in options, parameters or plan, or one of them failed.
            ValueError: nothing to precondition, an override that matches nothing.
            TypeError: a parameter or a feature that no engine here can handle.
        """
        if model is not None:
            self.remember(model)
        options = self.options
        every = (parameter for group in self.param_groups for parameter in group["params"])
        device = next((parameter.device for parameter in every if parameter.device.type != "cpu"), None)
        self._transport = self._ranks.connect(model, engine, process_group, options.collective_timeout, device)
        layout, table = agree_on_layout(
            self._transport,
            self._read_layout,
            [f"method={self.method!r}", *entries_of(options), *group_entries(self._groups(), GROUP_OPTIONS)],
            timeout=options.collective_timeout,
            deadline=options.workers.deadline if options.workers.kind != "inline" else None,
        )
        self._fast_bfloat16 = None  # the ranks may have changed
        self._has_fast_bfloat16()
        plan, error = None, None
        try:
            plan = self._build_plan(layout, table, keeps_places=True)
        except Exception as raised:  # reported on every rank before anyone waits for a collective
            error = raised
        agree(self._transport, {"the plan": plan.digest() if plan else ""}, error)
        assert plan is not None
        self._install_plan(plan, layout)
        return plan

    def _install_plan(self, plan: Plan, layout: Layout) -> None:
        transport = self._transport
        members = make_members(
            plan,
            layout,
            self._groups(),
            self.state,
            self.options,
            rank=transport.rank,
            previous=self._members,
            block_class=self.block_class,
            fast_bfloat16=self._has_fast_bfloat16(),
        )
        self._prepare_members(plan, layout, members)
        blocks = {block.block.key: block for member in members for block in member.blocks}
        background = self._make_background(plan, blocks)
        refresher = Refresher(
            plan=plan,
            blocks=blocks,
            schedule=make_schedule(self.options, plan),
            background=background,
            transport=transport,
            max_failures=self.options.workers.max_failures,
            ridge=self.options.ridge,
            limit=self.options.limit,
        )
        if self._refresher is not None:
            self._refresher.hand_over(refresher)
        copy = plan.table.copy_of(transport.rank)
        in_copy = transport
        if len(copy) < transport.size:
            in_copy = transport.over(layout.shard_group, enabled=len(copy) > 1)
        layout = replace(layout, shard_group=None)  # held by the transport, or nobody
        self._plan, self._layout, self._members, self._refresher = plan, layout, members, refresher
        self._assembly = Assembly(plan, members, in_copy)
        self._stacks = Stacks(members if self.block_class.stackable else ())
        self._signature = self._current_signature()
        self._store.install(members, refresher)

    def _prepare_members(self, plan: Plan, layout: Layout, members: list[Member]) -> None:
        """For methods that keep more than blocks."""

    def _make_background(self, plan: Plan, blocks: Mapping[str, KroneckerBlock]) -> Background:
        """Workers for the plan's refreshes; those that there are stay where they would be chosen again."""
        options, transport = self.options, self._transport
        on_cpu = any(block.device.type == "cpu" for block in blocks.values())
        ranks = transport.ranks_on_these_cores()
        mine = [unit.block for unit in plan.units if unit.refresher == transport.rank]

        def make() -> Executor:
            executor, self._executor_reason = make_executor(
                options.workers.within(transport.timeout),
                Machine(
                    ranks=ranks, trainer_cores=torch.get_num_threads() if on_cpu else 1, data_workers=self.data_workers
                ),
                refresh_milliseconds=sum(map(refresh_milliseconds, mine)),
                refresh_delay=options.refresh_delay,
            )
            return executor

        if self._refresher is None:
            return Background(make)
        self._refresher.drain()  # whose results have come no worker is needed for
        self._refresher.background.choose_again(make)
        return self._refresher.background

    def _current_signature(self) -> tuple[object, ...]:
        """Changes when parameters are added, replaced, frozen or unfrozen: then the plan is built anew."""
        if self._layout is not None and self._layout.part_of:
            return ("parts",)  # the engine shows one part at a time, and never changes them
        return tuple((id(p), p.requires_grad) for group in self.param_groups for p in group["params"])

    @property
    def is_sharded(self) -> bool:
        """Whether an engine holds pieces of parameters, and saves the moments itself. Local."""
        return (self._layout or self._read_layout()).engine != "dense"

    def parameter_names(self) -> list[str]:
        """Canonical name of every parameter in order; ``group0.3`` where no name was ever given."""
        if self._layout is not None and self._signature == self._current_signature():
            return [spec.name for spec in self._layout.specs]
        model = self._model() if self._model is not None else None
        return [name for _, _, name in group_parameters(self._groups(), model)]

    def plan_table(self, plan: Plan | None = None) -> str:
        plan = plan or self._plan or self._build_plan()
        table = super().plan_table(plan)
        if not plan.units:
            return table
        if self._refresher is not None and plan is self._plan:
            _ = self._refresher.executor  # so that the reason is known
        table += f"\nroots: {self._executor_reason or self.options.workers.kind}"
        if self._has_fast_bfloat16() and plan is self._plan:
            narrow = sum(dtype == torch.bfloat16 for dtype in self.compute_dtypes().values())
            table += f"\nproducts with them: bfloat16 in {narrow} of {len(plan.units)} blocks (compute_dtype='auto')"
        return table

    def state_bytes(self) -> int:
        """Bytes of preconditioner state on this rank: what ``plan.state_bytes[rank]`` predicts."""
        return sum(block.state_bytes for member in self._members for block in member.blocks)

    def compute_dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every block's roots and products, by block; what ``compute_dtype="auto"`` has chosen."""
        return {block.block.key: block.compute_dtype for member in self._members for block in member.blocks}

    def close(self) -> None:
        """Stop background work. What was in flight is finished first, so the trajectory does not change."""
        if self._refresher is not None:
            self._refresher.close()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the plan is extended at the next step. Structural options belong to ``overrides``."""
        fixed = [name for name in param_group if name in ShampooOptions.__dataclass_fields__]
        if fixed:
            raise ValueError(
                f"parameter group {len(self.param_groups)}: {fixed[0]!r} holds for the whole optimizer; a group may "
                f"set {', '.join(GROUP_OPTIONS)}, and overrides=[...] changes block options by parameter name"
            )
        group, where = {**self.defaults, **param_group}, f"parameter group {len(self.param_groups)}"
        validate_group(group, where)
        refuse_plain_sum(self.options, group, where)
        super().add_param_group(param_group)
        refuse_repeated(self.param_groups)
        self._constructed |= {id(parameter) for parameter in self.param_groups[-1]["params"]}
