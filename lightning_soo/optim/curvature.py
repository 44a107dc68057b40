"""Products of a vector with the Hessian or the Gauss-Newton matrix of one loss, from its graph (Pearlmutter 1994)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CURVATURES = ("hessian", "gauss_newton")


class CurvatureGraph:
    """The graph of a loss and of its gradient, for as many products as are wanted.

    Args:
        loss: scalar, with its graph.
        outputs: what ``loss`` was computed from, with their graphs; for ``"gauss_newton"`` alone: the matrix is
            ``J^T H J`` with the Jacobian J of the outputs and the Hessian H of the loss as a function of them
            (Schraudolph 2002).
        parameters: by which both are differentiated.

    Attributes:
        gradient: of the loss, detached, in the order of ``parameters``; None where it does not depend on one.

    Raises:
        RuntimeError: an operation without a second derivative.
    """

    def __init__(self, loss: Tensor, outputs: Sequence[Tensor], parameters: Sequence[Tensor], curvature: str) -> None:
        self._parameters = list(parameters)
        self._inputs: list[Tensor] = []
        with _second_derivatives():
            if curvature == "hessian":
                found = torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True)
                self._from, self._to = list(found), self._parameters
                self.gradient = [None if one is None else one.detach() for one in found]
                return
            self._outputs = [output for output in outputs if output.requires_grad]
            # linear in `inputs`, so its derivative by them is the Jacobian
            self._inputs = [torch.zeros_like(output, requires_grad=True) for output in self._outputs]
            self._transposed = torch.autograd.grad(
                self._outputs, self._parameters, self._inputs, create_graph=True, allow_unused=True
            )
            self._slopes = torch.autograd.grad(loss, self._outputs, create_graph=True, allow_unused=True)
            self._from, self._to = list(self._slopes), self._outputs
            # of the whole loss, which may have terms that the outputs do not know
            self.gradient = list(torch.autograd.grad(loss, self._parameters, retain_graph=True, allow_unused=True))

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """The curvature times ``vectors``, which are shaped as the parameters; None where the result is zero."""
        with _second_derivatives():
            if not self._inputs:
                return _differentiate(self._from, self._to, vectors)
            forward = _differentiate(self._transposed, self._inputs, vectors)
            tangents = [torch.zeros_like(o) if t is None else t for t, o in zip(forward, self._outputs, strict=True)]
            curved = _differentiate(self._from, self._to, tangents)
            slopes = [torch.zeros_like(o) if c is None else c for c, o in zip(curved, self._outputs, strict=True)]
            found = torch.autograd.grad(self._outputs, self._parameters, slopes, retain_graph=True, allow_unused=True)
            return list(found)


def _differentiate(
    values: Sequence[Tensor | None], by: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Derivatives of ``sum <values, weights>``; a value that is a constant has none."""
    known = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None and v.requires_grad]
    pairs = [(value, weight.to(value.device, value.dtype)) for value, weight in known]
    if not pairs:
        return [None] * len(by)
    found = torch.autograd.grad(
        [value for value, _ in pairs], by, [weight for _, weight in pairs], retain_graph=True, allow_unused=True
    )
    return list(found)


def unpack(result: Any, curvature: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and outputs of what a closure has returned: a loss, ``(loss, outputs)``, or a mapping with these keys.

    Raises:
        TypeError: something else, a loss without a graph, or no outputs where the curvature needs them.
    """
    outputs: Any = None
    if isinstance(result, dict):
        loss, outputs = result.get("loss"), result.get("outputs")
    elif isinstance(result, (tuple, list)) and len(result) == 2:
        loss, outputs = result
    else:
        loss = result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"the closure returned {type(result).__name__}: return the loss (a tensor of one element) with its graph, "
            "or (loss, outputs)"
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise TypeError(
            "the closure returned a loss without a graph: do not call backward(), item() or detach() in it, and do not "
            "compute it under torch.no_grad()"
        )
    if curvature == "hessian":
        return loss.reshape(()), []
    if outputs is None:
        raise TypeError(
            "curvature='gauss_newton' needs what the loss was computed from: return (loss, outputs), or "
            "{'loss': ..., 'outputs': ...}"
        )
    return loss.reshape(()), [outputs] if isinstance(outputs, Tensor) else list(outputs)


@contextmanager
def _second_derivatives() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "double backward" in text or "not implemented" in text or "higher order" in text:
            raise RuntimeError(
                f"the model has an operation without a second derivative ({text.splitlines()[0]}): leave out "
                "torch.compile, use attention and recurrent layers that are not fused (torch.backends.cudnn.flags("
                "enabled=False) for recurrent ones), or write the operation in others"
            ) from error
        raise
