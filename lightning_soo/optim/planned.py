"""Parameters, their names and their plan: what an optimizer knows before and between steps."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_soo.checkpoint.block_store import BlockStore
from lightning_soo.linalg.product_rates import MUCH_FASTER, bfloat16_gain
from lightning_soo.optim.agreed_layout import TrainingRanks, agree_on_layout, group_entries
from lightning_soo.optim.assembly import Assembly
from lightning_soo.optim.members import Member, make_members
from lightning_soo.optim.options import AUTOMATIC, GROUP_OPTIONS, ShampooOptions, refuse_repeated, validate_group
from lightning_soo.optim.refreshing import Refresher, make_schedule
from lightning_soo.placement.adapters import read_layout
from lightning_soo.placement.adapters.names import group_parameters
from lightning_soo.placement.blocks import Block
from lightning_soo.placement.build import build_plan
from lightning_soo.placement.costs import refresh_milliseconds
from lightning_soo.placement.fragments import to_local
from lightning_soo.placement.layers import Layers
from lightning_soo.placement.layout import FragmentTable, Layout
from lightning_soo.placement.overrides import ParameterSpec
from lightning_soo.placement.plan import Plan
from lightning_soo.placement.simulated import simulate
from lightning_soo.placement.table import plan_table
from lightning_soo.placement.uncut import largest_uncut_dim
from lightning_soo.preconditioners.kronecker import KroneckerBlock
from lightning_soo.refresh.background import Background
from lightning_soo.refresh.executors import Executor
from lightning_soo.refresh.workers import Machine, make_executor
from lightning_soo.transport import Transport, agree, entries_of


class PlannedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose parameters are laid out by a plan."""

    options: ShampooOptions
    method = "second-order"
    block_class: type[KroneckerBlock] = KroneckerBlock
    # ids of the parameters given by the user, which engines replace by their own; a weak reference to a parameter would
    # forbid torch to exchange its contents (`Module.to` on DTensors)
    _constructed: set[int]
    _all_groups: list[dict[str, Any]]
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
        self._transport = self._ranks.connect(model, engine, process_group, options.collective_timeout)
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
            plan = self._build_plan(layout, table)
        except Exception as raised:  # reported on every rank before anyone waits for a collective
            error = raised
        agree(self._transport, {"the plan": plan.digest() if plan else ""}, error)
        assert plan is not None
        self._install_plan(plan, layout)
        return plan

    def plan_elsewhere(self, engine: str, ranks: int, *, fast_bfloat16: bool | None = None, **how: Any) -> Plan:
        """The plan that :meth:`attach` would build under another engine and number of ranks. Local.

        The parameters may be on the meta device: only names, shapes and dtypes are looked at.

        Args:
            engine, ranks, how: of :func:`lightning_soo.placement.simulated.simulate`.
            fast_bfloat16: what ``compute_dtype="auto"`` is to find there; None is measured here.

        Raises:
            ValueError: nothing to precondition, an override that matches nothing, ranks that cannot be divided so.
        """
        self._fast_bfloat16 = fast_bfloat16
        layout = self._read_layout()
        found = simulate(engine, layout.specs, ranks=ranks, groups=layout.groups, **how)
        return self._build_plan(replace(layout, specs=found.specs, groups=found.groups), found.table)

    def _read_layout(self) -> Layout:
        model = self._model() if self._model is not None else None
        return read_layout(self._groups(), model, self._constructed)

    def _groups(self) -> list[dict[str, Any]]:
        """All parameter groups, also while an engine shows only one of them during its step."""
        if len(self.param_groups) >= len(self._all_groups):
            self._all_groups = self.param_groups
        return self._all_groups

    def remember(self, model: nn.Module) -> None:
        """Take names and module classes from ``model`` when the plan is built. Local, unlike :meth:`attach`."""
        self._model = weakref.ref(model)

    def _build_plan(self, layout: Layout | None = None, table: FragmentTable | None = None) -> Plan:
        """The plan of all ranks; without a table that of one rank alone."""
        options = self.options
        layout = layout or self._layout or self._read_layout()
        keep = self._plan is not None and table is not None
        previous = {unit.key: unit.place for unit in self._plan.units} if keep and self._plan else None
        for override in options.overrides:
            if override.method not in (self.method, "none", None):
                raise ValueError(
                    f"override {override.match!r}: method={override.method!r} in an optimizer of method "
                    f"{self.method!r}: choose 'none', or leave it out"
                )
        plan = build_plan(
            layout.specs,
            options.block_rules,
            overrides=options.overrides,
            table=table,
            precondition_frequency=options.precondition_frequency.max,
            statistics_frequency=options.statistics_frequency,
            exchange_bucket_bytes=options.exchange_bucket_bytes,
            state_bytes=self._state_bytes,
            layers=self._layers(),
            groups=layout.groups,
            chain=options.chain,
            exchanges=2 if self.block_class.needs_gradient else 1,
            previous=previous,
            refresh_at_home=options.basis == "qr",
        )
        trainable = any(p.spec.requires_grad for p in plan.parameters)
        if trainable and not any(p.is_preconditioned for p in plan.parameters):
            raise ValueError(
                "nothing to precondition; a first-order optimizer would do the same:\n" + self.plan_table(plan)
            )
        return plan

    def _layers(self) -> Layers | None:
        """What has factors, for methods that look at layers (K-FAC)."""
        return None

    def _state_bytes(self, spec: ParameterSpec, block: Block) -> tuple[int, int, int]:
        """Of a block's roots, statistics and moments."""
        size, kind = self.options.statistics_dtype(spec.dtype).itemsize, self.block_class
        roots = sum(math.prod(layout.shape) for layout in kind.root_layouts(block))
        statistics = sum(math.prod(layout.shape) for layout in kind.statistics_layouts(block))
        moments = math.prod(block.shape) * size if kind.needs_gradient else 0
        return roots * self.root_dtype(spec.dtype, block).itemsize, statistics * size, moments

    def root_dtype(self, parameter_dtype: torch.dtype, block: Block) -> torch.dtype:
        """Of a block's roots and products; what ``compute_dtype="auto"`` chooses here. Local once attached."""
        return self.options.root_dtype(parameter_dtype, block, fast_bfloat16=self._has_fast_bfloat16())

    def _has_fast_bfloat16(self) -> bool:
        """Whether ``compute_dtype="auto"`` is bfloat16 here; what all ranks agreed on, once they are connected.

        Parameters on the meta device are planned for accelerators, which all have it.
        """
        if self.options.compute_dtype != AUTOMATIC:
            return False
        if self._fast_bfloat16 is None:
            devices = {to_local(p).device.type for group in self._groups() for p in group["params"]} - {"meta"}
            slow = any(bfloat16_gain(device) < MUCH_FASTER for device in devices)
            agreed = self._transport.largest(torch.tensor([float(slow)]), "the rates of products")
            self._fast_bfloat16 = not agreed.item()
        return self._fast_bfloat16

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
        background = self._make_background(plan, blocks) if self._refresher is None else self._refresher.background
        refresher = Refresher(
            plan=plan,
            blocks=blocks,
            schedule=make_schedule(self.options, plan),
            background=background,
            transport=transport,
            max_failures=self.options.workers.max_failures,
            ridge=self.options.ridge,
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
        self._signature = self._current_signature()
        self._store.install(members, refresher)

    def _prepare_members(self, plan: Plan, layout: Layout, members: list[Member]) -> None:
        """For methods that keep more than blocks."""

    def _make_background(self, plan: Plan, blocks: Mapping[str, KroneckerBlock]) -> Background:
        options, transport = self.options, self._transport
        on_cpu = any(block.device.type == "cpu" for block in blocks.values())
        ranks = transport.ranks_on_this_machine()
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

        return Background(make)

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
        """The plan in words: what is preconditioned, by whom, at what cost, and why the rest is not."""
        plan = plan or self._plan or self._build_plan()
        engine = self._layout.engine if self._layout is not None else "dense"
        if engine == "dense":
            engine = "ddp" if plan.ranks > 1 else "single"
        table = plan_table(plan, engine=engine, method=self.method, graft=self.options.fallback or "sgd")
        if plan.exchange_bytes:
            table += f"\n{self.without_traffic(plan)}"
        if not plan.units:
            return table
        if self._refresher is not None and plan is self._plan:
            _ = self._refresher.executor  # so that the reason is known
        table += f"\nroots: {self._executor_reason or self.options.workers.kind}"
        if self._has_fast_bfloat16() and plan is self._plan:
            narrow = sum(dtype == torch.bfloat16 for dtype in self.compute_dtypes().values())
            table += f"\nproducts with them: bfloat16 in {narrow} of {len(plan.units)} blocks (compute_dtype='auto')"
        return table

    def without_traffic(self, plan: Plan) -> str:
        """In words the largest block size with which nothing but small reductions would travel in every step."""
        options = self.options
        specs = [parameter.spec for parameter in plan.parameters]
        size = largest_uncut_dim(specs, options.block_rules, options.overrides, plan.table)
        if size is not None:
            return f"with max_preconditioner_dim={size} no gradient would travel"
        return "no smaller max_preconditioner_dim down to 16 would keep all gradients where they are"

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
        validate_group({**self.defaults, **param_group}, f"parameter group {len(self.param_groups)}")
        super().add_param_group(param_group)
        refuse_repeated(self.param_groups)
        self._constructed |= {id(parameter) for parameter in self.param_groups[-1]["params"]}
