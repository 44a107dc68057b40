"""Hooks that record the factors of one step.

A forward hook reads a layer's input and hangs a hook on its *output tensor*: full backward hooks break where an
activation is applied in place. What a use adds is committed when its gradient arrives, so passes without gradients
leave nothing, and a pass that activation checkpointing repeats is counted once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_soo.capture.factors import APPROXIMATIONS, FactorSums, Statistics
from lightning_soo.capture.fisher import FISHERS, LIKELIHOODS, check_weights_stay, output_tensor, seeds
from lightning_soo.capture.layers import Layer, find_layers
from lightning_soo.capture.passes import Pass, Passes, is_in_backward, is_repeated
from lightning_soo.capture.registry import Record, limit_part
from lightning_soo.capture.switch import Hooks
from lightning_soo.capture.uses import Use, source
from lightning_soo.naming import nearest
from lightning_soo.placement.fragments import module_name

__all__ = ["Layer", "Recorder", "find_layers"]


class Recorder:
    """Records factors of a model's layers while ``recording``.

    Attributes:
        layers, reasons: what is captured, and why other modules are not (:func:`find_layers`).
        sums: layer name -> what this process has seen since the last :meth:`clear`.
        examples: how many examples that were.
        recording: set it for the steps that need factors; otherwise a hook costs a function call.
        phase: moves the grid of ``positions``, and seeds draws; the same on every rank, the number of the step.
        gradients_are_gone: whether what was seen belongs to gradients that were dropped since, without :meth:`clear`.
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
        fisher: str = "empirical",
        likelihood: str = "categorical",
        outputs: str | None = None,
        seed: int = 0,
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
            fisher: ``"empirical"``: gradients of the user's loss, in his backward pass. ``"mc"``: of labels drawn from
                the model's outputs; ``"ggn"``: of every class, exact. Those two differentiate the outputs themselves
                (:meth:`observe_outputs`): ``batch_reduction``, a loss scale or accumulation are nothing to them.
            likelihood: what the outputs are, ``"categorical"`` or ``"gaussian"`` (:mod:`fisher`).
            outputs: name of the module that returns them, where that is not the model itself.
            seed: of the draws, with :attr:`phase`; another on every rank.

        Raises:
            ValueError: an unknown choice or layer, or ``positions`` with ``"reduce"``, which needs them all.
            NotImplementedError: ``"mc"`` or ``"ggn"`` of a model that FSDP or ZeRO-3 shards; also at its first pass.
        """
        for word, choices in (
            (approximation, APPROXIMATIONS),
            (batch_reduction, ("mean", "sum")),
            (fisher, FISHERS),
            (likelihood, LIKELIHOODS),
        ):
            if word not in choices:
                raise ValueError(f"unknown choice {word!r}{nearest(word, choices)}")
        if positions is not None and (positions < 1 or approximation != "expand"):
            raise ValueError(f"positions={positions} needs to be positive, and approximation='expand'")
        if input_shapes and max_order is None:
            raise ValueError("input_shapes needs max_order: inputs above it are seen as such a product")
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
        self.fisher, self.likelihood, self.seed = fisher, likelihood, seed
        self._observing = False
        if fisher != "empirical":
            check_weights_stay(model, fisher)
            # what is compiled from now on keeps its graph for the user's own backward pass
            torch._functorch.config.donated_buffer = False
        # the innermost of those that are the model itself, below wrappers
        named = [(module_name(path), module) for path, module in model.named_modules()]
        whole = [module for name, module in named if name == (outputs or "")]
        if not whole:
            raise ValueError(f"outputs={outputs!r} is no module{nearest(str(outputs), [name for name, _ in named])}")
        self._model = whole[-1]
        self.recording, self.examples = True, 0
        self.gradients_are_gone: Callable[[], bool] = lambda: False
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
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset_code_caches()
        self.clear()

    def clear(self) -> None:
        """Forget this step's captures: it is over, was skipped, or its gradients were zeroed."""
        if self.fisher != "empirical" and self.examples == 0 and self._passes.has_uses():
            warnings.warn(
                f"fisher={self.fisher!r} saw layers but no outputs: where the model's modules are called and not the "
                "model, call Recorder.observe_outputs(outputs) before the backward pass",
                stacklevel=2,
            )
        self.sums: dict[str, FactorSums] = {layer.name: FactorSums() for layer in self.layers}
        self.examples = 0
        self._passes.forget()

    @property
    def phase(self) -> int:
        return self._phase

    @phase.setter
    def phase(self, phase: int) -> None:
        self._phase, self._draws = phase, 0

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()

    def factors(self, *, divisor: float = 1.0) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
        """``A`` and ``G`` of every layer that was used, of what this process has seen; shapes as in ``FactorSums``.

        Args:
            divisor: what the loss was divided by beside its reduction: the number of accumulated micro-batches over the
                loss scale. Of an empirical Fisher alone.
        """
        scale = (divisor**2 if self.fisher == "empirical" else 1.0) / max(self.examples, 1)
        found: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
        for name, sums in self.sums.items():
            if sums.inputs is not None and sums.gradients is not None:
                inputs = tuple(tensor / max(sums.positions, 1) for tensor in sums.inputs)
                found[name] = inputs, sums.gradients * scale
        return found

    def _begin(self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.recording:
            if self.examples and self._passes.is_over() and self.gradients_are_gone():
                self.clear()
            self._passes.begin(module, positional, named)

    def _end(self, module: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
        if self.recording:
            # what wraps the model may have hooks of its own on what it returns
            is_whole = module is self._model and output is not None
            if is_whole and self.fisher != "empirical" and torch.is_grad_enabled() and not is_in_backward():
                self.observe_outputs(output)
            self._passes.end(module)

    def _recording(self, module: nn.Module, layers: list[Layer]) -> Record:
        def record(values: Tensor, result: Tensor, pick: Mapping[str, Callable[[Tensor], Tensor]] | None) -> None:
            if not self.recording or not torch.is_grad_enabled() or not result.requires_grad or is_repeated():
                return
            used = layers if pick is None else [layer for layer in layers if layer.part.key in pick]
            current = self._passes.current() or Pass(batch=values.shape[0])  # recording began inside a pass
            current.batch = current.batch or values.shape[0]
            how = Statistics(
                approximation=self.approximation,
                gram_dtype=self.gram_dtype,
                positions=self.positions,
                phase=self.phase,
            )
            if self.fisher != "empirical" and is_in_backward():
                raise NotImplementedError(_REENTRANT.format(self.fisher))
            use = Use(module, values, result, used, pick, current.batch, how)
            if self.fisher == "empirical":
                hook = partial(self._arrived, current, use)
                source(result).register_hook(hook)  # type: ignore[no-untyped-call]
            else:
                current.uses.append((get_gradient_edge(source(result)), use))

        return record

    def _arrived(self, current: Pass, use: Use, gradient: Tensor) -> None:
        """A gradient of the user's own backward pass, or of one that is for something else (:func:`is_for_weights`)."""
        if not use.is_for_weights():
            return
        if self._passes.count(current):
            self.examples += current.batch
        # of the loss of one example: the mean has divided it by their number
        scale = float(use.batch) ** 2 if self.batch_reduction == "mean" else 1.0
        use.add([total.mul_(scale) for total in use.gradient_sums(gradient)], self.sums)

    def observe_outputs(self, outputs: Any) -> None:
        """Differentiate a model's outputs in place of a loss, for ``fisher="mc"`` and ``"ggn"``.

        Called by itself when the model that the recorder was made for returns. Where its modules are called instead,
        the user calls this, after the last of them and before the backward pass. Only outputs of layers get gradients:
        no weight does, and no engine that waits for those notices.

        Args:
            outputs: logits or means ``(..., classes)``, or a dict or tuple with them.
        """
        if self.fisher != "empirical":
            check_weights_stay(self._model, self.fisher)  # it may have been wrapped since
        current, output = self._passes.current(), output_tensor(outputs)
        if self.fisher == "empirical" or not self.recording or current is None or output is None:
            return
        uses, current.uses = current.uses, []
        if not uses or not output.requires_grad:
            return
        edges = [edge for edge, _ in uses]
        totals: list[list[Tensor] | None] = [None] * len(uses)
        generator = torch.Generator(output.device)
        generator.manual_seed(hash((self.seed, self._phase, self._draws)) % 2**63)
        self._draws += 1
        self._observing = True
        try:
            for seed in seeds(output, self.fisher, self.likelihood, current.batch, generator):
                with torch.autocast(output.device.type, enabled=False):
                    gradients = torch.autograd.grad(output, edges, seed, retain_graph=True, allow_unused=True)
                for index, gradient in enumerate(gradients):
                    if gradient is not None:
                        found, known = uses[index][1].gradient_sums(gradient), totals[index]
                        totals[index] = found if known is None else [a + b for a, b in zip(known, found, strict=True)]
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise NotImplementedError(_REENTRANT.format(self.fisher)) from error
            if "donated" in str(error):
                raise RuntimeError(_DONATED.format(self.fisher)) from error
            raise
        finally:
            self._observing = False
        # taken when the user's backward pass comes by: a pass without one leaves nothing, and gradients may be zeroed
        # between the two (Lightning's closure does)
        waiting = [(pair[1], total) for pair, total in zip(uses, totals, strict=True) if total is not None]
        output.register_hook(partial(self._returned, current, waiting))  # type: ignore[no-untyped-call]

    def _returned(self, current: Pass, found: list[tuple[Use, list[Tensor]]], gradient: Tensor) -> None:
        """The user's backward pass, which ends the pass and is not looked at otherwise."""
        if self._observing:
            return
        if not current.is_observed:
            current.is_observed = True
            self.examples += current.batch
        for use, total in found:
            use.add(total, self.sums)
        found.clear()
        self._passes.count(current)


_DONATED = (
    "fisher={0!r} differentiates the outputs of a model before the loss, and what torch.compile has made of this one "
    "frees what that needs: set torch._functorch.config.donated_buffer = False before the model is compiled, or build "
    "the optimizer before the model is called"
)
_REENTRANT = (
    "fisher={0!r} cannot differentiate a model with reentrant activation checkpointing: "
    "pass use_reentrant=False to torch.utils.checkpoint"
)
