"""The batches of a run, divided over the ranks of the trainer."""

from __future__ import annotations

import lightning as L
from data import Augmented, Batched, Loader, Pictures, split, test_loader, train_loader
from files import Decoded, PictureFiles
from settings import Settings
from torch import Tensor

Sets = tuple[Pictures, Pictures] | tuple[PictureFiles, PictureFiles]
EVALUATED = 250  # pictures in a batch without gradients, on all ranks together


class PictureBatches(L.LightningDataModule):
    """Training pictures give mean and standard deviation of them all.

    Args:
        sets: training and test set.
        data_workers: processes of each rank that make batches; 0 for none.
    """

    def __init__(self, settings: Settings, sets: Sets, data_workers: int = 0) -> None:
        super().__init__()
        self.settings, self.classes = settings, sets[0].classes
        self.options = {"num_workers": data_workers, "persistent_workers": data_workers > 0}
        training, validation = split(sets[0], settings.train_examples, settings.validation_examples)
        statistics = training.statistics()
        self.training, self.validation, self.testing = (
            _batched(pictures, *statistics) for pictures in (training, validation, sets[1])
        )
        # before any process is started, so that what does not divide is said at once
        self.steps = len(train_loader(self.training, settings.batch_size, settings.accumulate, settings.seed))
        self.steps //= settings.accumulate

    def train_dataloader(self) -> Loader:
        s = self.settings
        return train_loader(self.training, s.batch_size, s.accumulate, s.seed, *self._ranks(), **self.options)

    def val_dataloader(self) -> Loader:
        return test_loader(self.validation, EVALUATED, *self._ranks(), **self.options)

    def test_dataloader(self) -> Loader:
        return test_loader(self.testing, EVALUATED, *self._ranks(), **self.options)

    def _ranks(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size


def _batched(pictures: Pictures | PictureFiles, mean: Tensor, std: Tensor) -> Batched:
    return (Decoded if isinstance(pictures, PictureFiles) else Augmented)(pictures, mean, std)
