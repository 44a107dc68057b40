"""What matrix functions raise where a worker runs them."""

from __future__ import annotations


class MatrixError(ValueError):
    """No usable result.

    Attributes:
        diagnostics: ``condition_number`` and ``residual``, which travel to every rank in place of the result.
    """

    def __init__(self, message: str, diagnostics: dict[str, float]) -> None:
        super().__init__(message)
        self.diagnostics = diagnostics
