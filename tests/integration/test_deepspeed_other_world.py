"""DeepSpeed at another number of ranks than a checkpoint was saved with: 2, then 1, then 3, as one plain loop."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun

pytest.importorskip("deepspeed")
sys.path.insert(0, str(Path(__file__).parent))
from other_world import ACCUMULATE, ACROSS, CASES, METHODS, STEPS, plain_loop

from lightning_soo.integrations.deepspeed_other_world import saved_world_size

WORKER = Path(__file__).parent / "worker_deepspeed_other_world.py"


@pytest.mark.skipif(not os.environ.get("SOO_TEST_ALL_ENGINES"), reason="minutes; SOO_TEST_ALL_ENGINES=1")
def test_every_stage(tmp_path: Path) -> None:
    """Weights, moments and all that the engine counts come back, and training goes on as if it had not stopped."""
    for ranks in (2, 1):
        torchrun(WORKER, ranks, tmp_path)
    for file in ("model_states", "optim_states"):  # left from an earlier checkpoint of more ranks
        (tmp_path / "2" / "zero-3" / "the_tag" / f"zero_pp_rank_2_mp_rank_00_{file}.pt").write_bytes(b"stale")
    torchrun(WORKER, 3, tmp_path)
    expected = {method: plain_loop(method) for method in METHODS}
    for ranks, earlier in {2: {0: 0}, 1: {2: 1}, 3: {2: 1, 1: 2}}.items():
        for rank in range(ranks):
            found = torch.load(tmp_path / f"found{ranks}-{rank}.pt", weights_only=True)
            assert set(found) == {*CASES, *(f"{source} -> {name}" for source, _, name in ACROSS[ranks])}
            for name, runs in found.items():
                case = CASES[name.rpartition("-> ")[2]]
                parameters, losses = expected[case.method]
                close = {"rtol": 0.05, "atol": 0.03} if case.is_half else {"rtol": 1e-5, "atol": 1e-5}
                assert set(runs) == set(earlier) or name not in CASES
                for before in runs:
                    epochs = earlier[before]
                    its_parameters, its_losses = runs[before]
                    message = partial("{} of {} from {}, {}: {}".format, rank, ranks, before, name)
                    rest = losses[epochs * STEPS * ACCUMULATE :]
                    torch.testing.assert_close(its_losses, rest, **close, msg=message)
                    torch.testing.assert_close(its_parameters, parameters, **close, msg=message)


class Touches:
    """Executed by whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("size", [2, 300, 70000])
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"])
def test_saved_world_size(tmp_path: Path, size: int, name: str) -> None:
    """What the checkpoint says, whatever else lies there, and nothing is executed; else the files are counted."""
    folder, executed = tmp_path / "tag", tmp_path / "executed"
    assert saved_world_size(tmp_path, "tag") is None
    folder.mkdir()
    state = {"module": {"weight": torch.ones(2)}, "dp_world_size": size, "mine": Touches(executed)}
    torch.save(state, folder / name)
    assert saved_world_size(tmp_path, "tag") is None  # stage 0
    for rank in range(3):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (folder / "expp_rank_0_mp_rank_00_optim_states.pt").touch()
    assert saved_world_size(tmp_path, "tag") == size
    for other in ({"module": {}}, {"dp_world_size": None}):
        torch.save(other, folder / name)
        assert saved_world_size(tmp_path, "tag") == 3
    torch.save(state, folder / name, _use_new_zipfile_serialization=False)
    assert saved_world_size(tmp_path, "tag") == 3
    assert not executed.exists()
