"""One use of a module in a forward pass: what it has seen, and what a gradient of its output adds to that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from lightning_soo.capture.factors import FactorSums, Statistics
from lightning_soo.capture.layers import Layer
from lightning_soo.capture.parameters import held_tensor

_DEPTH = 8  # operations from a weight to the output of its module: a cast, views, the product


class Use:
    """
    Args:
        module, values, result: the module, its input and its output.
        layers: what is captured of it in this use.
        pick: what of the output's gradient is each layer's; None gives all of it to each.
        batch: examples of the pass.
    """

    def __init__(
        self,
        module: nn.Module,
        values: Tensor,
        result: Tensor,
        layers: Sequence[Layer],
        pick: Mapping[str, Callable[[Tensor], Tensor]] | None,
        batch: int,
        how: Statistics,
    ) -> None:
        self._module, self._layers, self._pick, self._how = module, layers, pick, how
        self._shape, self.batch = result.shape, batch
        values = values.detach()
        # the sums, not the input, are kept until the gradient comes: under checkpointing inputs are meant to go
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
            self._inputs = [layer.rule.input_sums(module, layer.part, values, batch, how) for layer in layers]
        self._values = values if any(layer.rule.needs_input for layer in layers) else None
        names = {name for layer in layers for name in (layer.part.weight, layer.part.bias) if name is not None}
        held = [held_tensor(module, name) for name in names]
        trained = [tensor for tensor in held if tensor is not None and tensor.requires_grad]
        self._nodes = _among_sources(result, [get_gradient_edge(tensor).node for tensor in trained])

    def is_for_weights(self) -> bool:
        """Whether the backward pass that goes on asks for the gradient of a weight or bias of this use.

        One that is for an input (a penalty or an equation with derivatives by it, an adversarial example) says
        nothing about how the loss depends on the weights.
        """
        if not self._nodes:  # it cannot be told
            return True
        try:
            return any(torch._C._will_engine_execute_node(node) for node in self._nodes)
        except RuntimeError:  # torch.autograd.grad by a leaf: this one
            return True

    def gradient_sums(self, gradient: Tensor) -> list[Tensor]:
        """Of the gradient of :func:`source`, one for each layer."""
        gradient = gradient.detach().reshape(self._shape)
        found = []
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            for layer in self._layers:
                own = gradient if self._pick is None else self._pick[layer.part.key](gradient)
                arguments: Any = (self._module, layer.part, self._values, own, self.batch, self._how)
                found.append(layer.rule.gradient_sum(*arguments))
        return found

    def add(self, gradients: Sequence[Tensor], sums: Mapping[str, FactorSums]) -> None:
        """Commit this use to the sums of its layers."""
        for layer, (inputs, positions), gradient in zip(self._layers, self._inputs, gradients, strict=True):
            sums[layer.name].add(inputs, positions, gradient)


def _among_sources(result: Tensor, nodes: Sequence[Node]) -> list[Node]:
    """Those of ``nodes`` that are a few operations above ``result``.

    Others are of tensors that an engine has put in the place of those that the module was computed with.
    """
    found, reached = [], [result.grad_fn]
    for _ in range(_DEPTH):
        found += [node for node in nodes if node in reached and node not in found]
        reached = list({above: None for node in reached if node is not None for above, _ in node.next_functions})
    return found


def source(result: Tensor) -> Tensor:
    """The tensor whose history stays as it is: a view's is written anew where an activation changes it in place.

    ``nn.Linear`` makes a matrix of its input's leading dimensions, and returns a view of the product.
    """
    base = result._base
    if base is None or not base.requires_grad or base.numel() != result.numel():
        return result
    return base if base.is_contiguous() and result.is_contiguous() else result
