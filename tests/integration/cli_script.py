"""A program that does not know of second order."""

import lightning as L
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, DistributedSampler
from worker_trainer import BATCH, Model, make_data


class Data(L.LightningDataModule):
    """Rank r of 2 gets rows r, r + 2, ..."""

    def train_dataloader(self) -> DataLoader:
        data, trainer = make_data(), self.trainer
        return DataLoader(data, BATCH, sampler=DistributedSampler(data, trainer.world_size, trainer.global_rank, False))


if __name__ == "__main__":
    LightningCLI(Model, Data)
