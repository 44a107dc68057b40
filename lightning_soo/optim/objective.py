"""The loss that one trust-region step is about: micro-batches of every rank, evaluated as often as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_soo.optim.curvature import CurvatureGraph, unpack
from lightning_soo.optim.repetition import RandomState, repeating
from lightning_soo.optim.vectors import VectorSpace
from lightning_soo.transport import Transport

Closure = Callable[[], Any]


@dataclass
class Evaluation:
    """One micro-batch.

    Attributes:
        closure: computes its loss, again and again.
        weight: of its loss in the mean, such as its number of examples.
        state: random numbers of its first evaluation.
        graph: of its loss and gradient, while it is kept.
        divided: from some of its examples to a closure of their loss; its weight is then their number.
    """

    closure: Closure
    weight: float
    state: RandomState
    graph: CurvatureGraph | None = None
    divided: Callable[[Sequence[int]], Closure] | None = None


class Objective:
    """Weighted mean of the losses of micro-batches, over all ranks.

    Args:
        parameters: the model's own, whole, in the order of the space's vectors.
        buffers: of the model; they stay as the first evaluation of each micro-batch leaves them.
        transport: over all ranks that train.
        keep_graphs: whether products reuse the graph of each micro-batch; None keeps it where there is only one.

    Attributes:
        parameters: as above.
        evaluations: the micro-batches.
        resolution: relative, of the losses' dtype.
        propagations: forward and backward passes of all ranks, times the weights of what they went through; known after
            :meth:`mean` and :meth:`value`. A product with the curvature is two, and two more where its graph is built
            for it.
    """

    def __init__(
        self,
        space: VectorSpace,
        parameters: Sequence[Tensor],
        buffers: Iterable[Tensor],
        transport: Transport,
        *,
        curvature: str,
        keep_graphs: bool | None,
    ) -> None:
        self._space, self.parameters, self._buffers = space, list(parameters), list(buffers)
        self._transport, self._curvature, self._keep_graphs = transport, curvature, keep_graphs
        self.evaluations: list[Evaluation] = []
        self._sample: list[Evaluation] | None = None
        self._sum = space.zeros()
        self._losses, self._passes = 0.0, 0.0  # of this rank, until the next sum over all
        self._weight, self._sample_weight = 0.0, 0.0
        self.resolution = 0.0
        self.propagations = 0.0

    @property
    def device(self) -> torch.device:
        """Where losses are computed: that of the vectors, unless an engine offloads what it keeps."""
        return self.parameters[0].device if self.parameters else self._space.device

    def add(self, closure: Closure, weight: float, *, keep_graph: bool) -> Tensor:
        """Evaluate a micro-batch and its gradient. Local.

        Returns:
            Its loss, detached.
        """
        self.release_graphs()
        state = RandomState.capture(self.device)
        with torch.enable_grad():
            result = closure()
        return self.add_evaluated(result, state, closure, weight, keep_graph=keep_graph)

    def add_evaluated(
        self,
        result: Any,
        state: RandomState,
        closure: Closure,
        weight: float,
        *,
        keep_graph: bool,
        divided: Callable[[Sequence[int]], Closure] | None = None,
    ) -> Tensor:
        """As :meth:`add`, for a result with its graph that was computed since ``state``."""
        evaluation = Evaluation(closure, weight, state, divided=divided)
        with torch.enable_grad():  # also where the step is called without
            loss, outputs = unpack(result, self._curvature)
            if keep_graph and (self._keep_graphs or (self._keep_graphs is None and not self.evaluations)):
                evaluation.graph = CurvatureGraph(loss, outputs, self.parameters, self._curvature)
                gradient = evaluation.graph.gradient
            else:
                gradient = list(torch.autograd.grad(loss, self.parameters, allow_unused=True))
        self._space.add(self._sum, gradient, weight)
        self.evaluations.append(evaluation)
        self._losses += weight * float(loss.detach())
        self._weight += weight
        self._passes += 2 * weight
        self.resolution = max(self.resolution, torch.finfo(loss.dtype).eps)
        return loss.detach()

    def release_graphs(self) -> None:
        """Before another micro-batch is evaluated: graphs are kept for one alone, unless all are asked for."""
        if self._keep_graphs is None:
            self.forget_graphs()

    def forget_graphs(self) -> None:
        """Products build them again."""
        for evaluation in (*self.evaluations, *(self._sample or ())):
            evaluation.graph = None

    def take_products_over(self, sample: Sequence[tuple[Closure, float]]) -> None:
        """Let the curvature be that of these weighted micro-batches, instead of all that were added."""
        state = RandomState.capture(self.device)
        self._sample = [Evaluation(closure, weight, state) for closure, weight in sample]

    @property
    def divisible(self) -> bool:
        """Whether every micro-batch is one of examples that can be taken apart."""
        return all(evaluation.divided is not None for evaluation in self.evaluations)

    def take_products_over_examples(self, choose: Callable[[int], Sequence[int]]) -> None:
        """Let the curvature be that of some of the micro-batches' examples: ``choose`` is given their number."""
        edges = [0, *accumulate(int(evaluation.weight) for evaluation in self.evaluations)]
        chosen = choose(edges[-1])
        sample: list[tuple[Closure, float]] = []
        for evaluation, (start, stop) in zip(self.evaluations, pairwise(edges), strict=True):
            examples = [index - start for index in chosen if start <= index < stop]
            assert evaluation.divided is not None
            if examples:
                sample.append((evaluation.divided(examples), float(len(examples))))
        self.take_products_over(sample)

    def choose(self, numbers: Sequence[int]) -> None:
        """Let the curvature be that of some of the micro-batches that were added."""
        self._sample = [self.evaluations[number] for number in numbers]

    def mean(self) -> tuple[float, Tensor]:
        """Loss of all ranks, and their gradient as a local vector. Collective, once.

        Returns:
            Numbers that are not finite where a loss or a gradient is not.
        """
        if self._sample is None:
            self._sample = self.evaluations
        local = [self._losses, self._weight, sum(entry.weight for entry in self._sample), self._passes]
        loss, self._weight, self._sample_weight, passes = self._total(local)
        self.propagations, self._passes = self.propagations + passes, 0.0
        gradient = self._space.sum(self._sum).div_(self._weight)
        self._sum = torch.empty(0)
        return loss / self._weight, gradient

    def product(self, vector: Tensor) -> Tensor:
        """The curvature of all ranks' samples times a local vector, as a local vector. Collective."""
        assert self._sample is not None
        vectors = self._space.views(self._space.gather(vector))
        total = self._space.zeros()
        for evaluation in self._sample:
            graph = evaluation.graph
            if graph is None:
                graph = self._build(evaluation)
                self._passes += 2 * evaluation.weight
                if self._keep_graphs or (self._keep_graphs is None and len(self._sample) == 1):
                    evaluation.graph = graph
            self._space.add(total, graph.product(vectors), evaluation.weight)
            self._passes += 2 * evaluation.weight
        return self._space.sum(total).div_(self._sample_weight)

    def _build(self, evaluation: Evaluation) -> CurvatureGraph:
        with repeating(evaluation.state, self._buffers), torch.enable_grad():
            loss, outputs = unpack(evaluation.closure(), self._curvature)
            return CurvatureGraph(loss, outputs, self.parameters, self._curvature)

    def move(self, parameters: Tensor) -> None:
        """Give the model other parameters, a local vector: graphs of the old ones are void. Collective."""
        self.forget_graphs()
        with torch.no_grad():
            for parameter, value in zip(
                self.parameters, self._space.views(self._space.gather(parameters)), strict=True
            ):
                parameter.copy_(value)
        torch.clear_autocast_cache()  # or a context around the step would go on with copies of the old ones

    def value(self, parameters: Tensor) -> float:
        """The loss with other parameters, given as a local vector, which the model has from now on. Collective."""
        self.move(parameters)
        total = 0.0
        with torch.no_grad():
            for evaluation in self.evaluations:
                with repeating(evaluation.state, self._buffers):
                    value, _ = unpack(evaluation.closure(), "hessian")
                total += evaluation.weight * float(value)
                self._passes += evaluation.weight
        loss, passes = self._total([total, self._passes])
        self.propagations, self._passes = self.propagations + passes, 0.0
        return loss / self._weight

    def _total(self, values: Sequence[float]) -> list[float]:
        total: list[float] = self._transport.total(torch.tensor(values, dtype=torch.float64), "the loss").tolist()
        return total


def mean_loss(closures: Sequence[Closure], weights: Sequence[float]) -> Tensor:
    """The losses' weighted mean where nothing can move; on this rank alone."""
    with torch.no_grad():
        found = [weight * unpack(closure(), "hessian")[0] for closure, weight in zip(closures, weights, strict=True)]
        return torch.stack(found).sum() / sum(weights)


class _WeightNorm(TorchFunctionMode):
    """Weight norm as a quotient: the second derivative of torch's fused operation is wrong (2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            direction, length, *dim = args
            return direction * (length / torch.norm_except_dim(direction, 2, *dim, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


@contextmanager
def computing(model: nn.Module | None = None) -> Iterator[None]:
    """Operations that have a second derivative, and a loss that is computed by the same ones wherever it is compared:
    attention by separate operations, and the weight norm that ``model`` may have."""
    with sdpa_kernel(SDPBackend.MATH), _WeightNorm() if _has_weight_norm(model) else nullcontext():
        yield


def _has_weight_norm(model: nn.Module | None) -> bool:
    """Of either kind; a function costs every operation a call, so not where there is none."""
    return model is not None and any(
        type(each).__name__ in ("_WeightNorm", "WeightNorm")
        for module in model.modules()
        for each in (module, *module._forward_pre_hooks.values())
    )
