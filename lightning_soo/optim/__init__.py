"""What a user constructs: torch optimizers."""

from lightning_soo.optim.shampoo import Shampoo

__all__ = ["Shampoo"]
