"""What a block costs: flops of its products, and CPU time of its refresh, the measure that ownership is balanced by.

Not bytes: a root costs n^3 and a byte n^2, so ranks that hold equal bytes can differ several times in work. The table
is fixed and its arithmetic the same on every machine (sums, products and quotients alone): ranks must agree on the
balance, so nothing here is ever measured at run time. :func:`lightning_soo.planning.machine.measured` is for
predictions alone.
"""

from __future__ import annotations

import bisect
import math

from lightning_soo.placement.blocks import Block

FLOPS_PER_MILLISECOND_FLOAT32 = 1.0e8
FLOPS_PER_MILLISECOND_FLOAT64 = 0.5e8
# One refresh of an order (checked decomposition and the product that builds the root, float64, numpy, one thread) in
# units of the 2 n^3 flops of a matrix product: measured on a current server core, dear when small. In between linear.
REFRESH_ORDERS = (16, 32, 64, 128, 256, 512, 1024, 2048)
REFRESH_PRODUCTS = (640.0, 117.0, 48.0, 22.0, 12.0, 7.5, 5.4, 5.2)


def refresh_products(order: int) -> float:
    """Matrix products of order ``order`` that take as long as one refresh of it."""
    if order <= REFRESH_ORDERS[0]:  # calls, not flops
        return REFRESH_PRODUCTS[0] * (REFRESH_ORDERS[0] / order) ** 3
    if order >= REFRESH_ORDERS[-1]:
        return REFRESH_PRODUCTS[-1]
    above = bisect.bisect_left(REFRESH_ORDERS, order)
    low, high = REFRESH_ORDERS[above - 1], REFRESH_ORDERS[above]
    share = (order - low) / (high - low)
    return REFRESH_PRODUCTS[above - 1] * (1.0 - share) + REFRESH_PRODUCTS[above] * share


def order_milliseconds(order: int) -> float:
    """One refresh of one matrix on one thread of the reference machine."""
    return 2.0 * order**3 * refresh_products(order) / FLOPS_PER_MILLISECOND_FLOAT64


def refresh_milliseconds(block: Block) -> float:
    """One refresh of all roots of a block."""
    return sum(order_milliseconds(order) for order in block.orders)


def refresh_flops(block: Block) -> float:
    """Flops of the matrix products that take as long as one refresh of a block, in float64."""
    return sum(2.0 * order**3 * refresh_products(order) for order in block.orders)


def product_flops(block: Block) -> float:
    """Flops of one pass of ``2 numel n`` per preconditioned dimension."""
    return 2.0 * math.prod(block.shape) * sum(block.orders)


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
