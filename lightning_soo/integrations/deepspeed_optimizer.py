"""The ``"optimizer"`` of a DeepSpeed json as torch's optimizer with the same settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_soo.naming import nearest

TYPES = ("AdamW", "Adam", "SGD")
# what DeepSpeed's kernels are told and no step depends on
_WITHOUT_EFFECT = ("foreach", "fused", "capturable", "set_grad_none", "fp32_optimizer_states")


def optimizer_from_json(section: Any, name: str) -> Callable[[Any], torch.optim.Optimizer]:
    """A function of parameters or groups that builds what DeepSpeed would have built, in torch.

    DeepSpeed's rules hold: names of Adam in any case, ``"Adam"`` is AdamW unless ``adam_w_mode`` is false, and no
    weight decay where none is given (with ``torch_adam`` torch's own default).

    Raises:
        ValueError: an optimizer that cannot be taken over, or a setting that it does not have, with the nearest name.
    """
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise ValueError(f'{name}: "optimizer" must be an object with a "type", such as {{"type": "AdamW"}}')
    kind, settings = section["type"], dict(section.get("params") or {})
    where = f'{name}: "optimizer" of type {kind!r}'
    if kind.lower() not in ("adamw", "adam") and kind != "SGD":
        raise ValueError(
            f"{where} cannot be taken over: {', '.join(TYPES)} can be{nearest(kind, TYPES)}. Other first-order "
            'optimizers train without "soo"'
        )
    if "max_grad_norm" in settings:
        raise ValueError(f'{where}: max_grad_norm is DeepSpeed\'s "gradient_clipping", beside "optimizer"')
    cls: type[torch.optim.Optimizer] = torch.optim.SGD
    known = ["lr", "momentum", "dampening", "weight_decay", "nesterov"]
    if kind != "SGD":
        decoupled = settings.pop("adam_w_mode", True) or kind.lower() == "adamw"
        cls = torch.optim.AdamW if decoupled else torch.optim.Adam
        known = ["lr", "betas", "eps", "weight_decay"]
        if not settings.pop("bias_correction", True):
            raise ValueError(f"{where}: bias_correction=False has no counterpart: remove it")
        if settings.pop("amsgrad", False):
            raise ValueError(f"{where}: amsgrad has no counterpart: remove it")
        if not settings.pop("torch_adam", False):
            settings.setdefault("weight_decay", 0.0)
    for key in _WITHOUT_EFFECT:
        settings.pop(key, None)
    for key in settings:
        if key not in known:
            raise ValueError(f"{where} has no setting {key!r}{nearest(str(key), known)}")
    try:
        cls([torch.zeros(1)], **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None

    def build(parameters: Any) -> torch.optim.Optimizer:
        return cls(parameters, **settings)

    return build
