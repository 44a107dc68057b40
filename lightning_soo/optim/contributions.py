"""What layers have seen in one step, added up over all data ranks where it is kept.

Every rank sends its sums of a block to the block's keeper: as many bytes as a reduce-scatter, but each keeper adds in
the order of ranks, and a rank where a layer did not run sends zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_soo.capture.factors import FactorSums
from lightning_soo.capture.recorder import Recorder
from lightning_soo.optim.outcomes import array_templates, pack_array, unpack_array
from lightning_soo.preconditioners.layer_factors import LayerFactorsBlock
from lightning_soo.transport import Arriving, Transport

COUNTS = 2  # rows in the input factors, examples


class Contributions:
    """Factors of one step on their way to the ranks that keep them; collective.

    Args:
        blocks: those that some rank has seen; the same on every rank.
        keepers: block key -> the rank that gets its factors.
        gradient_scale: square of what the losses were divided by.
    """

    def __init__(
        self,
        transport: Transport,
        blocks: Mapping[str, LayerFactorsBlock],
        keepers: Mapping[str, int],
        recorder: Recorder,
        *,
        gradient_scale: float,
    ) -> None:
        self._transport, self._gradient_scale = transport, gradient_scale
        self._kept = {key: block for key, block in blocks.items() if keepers[key] == transport.rank}
        self._arriving: Arriving | None = None
        self._own: dict[str, list[Tensor]] = {}
        if transport.size == 1:
            for key, block in blocks.items():
                sums = recorder.sums[block.layer.layer]
                assert sums.inputs is not None and sums.gradients is not None
                arrays = [array.to(block.device) for array in block.select(sums.inputs, sums.gradients)]
                self._own[key] = _factors(arrays, sums.positions, recorder.examples, gradient_scale)
            return
        if not blocks:
            return
        dtype = max((block.statistics_dtype for block in blocks.values()), key=lambda dtype: dtype.itemsize)
        pieces: list[list[Tensor]] = [[] for _ in range(transport.size)]
        for key, block in blocks.items():
            pieces[keepers[key]] += _packed(block, recorder.sums[block.layer.layer], recorder.examples, dtype)
        sent = [sum(piece.numel() for piece in own) for own in pieces]
        flat = torch.cat([piece.reshape(-1) for own in pieces for piece in own])
        self._arriving = transport.start_exchange(flat, sent, [sent[transport.rank]] * transport.size, "the factors")

    def finish(self) -> dict[str, list[Tensor]]:
        """Wait for what is kept here: block key -> its factors over all examples of all ranks."""
        if self._arriving is None:
            return self._own
        arrived = self._arriving.wait().view(self._transport.size, -1)
        total = arrived[0].clone()
        for part in arrived[1:]:
            total += part
        found, start = {}, 0
        for key, block in self._kept.items():
            layouts = block.statistics_layouts(block.block)
            positions, examples = total[start : start + COUNTS].tolist()
            start += COUNTS
            arrays = []
            for layout, (shape, _) in zip(layouts, array_templates(layouts, total.dtype), strict=True):
                count = math.prod(shape)
                array = unpack_array(total[start : start + count].view(shape), layout)
                arrays.append(array.to(block.statistics_dtype))
                start += count
            found[key] = _factors(arrays, positions, examples, self._gradient_scale)
        return found


def _packed(block: LayerFactorsBlock, sums: FactorSums, examples: int, dtype: torch.dtype) -> list[Tensor]:
    layouts = block.statistics_layouts(block.block)
    counts = torch.tensor([sums.positions, examples], dtype=dtype, device=block.device)
    if sums.gradients is None:
        zeros = [torch.zeros(shape, dtype=dtype, device=block.device) for shape, _ in array_templates(layouts, dtype)]
        return [counts, *zeros]
    arrays = zip(block.select(sums.inputs or (), sums.gradients), layouts, strict=True)
    # an engine that offloads keeps parameters elsewhere than it computes
    return [counts, *(pack_array(array.to(block.device, dtype), layout) for array, layout in arrays)]


def _factors(arrays: Sequence[Tensor], positions: float, examples: float, gradient_scale: float) -> list[Tensor]:
    """Means: of gradients over examples, of inputs over rows."""
    gradients, *inputs = arrays
    return [gradients * (gradient_scale / max(examples, 1.0)), *(factor / max(positions, 1.0) for factor in inputs)]
