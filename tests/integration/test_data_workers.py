"""The cores of data loading processes are not given to refresh workers, wherever the loader comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soo import Shampoo
from lightning_soo.callbacks import SecondOrder
from lightning_soo.refresh import workers


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(400, 300)  # large enough for processes to be worth it

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        rows = batch if isinstance(batch, list) else next(iter(batch.values()))
        return self.net(rows[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class Source:
    """Loaders as a data module or a module gives them; counts how often it is asked."""

    asked = 0

    def train_dataloader(self) -> Any:
        self.asked += 1
        return {"a": loader(2), "b": loader(1)}


class Data(Source, L.LightningDataModule):
    pass


class ModelWithData(Source, Model):
    pass


class ModelWithSchedule(ModelWithData):
    """Asks for the loaders before ``fit`` starts, as users of OneCycleLR do."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 1
        return super().configure_optimizers()


def loader(processes: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(8, 400)), batch_size=4, num_workers=processes)


@pytest.mark.parametrize("source", ["fit", "combined", "data module", "module", "schedule", "no processes"])
def test_cores_of_data_workers_are_not_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """With five cores beside torch's threads, three loading processes leave two."""
    monkeypatch.setattr(workers, "available_cores", lambda: torch.get_num_threads() + 5)
    model: Model = {"module": ModelWithData, "schedule": ModelWithSchedule}.get(source, Model)()
    data: Any = {
        "fit": {"a": loader(3)},
        "combined": CombinedLoader({"a": loader(2), "b": loader(1)}),
        "data module": Data(),
        "no processes": loader(0),
    }.get(source)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, callbacks=[SecondOrder()],
    )  # fmt: skip
    trainer.fit(model, data)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, Shampoo)
    spare = 5 if source == "no processes" else 2
    assert f"roots: {spare} background processes ({spare} of" in optimizer.plan_table()
    for asked in (model, data):
        assert getattr(asked, "asked", 1) == 1
