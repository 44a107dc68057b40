"""What a Lightning Trainer may not have where an optimizer evaluates the loss itself, and has no learning rate."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    import lightning.pytorch as pl

_PRECISIONS = ("32-true", "64-true", "bf16-mixed")
_CALLBACKS = {
    "LearningRateMonitor": "there is no learning rate; PreconditionerMonitor logs the radius",
    "LearningRateFinder": "there is no learning rate, and the radius finds itself",
    "BatchSizeFinder": "it would train trial steps outside the callback; choose the batch size by hand",
    "StochasticWeightAveraging": "it schedules a learning rate, and there is none; use WeightAveraging",
    "BackboneFinetuning": "it schedules learning rates, and there are none; freeze and unfreeze by BaseFinetuning",
    "SecondOrder": "one callback decides which optimizer trains",
    "SecondOrderByEnvironment": "one opt-in decides which optimizer trains; unset SOO_LIGHTNING",
}


def refuse_trainer(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    """Refuse, before training, what cannot work or would be silently without effect.

    Args:
        name: of what refuses.

    Raises:
        ValueError: a setting of the Trainer, a strategy, or a callback, by name.
        TypeError: a module that optimizes by hand, is compiled, or overrides what is not called.
    """
    if not module.automatic_optimization:
        raise TypeError(
            f"{name}: automatic_optimization=False: let training_step return the loss, which {name} evaluates several "
            "times in every step"
        )
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ == "DeepSpeedStrategy":
            raise ValueError(
                f"{name} cannot train under {type(trainer.strategy).__name__}: DeepSpeed's engine gives no second "
                "derivative. Choose 'ddp', 'soo_fsdp', 'soo_fsdp2' or 'soo_hsdp'"
            )
    if trainer.precision not in _PRECISIONS:
        raise ValueError(
            f"{name}: precision={trainer.precision!r}: parameters have to be float32, and a GradScaler passes no "
            f"closure. Choose one of {', '.join(map(repr, _PRECISIONS))}"
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"{name}: gradient_clip_val={trainer.gradient_clip_val!r}: there is no gradient to clip, the radius bounds "
            "the step. Leave it out"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind in type(callback).__mro__:
            if kind.__name__ in _CALLBACKS:
                raise ValueError(f"{name} does not go with {kind.__name__}: {_CALLBACKS[kind.__name__]}")
    _refuse_module(module, name)


def _refuse_module(module: pl.LightningModule, name: str) -> None:
    for hook in ("backward", "configure_gradient_clipping"):
        owner = next(kind for kind in type(module).__mro__ if hook in vars(kind))
        if owner.__name__ != "LightningModule" or hook in vars(module):
            raise TypeError(f"{name} runs no backward pass of its own: {type(module).__name__} must not define {hook}")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise TypeError(f"{name} runs training_step again on the same batch: it cannot take dataloader_iter")
    compiled = [path or type(module).__name__ for path, inner in module.named_modules() if _is_compiled(inner)]
    if compiled:
        raise TypeError(f"{name}: {compiled[0]} is compiled: what torch.compile makes has no second derivative")


def _is_compiled(module: nn.Module) -> bool:
    by_lightning = getattr(module, "_compiler_ctx", None) is not None
    return by_lightning or module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
