"""An optimizer that computes with whole parameters of any engine: layout, vectors, and the context of a step."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_soo.optim.objective import Objective, computing
from lightning_soo.optim.trust_region_options import TrustRegionOptions
from lightning_soo.optim.vectors import VectorSpace
from lightning_soo.placement.adapters import read_layout
from lightning_soo.placement.adapters.names import group_parameters
from lightning_soo.placement.layout import FragmentTable, Layout
from lightning_soo.transport import Transport, agree, entries_of


class GatheredOptimizer(torch.optim.Optimizer):
    """A torch optimizer that evaluates its loss itself, with all parameters whole while a step lasts."""

    options: TrustRegionOptions
    _model: weakref.ref[nn.Module] | None
    _space: VectorSpace | None

    def __init__(self, params: Any, defaults: dict[str, Any], options: TrustRegionOptions) -> None:
        model = params if isinstance(params, nn.Module) else None
        self.options = options
        self._reset_runtime()
        super().__init__(list(model.named_parameters()) if model is not None else params, defaults)
        if model is not None:
            self._model = weakref.ref(model)

    def _reset_runtime(self) -> None:
        """What a copy or a pickle does not carry."""
        self._model = None
        self._engine: str | None = None
        self._process_group: dist.ProcessGroup | None = None
        self._transport = Transport(enabled=False)
        self._layout: Layout | None = None
        self._space = None
        self._signature: tuple[object, ...] = ()
        self._stack: ExitStack | None = None
        self._objective: Objective | None = None
        self._before = torch.empty(0)  # local vector of the parameters when the step began

    def attach(
        self,
        model: nn.Module | None = None,
        engine: str | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Read how parameters are sharded, as they are now. Collective: every rank calls it.

        Front doors call it after wrapping; without it the first step does. Called again by itself after parameters were
        added, frozen or unfrozen.

        Args:
            model: as the engine has wrapped it (DDP, FSDP1), or as it is (FSDP2, one device). FSDP1 is only recognised
                by its wrapper, FSDP2 gathers parameters by its modules, and buffers (BatchNorm) are only known from it.
            engine: ``"single"`` is this process alone, whatever is initialised.
            process_group: all ranks that train this model; None is the model's (DDP) or the default group.

        Raises:
            AgreementError: ranks differ in options or parameters, or one of them failed.
            TypeError: an engine under which there is no second derivative, by name (DeepSpeed's ZeRO), or parameters in
                half precision.
        """
        if engine not in (None, "single", "ddp"):
            raise ValueError(f"engine={engine!r}: choose 'single', or None to read it from the parameters")
        if model is not None:
            self._model = weakref.ref(model)
            if process_group is None and isinstance(model, nn.parallel.DistributedDataParallel):
                process_group = model.process_group
        if process_group is not None and process_group is dist.group.WORLD:
            process_group = None  # a reference would keep it alive beyond destroy_process_group
        self._engine = engine or self._engine
        self._process_group = process_group or self._process_group
        self._transport = transport = Transport(self._process_group, enabled=self._engine != "single")
        layout: Layout | None = None
        error: Exception | None = None
        try:
            layout = read_layout(self.param_groups, self._model() if self._model is not None else None)
            if layout.gathered is None:
                raise TypeError(
                    f"{type(self).__name__} cannot train under DeepSpeed's {layout.engine}: its engine gives no second "
                    "derivative. Use DDP, FSDP1, FSDP2 or HSDP"
                )
        except Exception as raised:  # reported on every rank before anyone waits for a collective
            error = raised
        specs = layout.specs if layout is not None else ()
        sections = {
            "the configuration": entries_of(self.options),
            "the engine": layout.engine if layout is not None else "",
            "the list of parameters": [
                f"parameter {spec.name!r} of shape {spec.shape}, {spec.dtype}" for spec in specs
            ],
            "which parameters are frozen": [
                f"parameter {spec.name!r} with requires_grad={spec.requires_grad}" for spec in specs
            ],
        }
        agree(transport, sections, error)
        assert layout is not None
        rows = transport.all_gather_integers(layout.row(transport.rank))
        table = FragmentTable.from_rows(rows, {spec.name: spec.shape for spec in specs})
        self._space = VectorSpace(layout, table, transport)
        self._layout = layout
        self._signature = self._current_signature()
        self._prepare_state()

    def _prepare_state(self) -> None:
        """For optimizers that keep vectors between steps."""

    def _current_signature(self) -> tuple[object, ...]:
        return tuple((id(p), p.requires_grad) for group in self.param_groups for p in group["params"])

    def parameter_names(self) -> list[str]:
        """Canonical name of every parameter in order; ``group0.3`` where no name was ever given."""
        model = self._model() if self._model is not None else None
        return [name for _, _, name in group_parameters(self.param_groups, model)]

    def gather(self) -> Objective:
        """Begin a step, or go on with one: from here to its end the model has whole parameters. Collective the first
        time.

        Losses that are to be differentiated twice have to be computed after it.
        """
        if self._objective is None:
            parameters, buffers = self._open()
            assert self._space is not None
            self._objective = Objective(
                self._space,
                parameters,
                buffers,
                self._transport,
                curvature=self.options.curvature,
                keep_graphs=self.options.keep_graphs,
            )
        elif self._stack is None:
            self._gather_again(self._objective)
        return self._objective

    def pause(self) -> None:
        """Between two micro-batches of one step: what was collected is kept, and the engine holds what it held before,
        so that the model can be validated and saved. :meth:`gather` goes on. Local."""
        if self._objective is None or not self._objective.evaluations:
            self.abandon()
            return
        stack, self._stack = self._stack, None
        if stack is None:
            return
        assert self._layout is not None
        if self._layout.engine != "dense":
            self._objective.forget_graphs()  # of parameters that are freed
        self._objective.parameters = []
        stack.close()

    def _gather_again(self, objective: Objective) -> None:
        """Go on with what an earlier step has collected."""
        objective.parameters, _ = self._open()
        self._objective = objective

    def _open(self) -> tuple[list[Tensor], list[Tensor]]:
        """The model's own parameters, whole, and its buffers."""
        if self._space is None or self._signature != self._current_signature():
            self.attach()
        assert self._space is not None and self._layout is not None and self._layout.gathered is not None
        model = self._model() if self._model is not None else None
        self._before = self._space.read()
        self._stack = ExitStack()
        try:
            self._stack.enter_context(computing())
            gathered = self._stack.enter_context(self._layout.gathered(model))
            return self._space.parameters(gathered), list(model.buffers()) if model is not None else []
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """End a step that has begun without taking it: the parameters are as before, what was collected is dropped.
        Local, since it may be one rank alone that has failed."""
        if self._stack is not None:
            self._close(self._before)
        self._objective = None

    def _release(self, parameters: Tensor) -> None:
        """End the step: every engine holds what it held before, with these values (a local vector). Collective."""
        self._close(parameters)
        self._share_buffers()

    def _close(self, parameters: Tensor) -> None:
        stack, self._stack = self._stack, None
        self._objective = None
        assert stack is not None and self._space is not None
        stack.close()
        self._space.write(parameters)
        self._before = torch.empty(0)

    def _share_buffers(self) -> None:
        """Under DDP every rank goes on with rank 0's buffers, as DDP's own forward pass would have seen to."""
        model = self._model() if self._model is not None else None
        if isinstance(model, nn.parallel.DistributedDataParallel) and model.broadcast_buffers:
            for buffer in model.buffers():
                self._transport.share(buffer)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self.options, "_copied": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop("_copied", False):  # a copy or an unpickled optimizer, not load_state_dict
            self._reset_runtime()
        super().__setstate__(state)
