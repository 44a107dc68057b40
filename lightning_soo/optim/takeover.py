"""Turn a first-order optimizer into a preconditioned one in place, so that schedulers and references stay valid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn

from lightning_soo.naming import nearest
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.kfac import KFAC
from lightning_soo.optim.shampoo import Shampoo
from lightning_soo.optim.soap import SOAP
from lightning_soo.optim.sonew import SONew

METHODS: dict[str, type[SecondOrderOptimizer]] = {"shampoo": Shampoo, "soap": SOAP, "sonew": SONew, "kfac": KFAC}
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# promises of fused and capturable kernels on the instance; GradScaler would leave unscaling to us
_PROMISES = (
    "_step_supports_amp_scaling",
    "_need_device_dtype_check_for_fused",
    "_warned_capturable_if_run_uncaptured",
)
# what the old optimizer says in its groups and the new one cannot do
_REFUSED = ("amsgrad", "maximize", "differentiable")


def take_over(
    optimizer: torch.optim.Optimizer, method: str, options: dict[str, Any], model: nn.Module | None = None
) -> SecondOrderOptimizer:
    """Make ``optimizer`` (AdamW, Adam or SGD) a second-order one: the same object, groups, settings and moments.

    AdamW and Adam become the Adam graft; SGD becomes the SGD graft with its momentum after grafting, but K-FAC keeps
    its own step size in place of SGD's. Options given explicitly win over what is taken. Converting twice does nothing.

    Raises:
        TypeError: another optimizer, or a setting that has no counterpart.
        ValueError: unknown method.
    """
    if isinstance(optimizer, SecondOrderOptimizer):
        return optimizer
    if method not in METHODS:
        raise ValueError(f"method={method!r}{instead_of(method)}")
    kind = type(optimizer)
    if kind not in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        raise TypeError(
            f"cannot take over {kind.__module__}.{kind.__qualname__}: torch.optim.AdamW, Adam and SGD can be; "
            "construct lightning_soo.Shampoo yourself otherwise"
        )
    for number, group in enumerate(optimizer.param_groups):
        for name in _REFUSED:
            if group.get(name):
                raise TypeError(f"cannot take over {kind.__name__} with {name}=True (parameter group {number})")
    sgd = kind is torch.optim.SGD
    if sgd and METHODS[method] not in (Shampoo, KFAC):
        raise TypeError(
            f"{METHODS[method].__name__} has Adam's step size and cannot take over SGD: use AdamW, or Shampoo or KFAC"
        )
    first = optimizer.defaults
    settings: dict[str, Any] = {"lr": first["lr"], "weight_decay": first["weight_decay"]}
    if sgd:
        settings |= {name: first[name] for name in ("momentum", "dampening", "nesterov")}
        settings |= {"betas": (0.0, 0.999), "decoupled_weight_decay": False}
        if METHODS[method] is Shampoo:
            settings["grafting"] = "sgd"
    else:
        decoupled = bool(first.get("decoupled_weight_decay", kind is torch.optim.AdamW))
        settings |= {"betas": first["betas"], "eps": first["eps"], "decoupled_weight_decay": decoupled}
        if METHODS[method] is KFAC:  # learning rates of AdamW are those of its step size
            settings |= {"grafting": "adam", "momentum": 0.0}
    cls = METHODS[method]
    groups, state = optimizer.param_groups, optimizer.state
    explicit = {name: value for name, value in options.items() if name in settings}
    for group in groups:
        group.update(explicit)
    # build a throw-away one first: an invalid option must leave the user's optimizer as it was
    cls([dict(group) for group in groups], **{**settings, **options})
    hooks = {name: getattr(optimizer, name) for name in _HOOKS if hasattr(optimizer, name)}
    counted = vars(optimizer).pop("step", None)
    for name in _PROMISES:
        vars(optimizer).pop(name, None)
    optimizer.__class__ = cls
    cls.__init__(optimizer, groups, **{**settings, **options})  # type: ignore[arg-type]
    assert isinstance(optimizer, cls)
    optimizer.state.update(state)
    for name, value in hooks.items():
        setattr(optimizer, name, value)
    if counted is not None:
        _count_steps(optimizer)
    if model is not None:
        optimizer.remember(model)
    return optimizer


def check_method(method: str | None, options: Mapping[str, Any]) -> None:
    """Refuse a bad method or option here and now; None is no method, and has no options.

    Raises:
        ValueError: unknown method, or an option's value, or options without a method.
        TypeError: unknown option, with the nearest name.
    """
    if method is None:
        if options:
            raise ValueError(f"method=None takes nothing over and has no options, got {', '.join(options)}")
        return
    if method not in METHODS:
        raise ValueError(f"method={method!r}{instead_of(method)}")
    METHODS[method]([nn.Parameter(torch.zeros(2, 2))], **options)


def instead_of(method: str) -> str:
    """What to say after an unknown method's name."""
    if "trust" in method.lower() or "newton" in method.lower():
        return (
            ": trust-region Newton-CG takes no AdamW's settings over (it has no learning rate, and evaluates the loss "
            "itself). Use lightning_soo.callbacks.TrustRegion with a Trainer, or construct "
            "lightning_soo.TrustRegionNewtonCG in a loop of your own"
        )
    return nearest(method, METHODS)


def find_optimizers(configured: Any) -> Iterable[torch.optim.Optimizer]:
    """Every optimizer in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(configured, torch.optim.Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from find_optimizers(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for item in configured:
            yield from find_optimizers(item)


def _count_steps(optimizer: torch.optim.Optimizer) -> None:
    """Learning-rate schedulers wrap ``step`` on the instance to see that it is called before them; do it again."""
    function = type(optimizer).step

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return function(optimizer, *args, **kwargs)

    wrapper._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = wrapper  # type: ignore[method-assign]
