"""The plan that parameters would get: read from them and the options, whether anyone trains or not."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_soo.linalg.product_rates import MUCH_FASTER, bfloat16_gain
from lightning_soo.optim.options import AUTOMATIC, ShampooOptions
from lightning_soo.placement.adapters import read_layout
from lightning_soo.placement.blocks import Block
from lightning_soo.placement.build import build_plan
from lightning_soo.placement.fragments import to_local
from lightning_soo.placement.layers import Layers
from lightning_soo.placement.layout import FragmentTable, Layout
from lightning_soo.placement.overrides import ParameterSpec
from lightning_soo.placement.plan import Plan
from lightning_soo.placement.simulated import simulate
from lightning_soo.placement.table import plan_table
from lightning_soo.placement.uncut import largest_uncut_dim
from lightning_soo.preconditioners.kronecker import KroneckerBlock
from lightning_soo.transport import Transport


class PlannableOptimizer(torch.optim.Optimizer):
    """A torch optimizer that knows how its parameters would be divided, under this engine or another.

    Nothing here changes state but what is remembered of the model and of measured rates.
    """

    options: ShampooOptions
    method = "second-order"
    block_class: type[KroneckerBlock] = KroneckerBlock
    # ids of the parameters given by the user, which engines replace by their own; a weak reference to a parameter would
    # forbid torch to exchange its contents (`Module.to` on DTensors)
    _constructed: set[int]
    _all_groups: list[dict[str, Any]]
    _model: weakref.ref[nn.Module] | None
    _transport: Transport
    _layout: Layout | None
    _plan: Plan | None
    _fast_bfloat16: bool | None  # None: not measured yet

    def plan_elsewhere(self, engine: str, ranks: int, *, fast_bfloat16: bool | None = None, **how: Any) -> Plan:
        """The plan that :meth:`attach` would build under another engine and number of ranks. Local.

        The parameters may be on the meta device: only names, shapes and dtypes are looked at.

        Args:
            engine, ranks, how: of :func:`lightning_soo.placement.simulated.simulate`.
            fast_bfloat16: what ``compute_dtype="auto"`` is to find there; None is measured here.

        Raises:
            ValueError: nothing to precondition, an override that matches nothing, ranks that cannot be divided so.
        """
        layout = self._read_layout()
        found = simulate(engine, layout.specs, ranks=ranks, groups=layout.groups, **how)
        # what the ranks of a plan in use have agreed on is not asked again, and stays
        agreed, in_use = self._fast_bfloat16, self._plan is not None
        self._fast_bfloat16 = agreed if in_use and fast_bfloat16 is None else fast_bfloat16
        try:
            return self._build_plan(replace(layout, specs=found.specs, groups=found.groups), found.table)
        finally:
            if in_use:
                self._fast_bfloat16 = agreed

    @property
    def watches_signal(self) -> bool:
        """Whether the exponents of roots depend on the gradients."""
        options = self.options
        return self.block_class.has_exponent and options.chain is None and options.exponent_override is None

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

    def _build_plan(
        self, layout: Layout | None = None, table: FragmentTable | None = None, *, keeps_places: bool = False
    ) -> Plan:
        """The plan of all ranks; without a table that of one rank alone.

        Args:
            keeps_places: blocks of the plan in use stay on their ranks.
        """
        options = self.options
        layout = layout or self._layout or self._read_layout()
        previous = {unit.key: unit.place for unit in self._plan.units} if keeps_places and self._plan else None
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

    def plan_table(self, plan: Plan | None = None) -> str:
        """The plan in words: what is preconditioned, by whom, at what cost, and why the rest is not."""
        plan = plan or self._plan or self._build_plan()
        engine = self._layout.engine if self._layout is not None else "dense"
        if engine == "dense":
            engine = "ddp" if plan.ranks > 1 else "single"
        return self.table_of(plan, engine)

    def table_of(self, plan: Plan, engine: str) -> str:
        """Args: engine: what the table calls it."""
        options = self.options
        table = plan_table(
            plan,
            engine=engine,
            method=self.method,
            graft=options.fallback or "sgd",
            has_diagonal_rows=options.has_diagonal_rows,
        )
        return f"{table}\n{self.without_traffic(plan)}" if plan.exchange_bytes else table

    def without_traffic(self, plan: Plan) -> str:
        """In words the largest block size with which nothing but small reductions would travel in every step."""
        options = self.options
        specs = [parameter.spec for parameter in plan.parameters]
        size = largest_uncut_dim(specs, options.block_rules, options.overrides, plan.table)
        if size is not None:
            return f"with max_preconditioner_dim={size} no gradient would travel"
        return "no smaller max_preconditioner_dim down to 16 would keep all gradients where they are"
