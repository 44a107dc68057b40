"""An optimizer that computes with whole parameters of any engine: layout, vectors, and the context of a step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_soo.optim.agreed_layout import TrainingRanks, agree_on_layout, group_entries
from lightning_soo.optim.objective import Objective, computing
from lightning_soo.optim.options import refuse_repeated
from lightning_soo.optim.trust_region_options import TrustRegionOptions
from lightning_soo.optim.vectors import VectorSpace
from lightning_soo.placement.adapters import read_layout
from lightning_soo.placement.layout import FragmentTable, Layout
from lightning_soo.transport import Transport, entries_of


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
        self._ranks = TrainingRanks()
        self._transport = Transport(enabled=False)
        self._layout: Layout | None = None
        self._fragment_table: FragmentTable | None = None
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
        if model is not None:
            self._model = weakref.ref(model)
        timeout = self.options.collective_timeout
        self._transport = transport = self._ranks.connect(model, engine, process_group, timeout)
        configuration = [*entries_of(self.options), *group_entries(self.param_groups, ("radius", "weight_decay"))]
        layout, table = agree_on_layout(transport, self._read_layout, configuration, timeout=timeout)
        self._space, self._fragment_table = VectorSpace(layout, table, transport), table
        self._layout = layout
        self._signature = self._current_signature()
        self._prepare_state()

    def _read_layout(self) -> Layout:
        layout = read_layout(self.param_groups, self._model() if self._model is not None else None)
        if layout.gathered is None:
            raise TypeError(
                f"{type(self).__name__} cannot train under DeepSpeed's {layout.engine}: its engine gives no second "
                "derivative. Use DDP, FSDP1, FSDP2 or HSDP"
            )
        return layout

    def _prepare_state(self) -> None:
        """For optimizers that keep vectors between steps."""

    def _current_signature(self) -> tuple[object, ...]:
        return tuple((id(p), p.requires_grad) for group in self.param_groups for p in group["params"])

    # of a checkpoint folder, which goes by names and ranges

    def _groups(self) -> list[dict[str, Any]]:
        return self.param_groups

    def _counters(self, name: str) -> dict[str, float]:
        return {}

    def _take_counter(self, name: str, counter: str, value: float) -> bool:
        return False

    def _has_taken(self, blocks: Mapping[str, Any] | None) -> None:
        self._prepare_state()

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
            self._stack.enter_context(computing(model))
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
        """Every rank goes on with rank 0's buffers, where the engine's own forward pass would have seen to it."""
        assert self._layout is not None
        if self._layout.shared_buffers is not None:
            for buffer in self._layout.shared_buffers(self._model() if self._model is not None else None):
                self._transport.share(buffer, "rank 0's buffers")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, but a parameter given twice is refused."""
        super().add_param_group(param_group)
        refuse_repeated(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self.options, "_copied": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop("_copied", False):  # a copy or an unpickled optimizer, not load_state_dict
            self._reset_runtime()
        super().__setstate__(state)
