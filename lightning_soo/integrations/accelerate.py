"""Second-order training with Accelerate: one call in place of ``accelerator.prepare``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_soo.config import Config, Source, load_config
from lightning_soo.integrations.accelerate_session import Session
from lightning_soo.integrations.session import innermost
from lightning_soo.optim.layered import LayeredOptimizer


def prepare(accelerator: Any, *objects: Any, config: Source | Config = None, **options: Any) -> Any:
    """As ``accelerator.prepare``, with the AdamW, Adam or SGD among ``objects`` made into a second-order optimizer.

    It stays the same object, so schedulers and other references to it stay valid, and so do its learning rate, decay
    and parameter groups. Models and optimizers may be prepared together or one after the other (each by this
    function). ``accelerator.save_state`` and ``load_state`` then cover the preconditioners, ``accumulate`` and gradient
    scaling are known to K-FAC, and the main process prints the plan at the first step. A second-order optimizer of
    your own is only attached; then there must be no ``config``.

    Args:
        accelerator: an ``accelerate.Accelerator``: one process, DDP, FSDP 1 or 2, HSDP, or DeepSpeed's ZeRO 1 to 3.
        objects: what ``accelerator.prepare`` takes.
        config: what :func:`lightning_soo.load_config` takes; None is the environment variable ``SOO_CONFIG``.
        options: ``device_placement``.

    Raises:
        ValueError: a configuration that is refused, none at all, or two.
        TypeError: an optimizer that cannot be taken over.
        RuntimeError: processes were started, but Accelerate does not connect them.
    """
    parsed = config if isinstance(config, Config) or config is None else load_config(config)
    return Session.of(accelerator, parsed).prepare(objects, options)


def evaluate_with(optimizer: Any, evaluate: Callable[[], Tensor]) -> None:
    """Say how the loss of the step's batch is computed once more, which K-FAC's ``adaptive_damping`` asks for.

    Once before the loop is enough where ``evaluate`` sees the loop's variables: ``evaluate_with(optimizer, lambda:
    loss_of(model, batch))``. Not needed where the model returns the loss itself.

    Args:
        optimizer: what :func:`prepare` returned, or an optimizer inside it.
        evaluate: returns this rank's loss, not divided for accumulation, by the prepared model; it is called twice
            every ``adaptive_damping["interval"]`` steps, on every rank, without gradients.

    Raises:
        TypeError: not a ``KFAC``.
    """
    inner = innermost(optimizer)
    if not isinstance(inner, LayeredOptimizer):
        raise TypeError(
            f"{type(inner).__name__} has no adaptive damping: evaluate_with takes the KFAC that prepare() returned"
        )
    inner.evaluate = evaluate
