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
from lightning_soo.transport import Transport

_COUNTS = 2  # rows in the input factors, examples


def add_up(
    transport: Transport,
    blocks: Mapping[str, LayerFactorsBlock],
    keepers: Mapping[str, int],
    recorder: Recorder,
    *,
    gradient_scale: float,
) -> dict[str, list[Tensor]]:
    """Factors of this step over all examples of all ranks. Collective.

    Args:
        blocks: those that some rank has seen; the same on every rank.
        keepers: block key -> the rank that gets its factors.
        gradient_scale: square of what the losses were divided by.

    Returns:
        Block key -> its factors, where they are kept.
    """
    if not blocks:
        return {}
    found = {}
    if transport.size == 1:
        for key, block in blocks.items():
            sums = recorder.sums[block.layer.layer]
            assert sums.gradients is not None
            arrays = block.select(sums.inputs or (), sums.gradients)
            found[key] = _factors(arrays, sums.positions, recorder.examples, gradient_scale)
        return found
    dtype = max((block.statistics_dtype for block in blocks.values()), key=lambda dtype: dtype.itemsize)
    device = next(iter(blocks.values())).device
    ranks = range(transport.size)
    pieces: list[list[Tensor]] = [[] for _ in ranks]
    for key, block in blocks.items():
        pieces[keepers[key]] += _packed(block, recorder.sums[block.layer.layer], recorder.examples, dtype)
    sent = [sum(piece.numel() for piece in own) for own in pieces]
    flat = torch.cat([piece.reshape(-1) for own in pieces for piece in own])
    received = [sent[transport.rank]] * transport.size
    arrived = transport.start_exchange(flat.to(device), sent, received).wait().view(transport.size, -1)
    total = arrived[0].clone()
    for part in arrived[1:]:
        total += part
    start = 0
    for key, block in blocks.items():
        if keepers[key] != transport.rank:
            continue
        layouts = block.statistics_layouts(block.block)
        positions, examples = total[start : start + _COUNTS].tolist()
        start += _COUNTS
        arrays = []
        for layout, (shape, _) in zip(layouts, array_templates(layouts, dtype), strict=True):
            count = math.prod(shape)
            arrays.append(unpack_array(total[start : start + count].view(shape), layout).to(block.statistics_dtype))
            start += count
        found[key] = _factors(arrays, positions, examples, gradient_scale)
    return found


def _packed(block: LayerFactorsBlock, sums: FactorSums, examples: int, dtype: torch.dtype) -> list[Tensor]:
    layouts = block.statistics_layouts(block.block)
    counts = torch.tensor([sums.positions, examples], dtype=dtype, device=block.device)
    if sums.gradients is None:
        zeros = [torch.zeros(shape, dtype=dtype, device=block.device) for shape, _ in array_templates(layouts, dtype)]
        return [counts, *zeros]
    arrays = zip(block.select(sums.inputs or (), sums.gradients), layouts, strict=True)
    return [counts, *(pack_array(array.to(dtype), layout) for array, layout in arrays)]


def _factors(arrays: Sequence[Tensor], positions: float, examples: float, gradient_scale: float) -> list[Tensor]:
    """Means: of gradients over examples, of inputs over rows."""
    gradients, *inputs = arrays
    return [gradients * (gradient_scale / max(examples, 1.0)), *(factor / max(positions, 1.0) for factor in inputs)]
