"""What a block costs: flops of its products, and CPU time of its refresh, the measure that ownership is balanced by.

Not bytes: a root costs n^3 and a byte n^2, so ranks that hold equal bytes can differ several times in work. The numbers
are fixed and their arithmetic the same on every machine (sums, products and quotients alone): ranks must agree on the
balance, so nothing here is ever measured at run time. :func:`lightning_soo.planning.machine.measured` is for
predictions alone.
"""

from __future__ import annotations

import math

from lightning_soo.placement.blocks import Block

FLOPS_PER_MILLISECOND_FLOAT32 = 1.0e8
FLOPS_PER_MILLISECOND_FLOAT64 = 0.5e8
# One refresh of an order n on one thread (float64, numpy): a checked decomposition, and the product that builds the
# root. Calls, what memory bounds (n^2 and the reduction to tridiagonal form), and products (n^3); within 16 % of what
# was measured for orders 16 to 2048: 0.10 ms at 16, 0.50 at 64, 7.7 at 256, 234 at 1024, 1811 at 2048.
_CALLS, _SQUARE, _CUBE = 9.0e-2, 7.0e-5, 1.75e-7


def order_milliseconds(order: int) -> float:
    """One refresh of one matrix on one thread of the reference machine."""
    return _CALLS + _SQUARE * order**2 + _CUBE * order**3


def refresh_milliseconds(block: Block) -> float:
    """One refresh of all roots of a block."""
    return sum(order_milliseconds(order) for order in block.orders)


def refresh_flops(block: Block) -> float:
    """Float64 flops of matrix products that take as long as one refresh of a block."""
    return refresh_milliseconds(block) * FLOPS_PER_MILLISECOND_FLOAT64


def product_flops(block: Block) -> float:
    """Flops of one pass along every preconditioned dimension, ``2 numel n`` where that has one matrix of order n."""
    return 2.0 * math.prod(block.shape) * block.products_per_element


def statistics_flops(block: Block) -> float:
    """Flops of one update of a block's statistics, ``unfold(G) unfold(G)^T`` along every preconditioned dimension."""
    return product_flops(block)


def apply_flops(block: Block, passes: int = 1) -> float:
    """Flops of a direction: ``passes`` products along every preconditioned dimension (:func:`apply_passes`)."""
    return passes * product_flops(block)


def apply_passes(method: str, damping_method: str = "exact") -> int:
    """Products along every dimension in one step: Shampoo's with the roots; SOAP turns the gradient and its running
    mean into the basis and the direction out of it; K-FAC into its basis and back, or (``"pi"``) by the inverses."""
    return {"shampoo": 1, "soap": 3, "kfac": 1 if damping_method == "pi" else 2}[method]


def statistics_milliseconds_per_step(block: Block, statistics_frequency: int) -> float:
    """What the keeper of a block's statistics pays per step."""
    return statistics_flops(block) / FLOPS_PER_MILLISECOND_FLOAT32 / statistics_frequency


def home_milliseconds_per_step(block: Block) -> float:
    """What every home of a block pays per step: the apply."""
    return apply_flops(block) / FLOPS_PER_MILLISECOND_FLOAT32
