"""Before a plan's first collective: do all ranks mean the same thing?

Ranks that differ would not fail, they would hang or reset each other's connections. So a fixed number of hashes is
exchanged first, and a rank whose own preparation failed says so here instead of leaving its peers waiting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from lightning_soo.transport.process_group import Transport


class AgreementError(RuntimeError):
    """Ranks differ, or one failed; raised on every rank."""


def agree(transport: Transport, sections: Mapping[str, str], error: BaseException | None = None) -> None:
    """Compare sections over all ranks.

    Args:
        sections: name -> text that must be the same everywhere; the same names in the same order on every rank.
        error: what went wrong on this rank while preparing; its text replaces every section.

    Raises:
        AgreementError: names the first differing section and the ranks, or the ranks that failed.
    """
    if transport.size == 1:
        if error is not None:
            raise error
        return
    row = [int(error is not None)]
    row += [_hash(text) for text in sections.values()] if error is None else [0] * len(sections)
    rows = transport.all_gather_integers(row)
    failed = [rank for rank, other in enumerate(rows) if other[0]]
    if failed:
        if error is not None:
            raise error
        raise AgreementError(f"rank {failed} could not prepare its plan; that rank's own error says why")
    for index, name in enumerate(sections, start=1):
        reference = rows[0][index]
        differing = [rank for rank, other in enumerate(rows) if other[index] != reference]
        if differing:
            raise AgreementError(
                f"{name} of rank {differing} differs from rank 0's; here (rank {transport.rank}) it is "
                f"{sections[name][:400]}"
            )


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
