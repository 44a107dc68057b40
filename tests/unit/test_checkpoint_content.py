"""What a checkpoint holds goes to where it belongs: by name, as of its step, on the disk that was meant."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from lightning_soo import (
    SOAP,
    BackgroundSaver,
    CheckpointError,
    Shampoo,
    SONew,
    load_checkpoint,
    newest_complete,
    save_checkpoint,
)
from lightning_soo.callbacks import SecondOrder
from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.sources import load_plain
from lightning_soo.config import load_config

KINDS = {"shampoo": Shampoo, "soap": SOAP, "sonew": SONew}


class Pair(nn.Module):
    """Two layers of one shape, declared in one order or the other."""

    def __init__(self, *order: str) -> None:
        super().__init__()
        for name in order:
            torch.manual_seed(ord(name))
            self.add_module(name, nn.Linear(5, 5))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).tanh() @ self.k(3 * x).T


def groups_of(model: Pair, *order: str) -> list[dict[str, Any]]:
    """A group for each layer, with settings of its own."""
    decay = {"q": 0.3, "k": 0.0}
    named = {name: [(f"{name}.{n}", p) for n, p in getattr(model, name).named_parameters()] for name in order}
    return [{"params": named[name], "weight_decay": decay[name]} for name in order]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("way", ["state_dict", "folder"])
@pytest.mark.parametrize("what", ["model", "parameters", "groups"])
@pytest.mark.parametrize("method", KINDS)
def test_another_order_changes_nothing(method: str, what: str, way: str, tmp_path: Path) -> None:
    def make(*order: str) -> tuple[Pair, Any]:
        model = Pair(*order)
        given: Any = {"model": model, "parameters": model.named_parameters(), "groups": groups_of(model, *order)}[what]
        return model, KINDS[method](given, lr=0.02)

    model, optimizer = make("q", "k")
    train(model, optimizer, 0, 7)
    other, again = make("k", "q")
    if way == "folder":
        save_checkpoint(tmp_path / "saved", model, optimizer)
        load_checkpoint(tmp_path / "saved", other, again)
    else:
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 7, 12)
    train(other, again, 7, 12)
    expected = dict(model.named_parameters())
    for name, value in other.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13)
    optimizer.close()
    again.close()


class Scaled(nn.Linear):
    """With something beside parameters and buffers, as fp8 layers have it."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale, self.history = torch.ones(2), [1.0]

    def get_extra_state(self) -> Any:
        return {"scale": self.scale, "history": self.history}

    def set_extra_state(self, state: Any) -> None:
        self.scale, self.history = state["scale"], state["history"]


def test_extra_states_of_modules_are_kept(tmp_path: Path) -> None:
    model = nn.Sequential(Scaled(), nn.Linear(3, 2))
    optimizer = Shampoo(model)
    model[0].scale, model[0].history = torch.tensor([2.0, 3.0]), [1.0, 4.0]
    save_checkpoint(tmp_path / "saved", model, optimizer)
    other = nn.Sequential(Scaled(), nn.Linear(3, 2))
    report, _ = load_checkpoint(tmp_path / "saved", other, Shampoo(other))
    assert report.is_complete and torch.equal(other[0].scale, model[0].scale) and other[0].history == [1.0, 4.0]
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(CheckpointError, match="extra state of 0"):
        load_checkpoint(tmp_path / "saved", plain, Shampoo(plain))
    report, _ = load_checkpoint(tmp_path / "saved", plain, Shampoo(plain), strict=False)
    assert list(report.ignored) == ["extra state of 0"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = Shampoo(model)
    (tmp_path / "disk").mkdir()
    (tmp_path / "last").symlink_to(tmp_path / "disk" / "last")
    for step in range(3):
        save_checkpoint(tmp_path / "last", model, optimizer, extra={"step": step})
        assert load_checkpoint(tmp_path / "last", model, optimizer)[1] == {"step": step}
    assert (tmp_path / "last").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["last"]


def test_urls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 3)
    for call in (
        lambda: save_checkpoint("s3://bucket/step-1", model, Shampoo(model)),
        lambda: load_checkpoint("s3://bucket/step-1", model, Shampoo(model)),
        lambda: newest_complete("gs://bucket"),
        lambda: save_checkpoint("s3://bucket/step-1", model, Shampoo(model), background=BackgroundSaver()),
    ):
        with pytest.raises(CheckpointError, match=r"://bucket.*to a disk that every rank sees"):
            call()
    assert not list(tmp_path.iterdir())


def test_what_is_saved_in_the_background_is_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, losses, go = nn.Linear(3, 3), [1.0], threading.Event()
    optimizer, saver = Shampoo(model), BackgroundSaver()
    write = store.save

    def later(*given: Any, **named: Any) -> None:
        go.wait(20)
        write(*given, **named)

    monkeypatch.setattr(store, "save", later)
    save_checkpoint(tmp_path / "saved", model, optimizer, extra={"losses": losses}, background=saver)
    losses.append(2.0)
    go.set()
    saver.close()
    assert load_checkpoint(tmp_path / "saved", model, optimizer)[1] == {"losses": [1.0]}


def test_further_files_may_lie_in_folders(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)

    def further(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocabulary.txt").write_text("a b c")

    save_checkpoint(tmp_path / "saved", model, Shampoo(model), files=further)
    load_checkpoint(tmp_path / "saved", model, Shampoo(model))
    (tmp_path / "saved" / "tokenizer" / "vocabulary.txt").write_text("a b")
    with pytest.raises(CheckpointError, match=r"tokenizer/vocabulary.txt"):
        load_checkpoint(tmp_path / "saved", model, Shampoo(model))


class WithPath(BoringModel):
    def __init__(self, where: Path) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_objects_beside_the_weights_are_read_where_they_are_trusted(tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> None:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            limit_train_batches=2,
            limit_val_batches=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[SecondOrder(workers="inline")],
        )
        trainer.fit(WithPath(tmp_path), **options)
        trainer.save_checkpoint(tmp_path / "run.ckpt")

    fit(1)
    with pytest.raises(CheckpointError, match=r"no plain data.*weights_only=False"):
        fit(2, ckpt_path=tmp_path / "run.ckpt")
    fit(2, ckpt_path=tmp_path / "run.ckpt", weights_only=False)
    with pytest.raises(CheckpointError, match="weights_only=False"):
        load_plain(tmp_path / "run.ckpt")


def test_a_long_line_is_no_name_of_a_file() -> None:
    entries = ",".join(f"{{match: layer{number}, method: none}}" for number in range(30))
    found = load_config(f"method=shampoo,overrides=[{entries}]")
    assert len(found.options["overrides"]) == 30


def test_weights_may_be_less_strict_than_what_trains(tmp_path: Path) -> None:
    trained = nn.Linear(3, 3)
    whole = nn.ModuleDict({"trained": trained})
    save_checkpoint(tmp_path / "saved", whole, Shampoo(trained.named_parameters("trained")))
    model = nn.ModuleDict({"trained": nn.Linear(3, 3), "frozen": nn.Linear(3, 3).requires_grad_(False)})
    optimizer = Shampoo(model["trained"].named_parameters("trained"))
    with pytest.raises(CheckpointError, match=r"frozen\.weight"):
        load_checkpoint(tmp_path / "saved", model, optimizer)
    report, _ = load_checkpoint(tmp_path / "saved", model, optimizer, strict_weights=False)
    assert sorted(report.anew) == ["frozen.bias", "frozen.weight"]
    assert torch.equal(model["trained"].weight, trained.weight)
    wider = nn.ModuleDict({"trained": nn.Linear(3, 4)})
    with pytest.raises(CheckpointError, match=r"trained\.weight"):
        load_checkpoint(tmp_path / "saved", wider, Shampoo(wider), strict_weights=False)
