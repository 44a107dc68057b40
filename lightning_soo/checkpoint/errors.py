"""What is wrong with a checkpoint, and what to do about it."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, foreign or of another model; nothing was changed."""
