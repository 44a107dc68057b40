"""``nn.MultiheadAttention``: projections of queries, keys and values, packed in one weight or not, and of the output.

The module calls ``torch.nn.functional.linear`` on its weights itself, so no hook of a module sees what goes into them:
while its ``forward`` runs that function is replaced by one that looks at the weight it is given.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from lightning_soo.capture.parameters import find_tensor
from lightning_soo.capture.registry import LayerPart, LayerRule, Record, by_example, register


class AttentionRule(LayerRule):
    """Four parts, ``q``, ``k``, ``v`` and ``out``; ``bias_k`` and ``bias_v`` have none."""

    kinds = (nn.MultiheadAttention,)
    covers_children = True

    def parts(self, module: Any) -> list[LayerPart]:
        width = module.embed_dim
        bias = "in_proj_bias" if module.in_proj_bias is not None else None
        found = []
        for index, (key, inputs) in enumerate((("q", width), ("k", module.kdim), ("v", module.vdim))):
            rows = index * width, (index + 1) * width
            packed = module.in_proj_weight is not None
            found.append(
                LayerPart(
                    key=key,
                    weight="in_proj_weight" if packed else f"{key}_proj_weight",
                    bias=bias,
                    rows=rows if packed else (0, width),
                    bias_rows=rows,
                    inputs=inputs,
                )
            )
        bias = "out_proj.bias" if module.out_proj.bias is not None else None
        return [*found, LayerPart(key="out", weight="out_proj.weight", bias=bias, rows=(0, width), inputs=width)]

    def inputs(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        return by_example(values, batch)

    def gradients(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        return by_example(values, batch)

    def watch(self, module: nn.Module, record: Record) -> list[RemovableHandle]:
        parts = self.parts(module)
        running: list[_Watching] = []

        def before(module: nn.Module, positional: tuple[Any, ...]) -> None:
            # torch.compile would take the whole of it for one operation, with nothing to see inside
            if "torch._dynamo" in sys.modules:
                torch._dynamo.eval_frame.skip_code(nn.MultiheadAttention.forward.__code__)
            running.append(_Watching(module, parts, record))

        def after(module: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
            running.pop().stop()

        return [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True),  # also when forward raises
        ]


class _Watching:
    """One call of ``forward``."""

    def __init__(self, module: nn.Module, parts: list[LayerPart], record: Record) -> None:
        self._module, self._parts, self._record = module, parts, record
        self._thread = threading.get_ident()
        self._examples = 0
        self._linear = nn.functional.linear
        nn.functional.linear = self._watched  # type: ignore[assignment]

    def stop(self) -> None:
        nn.functional.linear = self._linear

    @_disable_dynamo
    def _watched(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = self._linear(values, weight, bias)
        if threading.get_ident() != self._thread:
            return result
        pick: dict[str, Callable[[Tensor], Tensor]] = {}
        for part in self._parts:
            whole = find_tensor(self._module, part.weight)
            if whole.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                continue
            first = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
            if first <= part.rows[0] and part.rows[1] <= first + weight.shape[0]:
                pick[part.key] = self._picker(slice(part.rows[0] - first, part.rows[1] - first))
        if pick:
            # always (positions, examples, width) here; the output projection sees the first two as one
            self._examples = values.shape[1] if values.ndim == 3 else self._examples
            self._record(self._by_example(values), result, pick)
        return result

    def _picker(self, rows: slice) -> Callable[[Tensor], Tensor]:
        return lambda gradient: self._by_example(gradient)[..., rows]

    def _by_example(self, values: Tensor) -> Tensor:
        return values.reshape(-1, self._examples, values.shape[-1]).transpose(0, 1)


register(AttentionRule())
