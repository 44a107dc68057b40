"""Hooks that record the factors of one step.

A forward hook reads a layer's input and hangs a hook on its *output tensor*: full backward hooks break where an
activation is applied in place. What a use adds is committed when its gradient arrives, so passes without gradients
leave nothing, and a pass that activation checkpointing repeats is counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soo.capture.factors import APPROXIMATIONS, FactorSums, Statistics
from lightning_soo.capture.layers import Layer, find_layers
from lightning_soo.capture.passes import Pass, Passes, is_repeated
from lightning_soo.capture.registry import Record, limit_part
from lightning_soo.capture.switch import Hooks
from lightning_soo.naming import nearest

__all__ = ["Layer", "Recorder", "find_layers"]


class Recorder:
    """Records factors of a model's layers while ``recording``.

    Attributes:
        layers, reasons: what is captured, and why other modules are not (:func:`find_layers`).
        sums: layer name -> what this process has seen since the last :meth:`clear`.
        examples: how many examples that were.
        recording: set it for the steps that need factors; otherwise a hook costs a function call.
        phase: moves the grid of ``positions``; the same on every rank, the number of the step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        approximation: str = "expand",
        batch_reduction: str = "mean",
        max_order: int | None = None,
        input_shapes: Mapping[str, tuple[int, int]] = MappingProxyType({}),
        gram_dtype: torch.dtype | None = None,
        positions: int | None = None,
    ) -> None:
        """
        Args:
            model: as it is, or as an engine or ``torch.compile`` has wrapped it.
            approximation: of weights that are used at several positions: ``"expand"`` or ``"reduce"``.
            batch_reduction: of the loss over the examples of a (micro-)batch, ``"mean"`` or ``"sum"``.
            max_order: factors above it become products of two, or diagonals (:func:`limit_part`).
            input_shapes: layer name -> what its inputs are, ``(channels, space)``, for that product.
            gram_dtype: rows are rounded to it before they are multiplied, ``torch.bfloat16``.
            positions: of each example's output of a convolution about so many at most enter the factors, on a grid
                that :attr:`phase` moves; every position otherwise.

        Raises:
            ValueError: an unknown choice or layer, or ``positions`` with ``"reduce"``, which needs them all.
        """
        if approximation not in APPROXIMATIONS:
            raise ValueError(f"unknown approximation {approximation!r}{nearest(approximation, APPROXIMATIONS)}")
        if positions is not None and (positions < 1 or approximation != "expand"):
            raise ValueError(f"positions={positions} needs to be positive, and approximation='expand'")
        self.layers, self.reasons = find_layers(model)
        names = [layer.name for layer in self.layers]
        for name in input_shapes:
            if name not in names:
                raise ValueError(f"input_shapes has {name!r}, which is no captured layer{nearest(name, names)}")
        if max_order is not None:
            self.layers = [
                replace(layer, part=limit_part(layer.part, max_order, input_shapes.get(layer.name)))
                for layer in self.layers
            ]
        self.approximation, self.batch_reduction = approximation, batch_reduction
        self.gram_dtype, self.positions, self.phase = gram_dtype, positions, 0
        self.recording = True
        self._passes = Passes()
        self._hooks = Hooks()
        by_module: dict[nn.Module, list[Layer]] = {}
        for layer in self.layers:
            for module in layer.modules:
                by_module.setdefault(module, []).append(layer)
        # of others, a loss or a metric, the arguments need not be examples
        callers = [module for module in model.modules() if any(part in by_module for part in module.modules())]
        self._hooks.add(module.register_forward_pre_hook(self._begin, with_kwargs=True) for module in callers)
        for module, layers in by_module.items():
            self._hooks.add(layers[0].rule.watch(module, self._recording(module, layers)))
        self._hooks.add(module.register_forward_hook(self._end, always_call=True) for module in callers)
        # what was compiled before does not look whether there are hooks now (skip_nnmodule_hook_guards): compile anew
        torch._dynamo.reset_code_caches()
        self.clear()

    def clear(self) -> None:
        """Forget this step's captures: it is over, was skipped, or its gradients were zeroed."""
        self.sums: dict[str, FactorSums] = {layer.name: FactorSums() for layer in self.layers}
        self.examples = 0
        self._passes.forget()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()

    def factors(self, *, divisor: float = 1.0) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
        """``A`` and ``G`` of every layer that was used, of what this process has seen; shapes as in ``FactorSums``.

        Args:
            divisor: what the loss was divided by beside its reduction: the number of accumulated micro-batches over the
                loss scale.
        """
        found: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
        for name, sums in self.sums.items():
            if sums.inputs is not None and sums.gradients is not None:
                inputs = tuple(tensor / max(sums.positions, 1) for tensor in sums.inputs)
                found[name] = inputs, sums.gradients * (divisor**2 / max(self.examples, 1))
        return found

    def _begin(self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.recording:
            self._passes.begin(module, positional, named)

    def _end(self, module: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
        if self.recording:
            self._passes.end(module)

    def _recording(self, module: nn.Module, layers: list[Layer]) -> Record:
        def record(values: Tensor, result: Tensor, pick: Mapping[str, Callable[[Tensor], Tensor]] | None) -> None:
            if not self.recording or not torch.is_grad_enabled() or not result.requires_grad or is_repeated():
                return
            used = layers if pick is None else [layer for layer in layers if layer.part.key in pick]
            current = self._passes.current() or Pass(batch=values.shape[0])  # recording began inside a pass
            batch, values = current.batch, values.detach()
            how = Statistics(
                approximation=self.approximation,
                gram_dtype=self.gram_dtype,
                positions=self.positions,
                phase=self.phase,
            )
            # the sums, not the input, are kept until the gradient comes: under checkpointing inputs are meant to go
            with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
                seen = [layer.rule.input_sums(module, layer.part, values, batch, how) for layer in used]
            shape = result.shape
            kept = values if any(layer.rule.needs_input for layer in used) else None

            def gradient_hook(gradient: Tensor) -> None:
                if self._passes.count(current):
                    self.examples += batch
                # of the loss of one example: the mean has divided it by their number
                scale = float(batch) ** 2 if self.batch_reduction == "mean" else 1.0
                gradient = gradient.detach().reshape(shape)
                with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                    for layer, (inputs, positions) in zip(used, seen, strict=True):
                        own = gradient if pick is None else pick[layer.part.key](gradient)
                        total = layer.rule.gradient_sum(module, layer.part, kept, own, batch, how)
                        self.sums[layer.name].add(inputs, positions, total.mul_(scale))

            _made(result).register_hook(gradient_hook)  # type: ignore[no-untyped-call]

        return record


def _made(result: Tensor) -> Tensor:
    """The tensor whose history stays as it is: a view's is written anew where an activation changes it in place.

    ``nn.Linear`` makes a matrix of its input's leading dimensions, and returns a view of the product.
    """
    base = result._base
    if base is None or not base.requires_grad or base.numel() != result.numel():
        return result
    return base if base.is_contiguous() and result.is_contiguous() else result
