"""Second-order training with Accelerate: one call in place of ``accelerator.prepare``."""

from __future__ import annotations

from typing import Any

from lightning_soo.config import Config, Source, load_config
from lightning_soo.integrations.accelerate_session import Session


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
