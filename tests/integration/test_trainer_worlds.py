"""``fit(ckpt_path=...)`` goes on from a checkpoint of any other strategy and number of processes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from launching import torchrun
from torch import Tensor
from trainer_worlds import Model, fit, loader

from lightning_soo import CheckpointError
from lightning_soo.callbacks import SecondOrder
from lightning_soo.checkpoint.pieces import whole
from lightning_soo.checkpoint.sources import FolderSource, read_file
from lightning_soo.checkpoint.store import is_store

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
WORKER = Path(__file__).parent / "trainer_worlds.py"
ADOPTING = ["ddp:adamw-1", "fsdp2:adamw-1"]
# one world after the other; what a world reads was written before it
WORLDS = [
    (2, ["fsdp2", "ddp", "fsdp", "fsdp-sharded", "fsdp2:auto-1", "fsdp:auto-1", "ddp:fsdp2-2", *ADOPTING]),
    (3, ["fsdp2:fsdp2-2", "fsdp:fsdp2-2", "ddp:ddp-2", "fsdp2:ddp-2", "stock-ddp:fsdp-sharded-2", "ddp:fsdp-2"]),
]
if HAS_DEEPSPEED:
    WORLDS[0][1].extend(["zero2", "zero3:ddp-2"])
    WORLDS[1][1].extend(["zero3:zero2-2", "fsdp2:zero2-2", "zero2:fsdp2-2"])


def weights(path: Path) -> dict[str, Tensor]:
    """Of a checkpoint, by torch alone where it is a file."""
    if not is_store(path):
        return torch.load(path, weights_only=True)["state_dict"]
    source = FolderSource(path)
    found = {}
    for key, array in source.arrays.items():
        if key.startswith(("model/", "buffer/")):
            value = found[key.split("/", 1)[1]] = torch.empty(array.shape, dtype=array.torch_dtype)
            source.read([whole(key, value)])
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every world; ``auto-1`` is the run of one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("worlds")
    fit("auto", folder / "auto-1", callback={})
    fit("auto", folder / "adamw-1", epochs=1)
    for ranks, tasks in WORLDS:
        torchrun(WORKER, ranks, folder, *tasks)
    return folder


def test_all_end_where_one_process_ends(out: Path) -> None:
    expected = weights(out / "auto-1" / "epoch=1.ckpt")
    runs = sorted(path.name for path in out.iterdir() if "adamw-1" not in path.name)
    assert len(runs) == 1 + sum(len(tasks) for _, tasks in WORLDS) - len(ADOPTING)
    for run in runs:
        found = weights(out / run / "epoch=1.ckpt")
        assert set(found) <= set(expected) and len(found) >= len(expected) - 1, run  # the tied one has one name
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6, msg=f"{run}: {name}")


@pytest.mark.parametrize("source", ["fsdp2-2", "ddp-2", "fsdp-2", "fsdp-sharded-2"])
def test_one_process_goes_on(out: Path, tmp_path: Path, source: str) -> None:
    expected = weights(out / "auto-1" / "epoch=1.ckpt")
    model = fit("auto", tmp_path, path=out / source / "epoch=0.ckpt", model=Model(seed=5), callback={})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6)


def test_validation_reads_a_folder(out: Path) -> None:
    model, path = Model(seed=9), out / "fsdp2-2" / "epoch=1.ckpt"
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        callbacks=[SecondOrder()],
        barebones=False,
    )
    trainer.validate(model, loader(), ckpt_path=path, verbose=False)
    expected = weights(path)
    for name, value in model.state_dict().items():
        if name != "third.weight":  # has one name there
            assert torch.equal(value, expected[name])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 300):  # one byte alone may be padding between two arrays
        data[place] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


@pytest.mark.parametrize("damage", [flipped, truncated])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_damage_is_refused_and_the_model_is_as_it_was(
    out: Path, tmp_path: Path, damage: Callable[[Path], None], kind: str
) -> None:
    import shutil

    bad = tmp_path / "bad.ckpt"
    if kind == "file":
        shutil.copy(out / "auto-1" / "epoch=0.ckpt", bad)
        damage(bad)
    else:
        shutil.copytree(out / "fsdp2-2" / "epoch=0.ckpt", bad)
        damage(next(bad.glob("__1_*.distcp")))
    model = Model(seed=9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"damaged|truncated"):
        fit("auto", tmp_path / "run", path=bad, model=model, callback={})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_first_order_checkpoint_is_taken_on_request(tmp_path: Path) -> None:
    fit("auto", tmp_path / "adamw", epochs=1)
    model = Model(seed=9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "adamw" / "epoch=0.ckpt"
    with pytest.raises(CheckpointError, match="adopt=True"):
        fit("auto", tmp_path / "refused", path=path, model=model, callback={})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # without a preconditioner the moments alone decide: the run is AdamW's own
    options: dict[str, Any] = {"adopt": True, "start_preconditioning_step": 1000}
    taken = fit("auto", tmp_path / "taken", path=path, model=Model(seed=9), callback=options)
    plain = fit("auto", tmp_path / "plain", path=path, model=Model(seed=9))
    for name, value in taken.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_the_callback_adopts_under_strategies_of_ours_too(out: Path, tmp_path: Path) -> None:
    path = out / "adamw-1" / "epoch=0.ckpt"
    expected = fit("auto", tmp_path, path=path, model=Model(seed=5), callback={"adopt": True}).state_dict()
    for run in ADOPTING:
        engine, source = run.split(":")
        found = weights(out / f"{engine}-2-from-{source}" / "epoch=1.ckpt")
        assert len(found) >= len(expected) - 1
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6, msg=f"{run}: {name}")


def test_weights_of_a_file_need_nothing_of_ours(out: Path) -> None:
    found = read_file(out / "ddp-2" / "epoch=1.ckpt")
    Model().load_state_dict(found["state_dict"])
