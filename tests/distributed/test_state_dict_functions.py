"""``torch.distributed.checkpoint.state_dict``: get_optimizer_state_dict and set_optimizer_state_dict."""

from __future__ import annotations

from pathlib import Path

from launching import torchrun


def test_preconditioners_travel_in_optimizer_states() -> None:
    torchrun(Path(__file__).parent / "worker_state_dict.py", 2)
