"""An optimizer whose preconditioner is made of what layers see (K-FAC): hooks, statistics, and what they belong to."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soo.capture.recorder import Layer, Recorder, find_layers
from lightning_soo.optim.contributions import Contributions
from lightning_soo.optim.layer_directions import LayerDirections
from lightning_soo.optim.members import Member
from lightning_soo.placement.fragments import canonical_name
from lightning_soo.placement.layers import Layers, LayerSpec
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.plan import Plan
from lightning_soo.preconditioners.layer_factors import LayerFactorsBlock

logger = logging.getLogger(__name__)


class LayeredOptimizer(LayerDirections):
    """Statistics come from hooks on the model's layers, one step's at a time, and are added up over all ranks."""

    def _reset_runtime(self) -> None:
        super()._reset_runtime()
        self._recorder: Recorder | None = None
        self._release: Any = None  # takes its hooks off the model, once
        self._micro_batches = 1.0
        self._scaler: Any = None
        self._captured: set[str] = set()  # layers that some rank has seen in this step
        self._named: set[str] = set()  # layers of which a warning was given
        self._under_way: list[tuple[Contributions, float]] = []  # with the decay that goes with them

    def remember(self, model: nn.Module) -> None:
        """Take names and layers from ``model`` and hang hooks on it: the next backward pass counts."""
        super().remember(model)
        if self._recorder is not None:
            watched = {module for layer in self._recorder.layers for module in layer.modules}
            if watched and watched <= set(model.modules()):
                return  # the same modules, perhaps wrapped
        self._watch(model)

    def _watch(self, model: nn.Module) -> None:
        self._unwatch()
        options = self.options
        self._recorder = Recorder(
            model,
            approximation=options.approximation,
            batch_reduction=options.batch_reduction,
            max_order=options.max_preconditioner_dim,
            input_shapes=dict(options.input_shapes),
            fisher=options.fisher,
            likelihood=options.likelihood,
            outputs=options.outputs,
            positions=options.statistics_positions,
            gram_dtype=options.gram_dtype,
        )
        gone = weakref.WeakMethod(self._gradients_are_gone)
        self._recorder.gradients_are_gone = lambda: (ask := gone()) is not None and ask()
        self._release = weakref.finalize(self, self._recorder.close)  # the hooks of a dropped optimizer go with it

    def _gradients_are_gone(self) -> bool:
        """Whether a scaler has left the step out and others have dropped the gradients: ``model.zero_grad()``.

        Told by the parameters where they are whole; an engine that shards keeps gradients elsewhere.
        """
        every = (parameter for group in self.param_groups for parameter in group["params"])
        return all(parameter.grad is None for parameter in every) and not self.is_sharded

    def _unwatch(self) -> None:
        if self._release is not None:
            self._release()
        self._recorder = self._release = None

    def _read_layout(self) -> Layout:
        model = self._model() if self._model is not None else None
        if model is not None and self._plan is not None and self._recorder is not None:
            layers, _ = find_layers(model)
            if [_trained(layer) for layer in layers] != [_trained(layer) for layer in self._recorder.layers]:
                self._watch(model)  # parameters were frozen or unfrozen
        return super()._read_layout()

    def _layers(self) -> Layers:
        recorder = self._watched()
        specs = [_layer_spec(layer, self.options.damping_method) for layer in recorder.layers]
        return Layers(specs=specs, reasons={canonical_name(name): why for name, why in recorder.reasons.items()})

    def _watched(self) -> Recorder:
        """The recorder, hung on the model anew after :meth:`close`."""
        model = self._model() if self._model is not None else None
        if self._recorder is None and model is not None:
            self._watch(model)
        if self._recorder is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} looks at a model's layers: build it with the model, {name}(model, ...), or call "
                "optimizer.attach(model) before the first forward pass. Where there are only parameters, as for the "
                "optimizer of LightningCLI, write the callback lightning_soo.callbacks.SecondOrder with method: "
                f"{name.lower()}"
            )
        return self._recorder

    def _install_plan(self, plan: Plan, layout: Layout) -> None:
        if self._refresher is not None:
            self._take_contributions()  # keepers may change
        super()._install_plan(plan, layout)
        self._set_recording()

    @property
    def micro_batches(self) -> float:
        """By which each micro-batch's loss is divided, as :meth:`accumulate` was told."""
        return self._micro_batches

    def accumulate(self, micro_batches: float, scaler: Any = None) -> None:
        """Say what the loss is divided by, and scaled by, before ``backward()``; front doors do it.

        Args:
            micro_batches: by which each micro-batch's loss is divided; 1 where losses are accumulated undivided.
                Under DeepSpeed beside what it divides by.
            scaler: the ``torch.amp.GradScaler``, if any: layers see gradients with its scale.
        """
        if not micro_batches > 0:
            raise ValueError(f"micro_batches={micro_batches}: must be above 0")
        self._micro_batches, self._scaler = micro_batches, scaler

    def observe_outputs(self, outputs: Any) -> None:
        """Differentiate a model's outputs, for ``fisher="mc"`` and ``"ggn"``, where no module returns them.

        To be called after the forward pass and before ``backward()``; it does nothing in steps without statistics.

        Args:
            outputs: logits or means, ``(examples, ..., classes)``.
        """
        self._watched().observe_outputs(outputs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what layers have seen since the last step is forgotten with the gradients."""
        super().zero_grad(set_to_none)
        if self._plan is not None and self._recorder is None:
            self._set_recording()
        if self._recorder is not None:
            self._recorder.clear()

    def close(self) -> None:
        """Stop background work and take the hooks off the model; ``zero_grad()`` and ``step()`` hang them on again."""
        self._settle()
        super().close()
        self._unwatch()

    def _set_recording(self) -> None:
        """Whether the next step's passes are looked at: in the others a hook is a function call."""
        assert self._refresher is not None
        recorder, ranks = self._watched(), self.options.statistics_ranks
        takes_part = ranks is None or self._transport.rank < ranks
        recorder.recording = takes_part and self._refresher.schedule.observes(self.steps + 1)
        recorder.phase, recorder.seed = self.steps + 1, self._transport.rank

    def _end_step(self, part: int) -> None:
        if part == self._parts - 1 or not self._moves:
            self._watched().clear()
            self._set_recording()

    def _marks(self) -> list[float]:
        """For each layer whether it was seen here; infinite where its factors are not finite."""
        assert self._refresher is not None
        if not self._refresher.schedule.observes(self.steps + 1):
            return []
        recorder = self._watched()
        found = [recorder.sums[layer.name] for layer in recorder.layers]
        traces = [
            sum((_trace(factor) for factor in sums.inputs or ()), _trace(sums.gradients))
            for sums in found
            if sums.gradients is not None
        ]
        values = iter(torch.stack(traces).tolist() if traces else [])
        infinite = float("inf")
        return [0.0 if sums.gradients is None else 1.0 if next(values) < infinite else infinite for sums in found]

    def _take_marks(self, marks: Sequence[float]) -> None:
        layers = self._watched().layers
        known = {layer.name: mark for layer, mark in zip(layers, marks, strict=False)}
        self._captured = {name for name, mark in known.items() if mark == 1.0}
        for member in self._members if marks else ():
            for name in {block.layer.layer for block in self._blocks_of(member)} - self._captured - self._named:
                if member.magnitude > 0:
                    self._named.add(name)
                    logger.warning(
                        "layer %r has a gradient, but %s: its preconditioner stands still (said once)",
                        name,
                        "its factors are not finite (inputs or scaled gradients too large for their squares)"
                        if known[name] > 1.0
                        else "no pass through it was seen. Attach the optimizer before the first forward pass, and "
                        "call the module itself",
                    )

    def _observe(self, part: int, members: list[Member]) -> None:
        assert self._refresher is not None
        schedule = self._refresher.schedule
        if part == 0:
            self._take_contributions()
        if not schedule.observes(self.steps):
            return
        blocks = {block.block.key: block for member in members for block in self._blocks_of(member)}
        seen = {key: block for key, block in blocks.items() if block.layer.layer in self._captured}
        decay = self.options.factor_decay ** (self.steps - schedule.observed_before(self.steps))
        for block in seen.values():
            block.count(decay=decay, weight=1.0 - decay)
        sent = Contributions(
            self._transport,
            seen,
            {key: self._refresher.places[key].keeper for key in seen},
            self._watched(),
            gradient_scale=self._loss_divisor() ** 2 if self.options.fisher == "empirical" else 1.0,
        )
        self._under_way.append((sent, decay))

    def _refresh(self, part: int) -> None:
        """Contributions arrive during the next forward and backward pass, unless a refresh needs them now."""
        assert self._refresher is not None
        if any(self._refresher.schedule.refreshes(key, self.steps) for key in self._refresher.places):
            self._take_contributions()
        super()._refresh(part)

    def _take_contributions(self) -> None:
        """Bring the factors kept here up to date. Local: every rank has sent its part."""
        assert self._refresher is not None
        if self._under_way:
            self._refresher.background.fence()
        for sent, decay in self._under_way:
            for key, factors in sent.finish().items():
                block = self._refresher.blocks[key]
                assert isinstance(block, LayerFactorsBlock)
                block.update(factors, decay=decay, weight=1.0 - decay)
        self._under_way.clear()

    def _loss_divisor(self) -> float:
        """What the loss of a micro-batch was divided by, beside its reduction, by the loop, a scaler and an engine."""
        assert self._layout is not None
        of_engine = self._layout.loss_divisor() if self._layout.loss_divisor is not None else 1.0
        return of_engine * self._micro_batches / float(self._scaler.get_scale() if self._scaler is not None else 1.0)

    def _about_blocks(self) -> dict[str, Any]:
        """As of every optimizer here, with the damping and what bounds the next step where an engine steps in parts."""
        self._settle()
        return {**super()._about_blocks(), "damping": self._damping, "last_total": self._last_total}

    def _load_checked(self, saved: Mapping[str, Any]) -> None:
        self._settle()
        super()._load_checked(saved)
        self._damping, self._last_total = saved.get("damping"), saved.get("last_total")

    def restart_blocks(self) -> None:
        self._settle()
        super().restart_blocks()
        self._damping = self._last_total = None

    def consolidate(self, to: int | None = 0) -> None:
        self._settle()
        super().consolidate(to)

    def _settle(self) -> None:
        if self._refresher is not None:
            self._take_contributions()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**super().__getstate__(), "_damping": self._damping, "_last_total": self._last_total}

    def without_traffic(self, plan: Plan) -> str:
        """That no size of block would do it: layers are not cut by size."""
        return "a layer's gradient is assembled at its home as a whole, whatever max_preconditioner_dim is"

    def diagnostics(self) -> dict[str, float]:
        """As of every optimizer here, with the damping and the factor of ``kl_clip`` in the last step."""
        return {**super().diagnostics(), "damping": self.damping, "kl_clip_factor": self._clip_factor}


def _trace(factor: Tensor) -> Tensor:
    """Of a matrix, a diagonal or all of a stack: not finite where anything in it is not."""
    return factor.sum() if factor.ndim == 1 else factor.diagonal(dim1=-2, dim2=-1).sum()


def _trained(layer: Layer) -> tuple[object, ...]:
    return layer.name, layer.weight_trains, layer.bias_trains


def _layer_spec(layer: Layer, damping_method: str) -> LayerSpec:
    part = layer.part
    return LayerSpec(
        name=layer.name,
        weight=layer.weight,
        bias=layer.bias,
        rows=part.rows,
        bias_rows=part.bias_rows or part.rows,
        transposed=part.transposed,
        gradient_factor=part.gradient_factor,
        input_factors=part.input_factors,
        joint_bias=part.joint_bias,
        damping_method=damping_method,
    )
