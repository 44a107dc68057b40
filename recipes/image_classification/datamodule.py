"""The batches of a run, divided over the ranks of the trainer."""

from __future__ import annotations

import lightning as L
from data import Augmented, Pictures, split, test_loader, train_loader
from settings import Settings
from torch import Tensor
from torch.utils.data import DataLoader

Loader = DataLoader[tuple[Tensor, Tensor]]


class PictureBatches(L.LightningDataModule):
    """Args: sets: training and test set, as `read` gives them. Training pictures normalise them all."""

    def __init__(self, settings: Settings, sets: tuple[Pictures, Pictures]) -> None:
        super().__init__()
        self.settings, self.classes = settings, sets[0].classes
        training, validation = split(sets[0], settings.train_examples, settings.validation_examples)
        pixels = training.images.float()
        mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
        self.training, self.validation, self.testing = (
            Augmented(pictures, mean, std) for pictures in (training, validation, sets[1])
        )
        # before any process is started, so that what does not divide is said at once
        self.steps = len(train_loader(self.training, settings.batch_size, 1, settings.seed))

    @property
    def pictures(self) -> Pictures:
        return self.training.pictures

    def train_dataloader(self) -> Loader:
        s = self.settings
        return train_loader(self.training, s.batch_size, s.accumulate, s.seed, *self._ranks())

    def val_dataloader(self) -> Loader:
        return test_loader(self.validation, 250, *self._ranks())

    def test_dataloader(self) -> Loader:
        return test_loader(self.testing, 250, *self._ranks())

    def _ranks(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size
