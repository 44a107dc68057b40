"""What is owned by whom, and why: pure and deterministic, no process group."""
