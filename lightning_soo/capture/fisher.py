"""What a model's outputs are differentiated with, so that the products of gradients make its Fisher information.

Of the loss of one example, which is a mean over its positions ``t`` of ``T`` (tokens), with the outputs ``f``::

    categorical:  -log softmax(f)_y             mc:  softmax(f) - e_y, y drawn from softmax(f)
                                                ggn: sqrt(p_c) (e_c - p) for every class c, p = softmax(f)
    gaussian:     1/2 |f - y|^2                 mc:  standard normal
                                                ggn: e_c for every output c

each divided by ``sqrt(T)``: the outer products have the mean, or the sum, that is the Hessian of the loss in ``f``, and
the number of examples, a loss scale or accumulated micro-batches have no part in it. With several positions the columns
of ``ggn`` have random signs, one for each position, so that products of different positions vanish in the mean; with
one they are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soo.capture.registry import tensors

FISHERS = ("empirical", "mc", "ggn")
LIKELIHOODS = ("categorical", "gaussian")


def output_tensor(output: Any) -> Tensor | None:
    """The logits of a model's output, else its first floating-point tensor that has more than one number."""
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    return next((tensor for tensor in tensors(output) if tensor.is_floating_point() and tensor.ndim > 0), None)


def check_weights_stay(model: nn.Module, fisher: str) -> None:
    """Refuse engines that free weights between the forward and the backward pass, and bring them back but once.

    Raises:
        NotImplementedError: FSDP1, FSDP2 and ZeRO-3, by name.
    """
    parameters = list(model.parameters())
    engine = None
    if any(type(module).__bases__[0].__name__ == "FSDPModule" for module in model.modules()):
        engine = "FSDP2 (fully_shard)"
    elif any(hasattr(parameter, "ds_shape") for parameter in parameters):
        engine = "DeepSpeed ZeRO-3"
    elif any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    ):
        engine = "FSDP1 (FullyShardedDataParallel)"
    if engine is not None:
        raise NotImplementedError(
            f"fisher={fisher!r} differentiates the outputs before the backward pass, and {engine} has freed weights by "
            "then: use fisher='empirical', or DDP, ZeRO-1 or ZeRO-2"
        )


def seeds(output: Tensor, fisher: str, likelihood: str, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Gradients to begin with, each like ``output``, ``(..., classes)``, whose leading dimensions hold ``batch``
    examples."""
    values = output.detach()
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    values = values if values.ndim > 1 else values.unsqueeze(-1)
    rows = values.reshape(-1, values.shape[-1])
    scale = (len(rows) / max(batch, 1)) ** -0.5
    for seed in _rows(rows, fisher, likelihood, len(rows) > batch, generator):
        yield (seed * scale).view_as(output).to(output.dtype)


def _rows(
    rows: Tensor, fisher: str, likelihood: str, has_positions: bool, generator: torch.Generator
) -> Iterator[Tensor]:
    count, classes = rows.shape
    probabilities = rows.softmax(1) if likelihood == "categorical" else None
    if fisher == "mc":
        if probabilities is None:
            yield torch.randn(rows.shape, dtype=rows.dtype, device=rows.device, generator=generator)
        else:
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            yield probabilities.scatter_add(1, drawn, torch.full_like(probabilities[:, :1], -1.0))
        return
    for column in range(classes):
        unit = torch.zeros_like(rows)
        unit[:, column] = 1.0
        root = unit if probabilities is None else probabilities[:, column : column + 1].sqrt() * (unit - probabilities)
        if has_positions:
            sign = torch.randint(0, 2, (count, 1), device=rows.device, generator=generator)
            root = root * (2.0 * sign - 1.0).to(rows.dtype)
        yield root
