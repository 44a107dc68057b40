"""What a user constructs: torch optimizers."""

from lightning_soo.optim.shampoo import Shampoo
from lightning_soo.optim.soap import SOAP

__all__ = ["SOAP", "Shampoo"]
