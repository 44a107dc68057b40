"""Second-order training with the Transformers Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_soo.config import Config, Source, load_config
from lightning_soo.integrations.accelerate_takeover import install as install_accelerate


def second_order(
    method: str | None = None, *, config: Source | Config = None, **options: Any
) -> tuple[type[Any], dict[str, Any]]:
    """For ``Trainer(..., optimizer_cls_and_kwargs=second_order("shampoo", precondition_frequency=50))``.

    The Trainer builds the AdamW of its arguments (or the SGD: ``optim``), with its groups, learning rate, betas, eps
    and weight decay, and that one becomes the second-order optimizer where the engine leaves it.

    Args:
        method: ``"shampoo"``, ``"soap"``, ``"sonew"`` or ``"kfac"``, with ``options`` of its class.
        config: in their place what :func:`lightning_soo.load_config` takes; None is ``SOO_CONFIG``.
        options: also ``monitor`` and ``adopt``.

    Raises:
        ValueError: a configuration that is refused, none at all, or two.
    """
    if method is not None or options:
        if config is not None:
            raise ValueError(f"second_order: give a method with its options, or config={config!r}, not both")
        config = Config.from_mapping({"method": method or "shampoo", **options}, "second_order(...)")
    install()
    return SecondOrderFactory, {"config": config if isinstance(config, Config) else load_config(config)}


def install() -> None:
    """From now on Trainers of this process know second-order optimizers: named parameters, K-FAC's losses, metrics,
    checkpoints of several processes. :func:`second_order` and ``lightning_soo.launch`` call it; it is for a class that
    is given as it is, ``optimizer_cls_and_kwargs=(Shampoo, {"lr": 1e-3})``, and for ``SOO_CONFIG`` or ``optim_args``
    without the launch. Other Trainers are left alone.
    """
    from lightning_soo.integrations.transformers_trainer import install_trainer

    install_accelerate()
    install_trainer()


class SecondOrderFactory:
    """What :func:`second_order` gives in place of an optimizer class; ``Trainer.create_optimizer`` recognises it."""

    def __call__(self, model: nn.Module, *, config: Config) -> Any:
        """
        Raises:
            RuntimeError: called by another than ``Trainer.create_optimizer``, which knows the learning rate.
        """
        raise RuntimeError(
            f"{config.source}: the learning rate and the groups of {type(model).__name__} are known to "
            "Trainer.create_optimizer, but it was not called: a subclass that overrides it has to call "
            "super().create_optimizer()"
        )
