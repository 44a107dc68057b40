"""Collectives, and nothing else."""

from lightning_soo.transport.agreement import AgreementError, agree, entries_of
from lightning_soo.transport.process_group import (
    Arriving,
    Pending,
    Transport,
    gather_objects,
    pack_bytes,
    share_object,
    template_size,
    unpack_bytes,
)
from lightning_soo.transport.waiting import TransportError

__all__ = [
    "AgreementError",
    "Arriving",
    "Pending",
    "Transport",
    "TransportError",
    "agree",
    "entries_of",
    "gather_objects",
    "pack_bytes",
    "share_object",
    "template_size",
    "unpack_bytes",
]
