"""Parameters, their names and their plan: what an optimizer knows before and between steps."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_soo.checkpoint.block_store import BlockStore
from lightning_soo.optim import grafting
from lightning_soo.optim.options import GROUP_OPTIONS, ShampooOptions, validate_group
from lightning_soo.optim.refreshing import Refresher
from lightning_soo.placement.adapters import dense
from lightning_soo.placement.costs import refresh_milliseconds
from lightning_soo.placement.fragments import canonical_name
from lightning_soo.placement.plan import Plan, PlannedParameter, build_plan
from lightning_soo.placement.table import plan_table
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics
from lightning_soo.refresh.schedule import RefreshSchedule, stagger_offsets
from lightning_soo.refresh.workers import Machine, make_executor
from lightning_soo.transport import Transport, agree


@dataclass(eq=False)
class Member:
    """One parameter during a step.

    Attributes:
        gradient: laid out like the moments; the direction overwrites it.
        scale: what the direction is multiplied by when it is applied.
    """

    parameter: Tensor
    group: dict[str, Any]
    planned: PlannedParameter
    blocks: list[KroneckerBlock]
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    magnitude: float = 0.0
    scale: float = 1.0

    @property
    def is_ready(self) -> bool:
        """Whether all roots are in; before, the graft moves the whole parameter."""
        return bool(self.blocks) and all(block.roots is not None for block in self.blocks)


class PlannedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose parameters are laid out by a plan."""

    options: ShampooOptions
    method = "second-order"
    data_workers = 0  # data loading processes of this rank, which front doors know: their cores are not spare

    def __init__(self, params: Any, defaults: dict[str, Any], options: ShampooOptions) -> None:
        model = params if isinstance(params, nn.Module) else None
        self.options = options
        self._reset_runtime()
        super().__init__(list(model.named_parameters()) if model is not None else params, defaults)
        if model is not None:
            self.remember(model)

    def _reset_runtime(self) -> None:
        """What a copy or a pickle does not carry: process groups, threads, the plan built from them."""
        self._model: weakref.ref[nn.Module] | None = None
        self._engine: str | None = None
        self._process_group: dist.ProcessGroup | None = None
        self._transport = Transport(enabled=False)
        self._plan: Plan | None = None
        self._members: list[Member] = []
        self._signature: tuple[object, ...] = ()
        self._refresher: Refresher | None = None
        self._executor_reason = ""
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._store = BlockStore()
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

        Args:
            model: for canonical names and for telling embeddings; wrapped or not.
            engine: ``"ddp"`` (replicas over ``process_group``), ``"single"`` (this process alone, whatever is
                initialised), or None: replicas where ``torch.distributed`` is initialised.
            process_group: the replicas; None is the model's (DDP) or the default group.

        Raises:
            AgreementError: ranks differ in options, parameters or plan.
            ValueError: nothing to precondition, an override that matches nothing.
            TypeError: a parameter no engine here can handle.
        """
        if engine not in (None, "ddp", "single"):
            raise ValueError(f"engine={engine!r}: choose 'ddp' or 'single'")
        if model is not None:
            self.remember(model)
            process_group = process_group or getattr(model, "process_group", None)
        self._engine = engine or self._engine
        self._process_group = process_group or self._process_group
        self._transport = Transport(self._process_group, enabled=self._engine != "single")
        error: Exception | None = None
        plan = None
        try:
            plan = self._build_plan()
        except Exception as raised:  # reported on every rank before anyone waits for a collective
            error = raised
        sections = {
            "the configuration": repr(self.options),
            "the list of parameters": str([(p.name, p.spec.shape) for p in plan.parameters]) if plan else "",
            "which parameters are frozen": str([p.spec.requires_grad for p in plan.parameters]) if plan else "",
            "the plan": plan.digest() if plan else "",
        }
        agree(self._transport, sections, error)
        assert plan is not None
        self._install_plan(plan)
        return plan

    def remember(self, model: nn.Module) -> None:
        """Take names and module classes from ``model`` when the plan is built. Local, unlike :meth:`attach`."""
        self._model = weakref.ref(model)

    def _build_plan(self, ranks: int | None = None) -> Plan:
        options = self.options
        model = self._model() if self._model is not None else None
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        names = {id(parameter): name for parameter, name in zip(parameters, self.parameter_names(), strict=True)}
        fragments = dense.list_fragments(names, parameters)
        plan = build_plan(
            dense.parameter_specs(fragments, dense.module_classes(model)),
            options.block_rules,
            overrides=options.overrides,
            ranks=self._transport.size if ranks is None else ranks,
            precondition_frequency=options.precondition_frequency.max,
            statistics_frequency=options.statistics_frequency,
            previous={unit.key: unit.refresher for unit in self._plan.units} if self._plan and ranks is None else None,
        )
        trainable = any(p.spec.requires_grad for p in plan.parameters)
        if trainable and not plan.units:
            raise ValueError(
                "nothing to precondition; a first-order optimizer would do the same:\n" + self.plan_table(plan)
            )
        return plan

    def _install_plan(self, plan: Plan) -> None:
        options, transport = self.options, self._transport
        old = {block.block.key: block for member in self._members for block in member.blocks}
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        members, blocks, devices = [], {}, {}
        for (parameter, group), planned in zip(parameters, plan.parameters, strict=True):
            own = []
            for unit in planned.units:
                block = old.get(unit.key) or KroneckerBlock(
                    block=unit.block,
                    exponent=options.exponent_override or 2.0 * len(unit.block.dims),
                    compute_dtype=options.root_dtype(parameter.dtype),
                )
                if unit.refresher == transport.rank and block.statistics is None:
                    block.statistics = KroneckerStatistics.zeros(
                        unit.block, dtype=options.statistics_dtype(parameter.dtype), device=parameter.device
                    )
                own.append(block)
                blocks[unit.key], devices[unit.key] = block, parameter.device
            members.append(Member(parameter, group, planned, own))
            if planned.spec.requires_grad:
                grafting.initialise(self.state[parameter], parameter, options.grafting, group)
        mine = [unit.block for unit in plan.units if unit.refresher == transport.rank]
        if self._refresher is None:
            on_cpu = any(parameter.device.type == "cpu" for parameter, _ in parameters)
            machine = Machine(
                ranks=transport.ranks_on_this_machine(),
                trainer_cores=torch.get_num_threads() if on_cpu else 1,
                data_workers=self.data_workers,
            )
            executor, self._executor_reason = make_executor(
                options.workers,
                machine,
                refresh_milliseconds=sum(map(refresh_milliseconds, mine)),
                refresh_delay=options.refresh_delay,
            )
        else:
            executor = self._refresher.executor
        schedule = RefreshSchedule(
            interval=options.precondition_frequency,
            delay=options.refresh_delay,
            start=options.start,
            gather=options.gather_frequency or 1,
            statistics=options.statistics_frequency,
            offsets=stagger_offsets([unit.block for unit in plan.units], options.precondition_frequency.max)
            if options.stagger
            else {},
        )
        refresher = Refresher(
            plan=plan,
            blocks=blocks,
            schedule=schedule,
            executor=executor,
            transport=transport,
            device_of=devices.__getitem__,
            max_failures=options.workers.max_failures,
        )
        if self._refresher is not None:
            self._refresher.hand_over(refresher)
        self._plan, self._members, self._refresher = plan, members, refresher
        self._signature = self._current_signature()
        self._store.install(blocks, refresher)

    def _current_signature(self) -> tuple[object, ...]:
        """Changes when parameters are added, replaced, frozen or unfrozen: then the plan is built anew."""
        return tuple((id(p), p.requires_grad) for group in self.param_groups for p in group["params"])

    def parameter_names(self) -> list[str]:
        """Canonical name of every parameter in order; ``group0.3`` where no name was ever given."""
        known = dense.model_names(self._model() if self._model is not None else None)
        names = []
        for number, group in enumerate(self.param_groups):
            given = group.get("param_names")
            for index, parameter in enumerate(group["params"]):
                name = known.get(id(parameter)) or (canonical_name(given[index]) if given else None)
                names.append(name or f"group{number}.{index}")
        return names

    def plan_table(self, plan: Plan | None = None) -> str:
        """The plan in words: what is preconditioned, by whom, at what cost, and why the rest is not."""
        plan = plan or self._plan or self._build_plan(ranks=1)
        dtype = self.param_groups[0]["params"][0].dtype if self.param_groups[0]["params"] else torch.float32
        table = plan_table(
            plan,
            engine="ddp" if plan.ranks > 1 else "single",
            method=self.method,
            graft=self.options.grafting or "sgd",
            root_bytes=self.options.root_dtype(dtype).itemsize,
            statistics_bytes=self.options.statistics_dtype(dtype).itemsize,
        )
        return f"{table}\nroots: {self._executor_reason or self.options.workers.kind}"

    def close(self) -> None:
        """Stop background work. What was in flight is finished first, so the trajectory does not change."""
        if self._refresher is not None:
            self._refresher.drain()
            self._refresher.executor.close()

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
