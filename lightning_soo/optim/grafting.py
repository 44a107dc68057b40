"""The method whose step size is grafted onto the direction, and which moves alone before the first roots.

Moments have AdamW's names (``step``, ``exp_avg``, ``exp_avg_sq``), so the state of an AdamW that is taken over
continues, and every engine saves it as AdamW's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

State = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def filters_gradient(grafting: str | None, betas: tuple[float, float]) -> bool:
    """Whether ``exp_avg`` exists: whenever betas[0] filters, and always for Adam, as in torch."""
    return betas[0] > 0 or grafting == "adam"


def initialise(state: State, parameter: Tensor, grafting: str | None, group: Mapping[str, Any]) -> None:
    """Create what is missing of a parameter's state, parameter-shaped."""
    state.setdefault("step", torch.tensor(0.0, dtype=torch.float32))
    if filters_gradient(grafting, group["betas"]) and "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    if grafting not in (None, "sgd") and "exp_avg_sq" not in state:
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    if group["momentum"] and state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def normalizes(grafting: str | None) -> bool:
    """Whether the graft divides each gradient by its norm."""
    return grafting is not None and grafting.endswith("_normalized")


def update_adam(
    gradients: Sequence[Tensor],
    states: Sequence[State],
    group: Mapping[str, Any],
    *,
    beta2: float,
    use_bias_correction: bool,
    out: Sequence[Tensor],
) -> list[tuple[Tensor, float]]:
    """:func:`update` by Adam of several parameters of one group and device at once, none of them empty.

    Returns:
        Of each what :func:`update` returns.
    """
    beta1 = group["betas"][0]
    on_cpu = gradients[0].device.type == "cpu"
    for tensor in out:
        tensor.zero_()
    # torch's own Adam from zero with learning rate -1 leaves its direction in `out`; fused on the CPU it is one pass
    # over memory where separate operations need eight
    adam(
        list(out),
        list(gradients),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=on_cpu,
        foreach=not on_cpu and len(gradients) > 1,
        amsgrad=False,
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )
    corrections = [1.0 / (1.0 - beta1 ** float(state["step"])) if use_bias_correction else 1.0 for state in states]
    return [(state["exp_avg"], correction) for state, correction in zip(states, corrections, strict=True)]


def update(
    grafting: str | None,
    gradient: Tensor,
    state: State,
    group: Mapping[str, Any],
    *,
    beta2: float,
    use_bias_correction: bool,
    gradient_norm: float,
    out: Tensor,
) -> tuple[Tensor, float]:
    """Advance the moments by one step; write the graft's direction to ``out``.

    Args:
        gradient: dense, laid out like the moments; the local elements of a parameter, perhaps none.
        beta2: decay of the graft's second moment.
        gradient_norm: of the whole parameter; used by the normalised grafts alone.
        out: receives the direction.

    Returns:
        The filtered gradient (``exp_avg``, or the gradient itself) and the factor that corrects its bias.
    """
    beta1, eps = group["betas"][0], group["eps"]
    if gradient.numel() == 0:
        state["step"] += 1
        return gradient, 1.0
    if grafting == "adam":
        (found,) = update_adam(
            [gradient], [state], group, beta2=beta2, use_bias_correction=use_bias_correction, out=[out]
        )
        return found

    state["step"] += 1
    filtered, correction = gradient, 1.0
    if beta1 > 0:
        filtered = state["exp_avg"].lerp_(gradient, 1.0 - beta1)
        if use_bias_correction:
            correction = 1.0 / (1.0 - beta1 ** float(state["step"]))
    if grafting in (None, "sgd"):
        torch.mul(filtered, correction, out=out)
        return filtered, correction
    scale = 1.0
    if normalizes(grafting):
        scale = 1.0 / (gradient_norm + 1e-16)
    second = state["exp_avg_sq"]
    if grafting.startswith("adagrad"):
        second.addcmul_(gradient, gradient, value=scale * scale)
    else:
        second.mul_(beta2).addcmul_(gradient, gradient, value=(1.0 - beta2) * scale * scale)
    torch.sqrt(second, out=out)
    torch.div(filtered, out.add_(eps), out=out)
    out.mul_(correction * scale)
    return filtered, correction
