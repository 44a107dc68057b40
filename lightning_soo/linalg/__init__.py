"""Matrix functions. numpy only where a background worker runs them; no process group, no framework."""

from lightning_soo.linalg.inverse_roots import InverseRoot, InverseRootError, inverse_root

__all__ = ["InverseRoot", "InverseRootError", "inverse_root"]
