"""Micro-batches of a Lightning Trainer, for an optimizer that evaluates its loss again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_soo.integrations.trainer_evaluation import once_more
from lightning_soo.optim.repetition import RandomState
from lightning_soo.optim.sub_batches import batch_size, take
from lightning_soo.optim.trust_region import TrustRegionNewtonCG

if TYPE_CHECKING:
    import lightning.pytorch as pl


class MicroBatches:
    """In place of backward passes, the optimizer is given what ``training_step`` returned and a way to run it again.

    The Trainer itself runs ``training_step`` first, once for every micro-batch, so that everything is logged once.
    From here to :meth:`close` the strategy's ``training_step`` and the module's ``backward`` are replaced.

    Args:
        optimizer: attached to the strategy's model.
    """

    def __init__(self, trainer: pl.Trainer, optimizer: TrustRegionNewtonCG) -> None:
        self._trainer, self._optimizer = trainer, optimizer
        self._strategy, self._module = trainer.strategy, trainer.lightning_module
        self._training_step: Callable[..., Any] = self._strategy.training_step
        self._evaluated: tuple[Any, RandomState, tuple[Any, ...]] | None = None
        optimizer.closure_collects = True
        self._strategy.training_step = self.evaluate  # type: ignore[method-assign]
        self._module.backward = self.collect  # type: ignore[method-assign]

    def close(self) -> None:
        """Leave strategy, module and optimizer as they were; a step that has begun is not taken. Local."""
        for owner, name in ((self._strategy, "training_step"), (self._module, "backward")):
            vars(owner).pop(name, None)
        self._evaluated = None
        self._optimizer.abandon()
        self._optimizer.closure_collects = False

    def evaluate(self, *batch: Any) -> Any:
        """The strategy's ``training_step``, with whole parameters; its arguments are the module's."""
        self._optimizer.gather().release_graphs()
        state = RandomState.capture(self._strategy.root_device)
        result = self._training_step(*batch)
        if result is None:  # skipped, in one process; earlier micro-batches stay
            self._optimizer.pause()
        else:
            self._evaluated = result, state, batch
        return result

    def collect(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The module's ``backward``. ``loss`` is divided by the number of micro-batches, which are weighted here.

        Raises:
            ValueError: a batch that cannot be divided, with ``hessian_fraction``.
        """
        assert self._evaluated is not None
        result, state, (batch, *rest) = self._evaluated
        self._evaluated = None
        fraction = self._optimizer.options.hessian_fraction
        divided = None
        try:
            weight = float(batch_size(batch))
        except ValueError as error:
            weight = 1.0
            if fraction < 1:
                raise ValueError(
                    f"hessian_fraction={fraction}: {error}. With a Trainer: let the examples be the first dimension of "
                    "every tensor of the batch, or choose hessian_fraction=1"
                ) from None
        if fraction < 1:
            divided = partial(self._part, batch, rest)
        closure = partial(self._again, batch, *rest)
        self._optimizer.collect_evaluated(result, state, closure, weight, divided)
        if self._trainer.fit_loop._should_accumulate():
            self._optimizer.pause()  # the model may be validated or saved before the next one

    def _again(self, *batch: Any) -> Any:
        return once_more(self._module, self._training_step, *batch)

    def _part(self, batch: Any, rest: Sequence[Any], examples: Sequence[int]) -> Callable[[], Any]:
        return partial(self._again, take(batch, examples), *rest)
