"""Pictures with labels as tensors in memory, and batches of them that depend on seed and epoch alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))

from pictures import FASHION, idx_images, mnist_5k

SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Pictures:
    """Args: images: ``(count, rows, columns, channels)`` in bytes. flips: whether a mirrored picture is as likely."""

    images: Tensor
    labels: Tensor
    flips: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def rows(self) -> int:
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        return self.images.shape[-1]

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def take(self, indices: Tensor) -> Pictures:
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel."""
        pixels = self.images.float()
        return pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))


def cifar10(folder: Path) -> tuple[Pictures, Pictures]:
    """CIFAR-10's binary version: records of a label and 3 x 32 x 32 bytes."""

    def read(paths: list[Path]) -> Pictures:
        records = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3073) for path in paths])
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Pictures(torch.from_numpy(images.copy()), torch.from_numpy(records[:, 0].astype(np.int64)))

    return read(sorted(folder.glob("data_batch_*.bin"))), read([folder / "test_batch.bin"])


def labelled_paths(folder: Path) -> tuple[list[Path], list[int]]:
    """Of ``folder/class/picture.png`` (or .jpg), and the number of each one's class."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir() if path.is_dir())):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise SystemExit(f"{folder} has no pictures: expected {folder}/CLASS/NAME.png or .jpg")
    return paths, labels


def open_picture(path: Path) -> Any:
    """Pillow's, in three colours."""
    try:
        from PIL import Image
    except ImportError as error:
        raise SystemExit("folders of pictures are read with Pillow: pip install pillow") from error
    with Image.open(path) as picture:
        return picture.convert("RGB")


def middle(path: Path, size: int, part: float = 1.0) -> np.ndarray:
    """The square in the middle, of that part of the shorter side, resized to `size`; in bytes."""
    picture = open_picture(path)
    side = min(picture.size) * part
    x, y = ((length - side) / 2 for length in picture.size)
    return np.asarray(picture.resize((size, size), box=(x, y, x + side, y + side)))


def image_folder(folder: Path, size: int) -> Pictures:
    """All of them, their middles."""
    paths, labels = labelled_paths(folder)
    return Pictures(torch.from_numpy(np.stack([middle(path, size) for path in paths])), torch.tensor(labels))


def parts(folder: Path) -> tuple[Path, Path]:
    """``train``, and ``val`` or ``test``."""
    test = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if test is None or not (folder / "train").is_dir():
        raise SystemExit(f"{folder} needs train, and val or test, of one folder a class")
    return folder / "train", test


def read(folder: Path | None, size: int) -> tuple[Pictures, Pictures]:
    """Training and test set.

    Args:
        folder: of MNIST's files, of CIFAR-10's binary version, or with ``train`` and ``val`` (or ``test``) of one
            folder a class; None for Fashion-MNIST where Debian's package put it, else 4,000 digits and 1,000.
        size: to which pictures in folders are resized.
    """
    if folder is None and not FASHION.exists():
        images, labels = mnist_5k()
        digits = Pictures(images[..., None], labels, flips=False)
        order = torch.arange(len(digits))
        return digits.take(order[:4000]), digits.take(order[4000:])
    folder = folder or FASHION
    if next(folder.glob("data_batch_*.bin"), None):
        return cifar10(folder)
    if (folder / "train").is_dir():
        train, test = parts(folder)
        return image_folder(train, size), image_folder(test, size)
    training, testing = (idx_images(folder, part) for part in ("train", "t10k"))
    return Pictures(training[0][..., None], training[1]), Pictures(testing[0][..., None], testing[1])


def split(training: Pictures, train_examples: int, validation_examples: int) -> tuple[Pictures, Pictures]:
    """Training and validation examples of the training set, drawn once: the same for every seed.

    Args:
        train_examples: 0 for all that validation leaves. Where there are fewer than both together, they share what
            there is in the same proportion, and it is said.
    """
    asked = train_examples + validation_examples
    if asked > len(training):
        validation_examples = len(training) * validation_examples // asked
        train_examples = len(training) - validation_examples
        print(f"{len(training)} pictures: {train_examples} for training, {validation_examples} for validation")
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    left = len(training) - validation_examples
    return training.take(order[: train_examples or left]), training.take(order[left:])


@dataclass(frozen=True)
class Part:
    """A batch to be made.

    Args:
        indices: of its pictures, on all ranks together.
        seed: of their crops and flips; None for none.
        rank, ranks: whose share is made: each `ranks`-th picture, cut and flipped as one rank alone would.
    """

    indices: Tensor
    seed: int | None = None
    rank: int = 0
    ranks: int = 1


Loader = DataLoader[tuple[Tensor, Tensor]]


class Batched(Dataset[tuple[Tensor, Tensor]]):
    """Maps a Part to its images and labels."""

    pictures: Any


class Augmented(Batched):
    """Maps a Part to normalised images ``(batch, channels, rows, columns)``, stored channels last, and labels.

    Args:
        padding: by which pictures are enlarged on each side before their own size is cut out at random.
    """

    def __init__(self, pictures: Pictures, mean: Tensor, std: Tensor, padding: int = 2) -> None:
        self.pictures, self.mean, self.std, self.padding = pictures, mean, std, padding
        planes = pictures.images.permute(0, 3, 1, 2)
        self.padded = nn.functional.pad(planes, (padding,) * 4).permute(0, 2, 3, 1).contiguous()

    def __getitem__(self, part: Part) -> tuple[Tensor, Tensor]:
        count, (rows, columns) = len(part.indices), self.pictures.images.shape[1:3]
        own = slice(part.rank, None, part.ranks)
        if part.seed is None:
            images = self.pictures.images[part.indices[own]]
        else:
            generator = torch.Generator().manual_seed(part.seed)
            corners = torch.randint(0, 2 * self.padding + 1, (2, count, 1), generator=generator)
            x = torch.arange(columns).repeat(count, 1)
            if self.pictures.flips:
                x = torch.where(torch.rand(count, 1, generator=generator) < 0.5, x, columns - 1 - x)
            y = corners[0] + torch.arange(rows)
            x = corners[1] + x
            images = self.padded[part.indices[own, None, None], y[own, :, None], x[own, None, :]]
        normalised = (images.float() - self.mean) / self.std
        return normalised.permute(0, 3, 1, 2), self.pictures.labels[part.indices[own]]


class Parts(Sampler[Part]):
    """Batches without replacement, in an order given by seed and epoch; what does not fill a step is left out.

    Args:
        batch_size: of one step; it is cut into `accumulate` parts, of which each of the `ranks` makes its share.
    """

    def __init__(self, count: int, batch_size: int, accumulate: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        if batch_size % (accumulate * ranks):
            devices = f" times {ranks} devices" if ranks > 1 else ""
            raise SystemExit(f"--accumulate {accumulate}{devices} does not divide --batch-size {batch_size}")
        if batch_size > count:
            raise SystemExit(f"--batch-size {batch_size} is more than the {count} training examples")
        self.count, self.size, self.seed, self.epoch = count, batch_size // accumulate, seed, 0
        self.parts, self.rank, self.ranks = count // batch_size * accumulate, rank, ranks

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.parts

    def __iter__(self) -> Iterator[Part]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        seeds = torch.randint(2**62, (self.parts,), generator=generator).tolist()
        for number, seed in enumerate(seeds):
            yield Part(order[number * self.size : (number + 1) * self.size], seed, self.rank, self.ranks)


def train_loader(
    data: Batched, batch_size: int, accumulate: int, seed: int, rank: int = 0, ranks: int = 1, **options: Any
) -> Loader:
    """Args: options: of the DataLoader."""
    sampler = Parts(len(data.pictures), batch_size, accumulate, seed, rank, ranks)
    return DataLoader(data, batch_size=None, sampler=sampler, **options)


def test_loader(data: Batched, batch_size: int = 250, rank: int = 0, ranks: int = 1, **options: Any) -> Loader:
    """Every picture once, as it is; each rank has as many batches as the others, perhaps an empty one."""
    parts = [Part(indices, None, rank, ranks) for indices in torch.arange(len(data.pictures)).split(batch_size)]
    return DataLoader(data, batch_size=None, sampler=parts, **options)
