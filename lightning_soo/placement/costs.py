"""What a block costs, in milliseconds of one CPU thread: the measure that ownership is balanced by.

Not bytes: a root costs n^3 and a byte n^2, so ranks that hold equal bytes can differ several times in work. The rates
are those of one current server core; only ratios matter for the balance.
"""

from __future__ import annotations

import bisect
import math

from lightning_soo.placement.blocks import Block

FLOPS_PER_MILLISECOND_FLOAT32 = 1.0e8
FLOPS_PER_MILLISECOND_FLOAT64 = 0.5e8
# float64 eigh in units of one n x n matrix product, measured (numpy, one thread): dear when small
_EIGH_ORDERS = (32, 64, 128, 256, 512)
_EIGH_PRODUCTS = (25.0, 13.0, 10.0, 7.0, 4.5)


def refresh_milliseconds(block: Block) -> float:
    """One refresh of all roots of a block: ``eigh`` and the product that builds the root, in float64."""
    total = 0.0
    for order in block.orders:
        products = _EIGH_PRODUCTS[min(bisect.bisect_left(_EIGH_ORDERS, order), len(_EIGH_PRODUCTS) - 1)] + 1.0
        total += 2.0 * order**3 * products / FLOPS_PER_MILLISECOND_FLOAT64
    return total


def product_flops(block: Block) -> float:
    """Flops of one pass of ``2 numel n`` per preconditioned dimension: one statistics update, or one apply."""
    return 2.0 * math.prod(block.shape) * sum(block.orders)


def statistics_milliseconds_per_step(block: Block, statistics_frequency: int) -> float:
    """What the keeper of a block's statistics pays per step."""
    return product_flops(block) / FLOPS_PER_MILLISECOND_FLOAT32 / statistics_frequency


def home_milliseconds_per_step(block: Block) -> float:
    """What every home of a block pays per step: the apply."""
    return product_flops(block) / FLOPS_PER_MILLISECOND_FLOAT32
