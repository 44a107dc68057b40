"""Pictures in folders that do not fit into memory: read, cut out and resized when a batch needs them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from data import Batched, Part, labelled_paths, middle, open_picture
from torch import Tensor

SAMPLE = 1000  # pictures of which mean and standard deviation are taken


@dataclass(frozen=True)
class PictureFiles:
    """As ``Pictures``, on disk. Args: size: rows and columns of what is made of each."""

    paths: list[Path]
    labels: Tensor
    size: int
    channels: int = 3

    @classmethod
    def of(cls, folder: Path, size: int) -> PictureFiles:
        """``folder/class/picture.png`` (or .jpg)."""
        paths, labels = labelled_paths(folder)
        return cls(paths, torch.tensor(labels), size)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def rows(self) -> int:
        return self.size

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def take(self, indices: Tensor) -> PictureFiles:
        return replace(self, paths=[self.paths[i] for i in indices.tolist()], labels=self.labels[indices])

    def middle(self, index: int) -> np.ndarray:
        """The middle of one picture: 7/8 of its shorter side."""
        return middle(self.paths[index], self.size, 7 / 8)

    def cutting(self, index: int, draws: list[float]) -> np.ndarray:
        """A part of 8 to 100 % of one picture's area, at most 4:3 or 3:4, and mirrored half of the time (Szegedy et al.
        2014, section 6).

        Args:
            draws: five numbers from 0 to 1: area, shape, column, row, mirror.
        """
        area, shape, column, row, mirror = draws
        picture = open_picture(self.paths[index])
        columns, rows = picture.size
        ratio = (4 / 3) ** (2 * shape - 1)
        surface = (0.08 + 0.92 * area) * columns * rows
        width, height = min(columns, math.sqrt(surface * ratio)), min(rows, math.sqrt(surface / ratio))
        x, y = column * (columns - width), row * (rows - height)
        cut = np.asarray(picture.resize((self.size, self.size), box=(x, y, x + width, y + height)))
        return cut[:, ::-1] if mirror < 0.5 else cut

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, of a sample drawn once."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        pixels = torch.from_numpy(np.stack([self.middle(i) for i in order.tolist()])).float()
        return pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))


class Decoded(Batched):
    """Maps a Part to normalised images ``(batch, channels, rows, columns)``, stored channels last, and labels."""

    def __init__(self, pictures: PictureFiles, mean: Tensor, std: Tensor) -> None:
        self.pictures, self.mean, self.std = pictures, mean, std

    def __getitem__(self, part: Part) -> tuple[Tensor, Tensor]:
        own = part.indices[part.rank :: part.ranks]
        if part.seed is None:
            images = [self.pictures.middle(i) for i in own.tolist()]
        else:
            generator = torch.Generator().manual_seed(part.seed)
            draws = torch.rand(len(part.indices), 5, generator=generator, dtype=torch.float64)
            chosen = draws[part.rank :: part.ranks].tolist()
            images = [self.pictures.cutting(i, drawn) for i, drawn in zip(own.tolist(), chosen, strict=True)]
        shape = (len(own), self.pictures.size, self.pictures.size, self.pictures.channels)
        pixels = torch.from_numpy(np.array(images, np.uint8).reshape(shape)).float()
        return ((pixels - self.mean) / self.std).permute(0, 3, 1, 2), self.pictures.labels[own]
