"""What a user constructs: torch optimizers."""

from lightning_soo.optim.shampoo import Shampoo
from lightning_soo.optim.soap import SOAP
from lightning_soo.optim.sonew import SONew

__all__ = ["SOAP", "SONew", "Shampoo"]
