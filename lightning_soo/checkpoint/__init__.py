"""Preconditioner state as plain data: independent of who owns what."""
