"""The recipe's pictures and network: augmentation against a loop over pictures, file formats, parameters counted."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

RECIPE = Path(__file__).parents[2] / "recipes" / "image_classification"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"image_classification_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


data, model, settings = recipe("data"), recipe("model"), recipe("settings")


def some_pictures(count: int = 40, channels: int = 3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 7, 6, channels), generator=generator, dtype=torch.uint8)
    return data.Pictures(images, torch.arange(count) % 10)


def test_each_picture_is_cut_and_flipped_as_drawn():
    pictures, mean, std = some_pictures(), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    indices = torch.tensor([3, 17, 3, 39])
    images, labels = data.Augmented(pictures, mean, std)[data.Part(indices, seed=5)]
    assert labels.tolist() == [3, 7, 3, 9]
    for image, index in zip(images, indices, strict=True):
        padded = np.pad(pictures.images[index].numpy(), ((2, 2), (2, 2), (0, 0))).astype(np.float32)
        cuts = [padded[y : y + 7, x : x + 6] for y in range(5) for x in range(5)]
        expected = [(cut - mean.numpy()) / std.numpy() for cut in cuts for cut in (cut, cut[:, ::-1])]
        assert sum(np.allclose(image.permute(1, 2, 0), candidate) for candidate in expected) == 1
    assert not torch.equal(images[0], images[2])  # the same picture, drawn twice


def test_batches_depend_on_seed_and_epoch_alone():
    pictures = some_pictures()
    loader = data.train_loader(data.Augmented(pictures, torch.zeros(3), torch.ones(3)), 16, 2, seed=1)
    first, again = list(loader), list(loader)
    assert [len(labels) for _, labels in first] == [8] * 4
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, again, strict=True))
    loader.sampler.set_epoch(1)
    assert not torch.equal(next(iter(loader))[1], first[0][1])
    drawn = torch.cat([part.indices for part in loader.sampler])
    assert len(drawn.unique()) == 32


@pytest.mark.parametrize(("asked", "given"), [((20, 10), (20, 10)), ((0, 10), (40, 10)), ((80, 20), (40, 10))])
def test_validation_examples_are_not_trained_on(asked, given):
    training, validation = data.split(data.Pictures(torch.arange(50).view(50, 1, 1, 1), torch.arange(50)), *asked)
    assert (len(training), len(validation)) == given
    assert not set(training.labels.tolist()) & set(validation.labels.tolist())


def test_cifar_records(tmp_path):
    records = np.random.default_rng(0).integers(0, 10, (5, 3073), dtype=np.uint8)
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        records.tofile(tmp_path / name)
    training, testing = data.read(tmp_path, 32)
    assert training.images.shape == (10, 32, 32, 3) and len(testing) == 5
    assert testing.labels.tolist() == records[:, 0].tolist()
    assert testing.images[4, 30, 7, 1] == records[4, 1 + 1024 + 30 * 32 + 7]


def test_mnist_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6), dtype=np.uint8)
    for part in ("train", "t10k"):
        header = np.array([2051, 4, 5, 6], ">u4").tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([3, 1, 4, 1])))
    training, _ = data.read(tmp_path, 32)
    assert training.labels.tolist() == [3, 1, 4, 1]
    assert np.array_equal(training.images[..., 0], images)


def test_folders_of_pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            image.fromarray(np.full((40, 60, 3), 100 * label, np.uint8)).save(tmp_path / part / name / "a.png")
    training, _ = data.read(tmp_path, 32)
    assert training.images.shape == (2, 32, 32, 3)
    assert training.labels.tolist() == [0, 1] and training.images[1].unique().tolist() == [100]


@pytest.mark.parametrize("normalization", ["batch", "none"])
def test_the_network_of_the_paper(normalization):
    network = model.ResNet20(3, 10, normalization=normalization)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20
    assert sum(layer.weight.numel() for layer in layers) == 268_336  # the paper's 0.27 million
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    logits = network(images)
    assert logits.shape == (8, 10)
    nn.functional.cross_entropy(logits, torch.arange(8)).backward()
    for layer in layers:  # every output channel learns from the beginning
        assert layer.weight.grad.flatten(1).norm(dim=1).min() > 0
    if normalization == "none":
        inside = {id(p) for layer in layers for p in layer.parameters()}
        assert all(id(p) in inside for p in network.parameters())
        stem = torch.relu(network.stem(images))
        assert 0.3 < network.blocks(stem).square().mean() / stem.square().mean() < 10


def test_settings_are_read_back_as_written():
    written = settings.Settings(optimizer="kfac", lr=3e-4, batch_size=2048, normalization="none")
    assert settings.Settings.parse(str(written)) == written
