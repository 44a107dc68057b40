"""Second-order training with DeepSpeed: one call in place of ``deepspeed.initialize``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lightning_soo.config import ENVIRONMENT_VARIABLE, Config, Source
from lightning_soo.integrations.cpu import skip_compilation
from lightning_soo.integrations.deepspeed_config import (
    SECTION,
    accept_optimizer,
    check_deepspeed_config,
    find_second_order,
    read_deepspeed_config,
)
from lightning_soo.integrations.deepspeed_optimizer import optimizer_from_json
from lightning_soo.integrations.deepspeed_session import EngineSession
from lightning_soo.optim.base import SecondOrderOptimizer


def initialize(*arguments: Any, soo: Source | Config = None, **options: Any) -> tuple[Any, Any, Any, Any]:
    """As ``deepspeed.initialize``, with the AdamW, Adam or SGD that it is given made into a second-order optimizer.

    The optimizer may be an object, which stays the same object, a function of the parameters, or the ``"optimizer"`` of
    the configuration; learning rate, decay, groups and schedulers stay as they are. The engine's ``save_checkpoint``
    and ``load_checkpoint`` then cover the preconditioners, rank 0 prints the plan at the first step, and ``destroy``
    stops background work. A second-order optimizer of your own is only attached; then nothing else may opt in.

    Args:
        arguments: of ``deepspeed.initialize``, whose configuration has the key ``"soo"``: the method and its options.
        soo: in place of that key, what :func:`lightning_soo.load_config` takes; None is the environment variable
            ``SOO_CONFIG``.
        options: of ``deepspeed.initialize``.

    Returns:
        What ``deepspeed.initialize`` does: engine, its optimizer, data loader and scheduler.

    Raises:
        ValueError: a configuration that is refused, none at all, or two; a feature of DeepSpeed's that does not work
            here.
        TypeError: an optimizer that cannot be taken over, or a model in a pipeline.
    """
    import deepspeed

    given = inspect.signature(deepspeed.initialize).bind(*arguments, **options).arguments
    _check_device(deepspeed)
    _check_model(deepspeed, given)
    config, name = _read_config(given)
    session = EngineSession(find_second_order(config, name, soo), clips_by_default="gradient_clipping" not in config)
    check_deepspeed_config(config, name)
    given["optimizer"] = _optimizer(session, given.get("optimizer"), config, name)
    accept_optimizer(config)
    given["config"] = config
    with _only_config(given.get("args")):
        returned: tuple[Any, Any, Any, Any] = deepspeed.initialize(**given)
    session.adopt(returned[0])
    return returned


def _optimizer(session: EngineSession, given: Any, config: dict[str, Any], name: str) -> Any:
    """What DeepSpeed is to be given; an ``"optimizer"`` that is built here is taken out of ``config``.

    Raises:
        ValueError: nothing to take over, or nothing that says how.
    """
    if given is None and config.get("optimizer") is None:
        raise ValueError(
            f'no optimizer to take over: give initialize() an AdamW, Adam or SGD, or {name} an "optimizer" such as '
            '{"type": "AdamW", "params": {"lr": 0.001}}'
        )
    if session.config is None and not isinstance(given, SecondOrderOptimizer):
        raise ValueError(
            f'no configuration of second order: give {name} the key "{SECTION}", such as {{"method": "shampoo"}}, call '
            f"initialize(..., {SECTION}=...), or set the environment variable {ENVIRONMENT_VARIABLE}"
        )
    if isinstance(given, torch.optim.Optimizer):
        return session.take_over(given)
    if given is not None:
        return session.after(given)
    return session.after(optimizer_from_json(config.pop("optimizer"), name))


def _read_config(given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Of whichever of DeepSpeed's three arguments has it.

    Raises:
        ValueError: none has, or two have.
    """
    arguments = given.get("args")
    named = {
        "config": given.get("config"),
        "config_params": given.pop("config_params", None),
        "args.deepspeed_config": getattr(arguments, "deepspeed_config", None),
        "args.deepscale_config": getattr(arguments, "deepscale_config", None),
    }
    found = {key: value for key, value in named.items() if value is not None}
    if not found:
        raise ValueError("no DeepSpeed configuration: give config=..., or launch with --deepspeed_config")
    if len(found) > 1:
        raise ValueError(f"several DeepSpeed configurations: {' and '.join(found)}. Give one")
    return read_deepspeed_config(*found.values())


@contextmanager
def _only_config(arguments: Any) -> Iterator[None]:
    """Within it ``args`` name no configuration, which DeepSpeed refuses beside the one that was read from there."""
    names = [name for name in ("deepspeed_config", "deepscale_config") if hasattr(arguments, name)]
    before = {name: getattr(arguments, name) for name in names}
    try:
        for name in names:
            setattr(arguments, name, None)
        yield
    finally:
        for name, value in before.items():
            setattr(arguments, name, value)


def _check_model(deepspeed: Any, given: Mapping[str, Any]) -> None:
    """
    Raises:
        TypeError: parallelism in which a rank does not see whole layers.
    """
    if isinstance(given.get("model"), deepspeed.PipelineModule):
        raise TypeError(
            "a PipelineModule cannot be trained by second order here: use a plain model, and ZeRO stage 1, 2 or 3"
        )
    sizes = [
        getattr(given.get("mpu"), name, int)()
        for name in ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size")
    ]
    if max(sizes) > 1:
        raise TypeError(
            f"mpu: model parallelism of {max(sizes)} ranks is not supported, since a rank would see slices of layers: "
            "use ZeRO stage 1, 2 or 3"
        )


def _check_device(deepspeed: Any) -> None:
    """
    Raises:
        ValueError: a device that nothing here was written for.
    """
    device = deepspeed.accelerator.get_accelerator().device_name()
    if device not in ("cuda", "cpu"):
        raise ValueError(
            f"DeepSpeed runs on {device!r}: GPUs (cuda) and CPUs (cpu) are supported. Set DS_ACCELERATOR before "
            "deepspeed is imported to choose"
        )
    if device == "cpu":
        skip_compilation()
