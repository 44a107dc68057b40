"""The recipe's pictures and networks: augmentation against a loop over pictures, file formats, parameters counted, and
what ranks share against what one process has."""

from __future__ import annotations

import argparse
import gzip

import numpy as np
import pytest
import torch
from recipe_modules import flat, load
from torch import nn

data, model, settings, resnet50, vit = load("image_classification", "data", "model", "settings", "resnet50", "vit")


@pytest.fixture
def on_path():
    with flat("image_classification") as module:
        yield module


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


def test_ranks_share_the_batches_of_one_process():
    pictures = data.Augmented(some_pictures(), torch.zeros(3), torch.ones(3))
    whole = list(data.train_loader(pictures, 12, 2, seed=3))
    shares = [list(data.train_loader(pictures, 12, 2, seed=3, rank=rank, ranks=3)) for rank in range(3)]
    assert [len(labels) for share in shares for _, labels in share] == [2] * 6 * 3
    for number, (images, labels) in enumerate(whole):
        for place in range(6):  # dealt in turns, cut and flipped as in one process
            image, label = (one[place // 3] for one in shares[place % 3][number])
            assert torch.equal(image, images[place]) and label == labels[place]
    with pytest.raises(SystemExit, match="--accumulate 2 times 4 devices does not divide --batch-size 12"):
        data.train_loader(pictures, 12, 2, seed=3, rank=0, ranks=4)


def test_every_rank_evaluates_as_many_batches():
    pictures = some_pictures(41)
    augmented = data.Augmented(pictures, torch.zeros(3), torch.ones(3))
    shares = [list(data.test_loader(augmented, 10, rank, ranks=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [5] * 3  # the last picture makes two batches empty
    labels = torch.cat([labels for share in shares for _, labels in share])
    assert labels.sort().values.tolist() == pictures.labels.sort().values.tolist()


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


def test_pictures_on_demand(tmp_path, on_path):
    image = pytest.importorskip("PIL.Image")
    files, batched = on_path("files"), on_path("data")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(4):  # red grows along columns, green along rows, blue is the number
            y, x = np.mgrid[:40, :60]
            pixels = np.stack([4 * x, 6 * y, np.full_like(x, 10 * (4 * label + number))], -1).astype(np.uint8)
            image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    pictures = files.PictureFiles.of(tmp_path, 8)
    assert pictures.labels.tolist() == [0] * 4 + [1] * 4
    decoded = files.Decoded(pictures, torch.zeros(3), torch.ones(3))
    images, labels = decoded[batched.Part(torch.tensor([6, 1]))]
    assert images.shape == (2, 3, 8, 8) and labels.tolist() == [1, 0]
    assert images[:, 2].flatten(1).unique(dim=1).tolist() == [[60], [10]]
    # the middle 35 x 35: columns 12.5 to 47.5, in eighths
    expected = 4 * (12.5 + 35 / 8 * (torch.arange(8) + 0.5) - 0.5)
    assert torch.allclose(images[0, 0].mean(0), expected, atol=1.5)
    part = batched.Part(torch.arange(8), seed=3)
    images, labels = decoded[part]
    mirrored = images[:, 0, :, -1].mean(1) < images[:, 0, :, 0].mean(1)
    assert 0 < mirrored.sum() < 8
    columns, rows = ((images[:, i].amax((1, 2)) - images[:, i].amin((1, 2))) / (4, 6)[i] * 8 / 7 for i in (0, 1))
    assert (columns * rows / 2400 > 0.06).all() and (columns * rows / 2400 < 1.1).all()
    assert (images[:, 1, -1] >= images[:, 1, 0]).all() and len(columns.unique()) > 4
    shares = [decoded[batched.Part(torch.arange(8), 3, rank, 2)] for rank in range(2)]
    for rank, (share, own) in enumerate(shares):
        assert torch.equal(share, images[rank::2]) and torch.equal(own, labels[rank::2])
    empty, none = decoded[batched.Part(torch.arange(1), None, 1, 2)]
    assert empty.shape == (0, 3, 8, 8) and len(none) == 0


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


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_vision_transformer_of_the_paper():
    none, one = (count(vit.VisionTransformer(3, 1000, 224, 16, 768, depth, 12)) for depth in (0, 1))
    assert none + 12 * (one - none) == 86_567_656  # the paper's 86 million
    patches, positions, classifier = 64 * 16 + 64, 64 + 50 * 64, 64 * 10 + 10
    block = 4 * 64 + (64 * 192 + 192) + (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64)
    network = vit.VisionTransformer(1, 10, 28, patch=4, width=64, depth=4, heads=4)
    assert count(network) == patches + positions + 4 * block + 2 * 64 + classifier
    assert {type(m).__name__ for m in network.blocks} == set(network._no_split_modules)
    with pytest.raises(ValueError, match="patches of 5 do not divide pictures of 28 rows"):
        vit.VisionTransformer(1, 10, 28, patch=5)


def test_the_vision_transformer_is_torchs_encoder_over_patches():
    torch.manual_seed(0)
    network = vit.VisionTransformer(3, 5, 8, patch=4, width=12, depth=1, heads=3)
    nn.init.normal_(network.classifier.weight)
    nn.init.normal_(network.token)
    block = network.blocks[0]
    layer = nn.TransformerEncoderLayer(12, 3, 48, 0.0, nn.functional.gelu, 1e-6, batch_first=True, norm_first=True)
    for ours, theirs in (
        (block.out, layer.self_attn.out_proj),
        (block.feed_forward[0], layer.linear1),
        (block.feed_forward[2], layer.linear2),
        (block.attention_norm, layer.norm1),
        (block.feed_forward_norm, layer.norm2),
    ):
        theirs.load_state_dict(ours.state_dict())
    layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data = block.qkv.weight.data, block.qkv.bias.data
    images = torch.randn(2, 3, 8, 8)
    kernel = network.embedding.weight.flatten(1)
    rows = [network.token[0].expand(2, -1)]
    for y in (0, 4):
        for x in (0, 4):
            rows.append(images[:, :, y : y + 4, x : x + 4].flatten(1) @ kernel.T + network.embedding.bias)
    encoded = layer(torch.stack(rows, 1) + network.position)
    expected = network.classifier(network.norm(encoded[:, 0]))
    assert torch.allclose(network(images), expected, atol=1e-5)


def test_resnet_50():
    network = resnet50.ResNet50(3, 1000, 224)
    assert count(network) == 25_557_032  # torchvision's
    kernels = [m.kernel_size[0] for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [kernels.count(size) for size in (7, 3, 1)] == [1, 16, 2 * 16 + 4]  # 4 in shortcuts, not counted in 50
    assert {type(m).__name__ for m in network.blocks} == set(network._no_split_modules)
    for pixels, rows in ((224, 7), (32, 4)):
        small = resnet50.ResNet50(1, 10, pixels, width=4)
        assert small.blocks(small.stem(torch.randn(2, 1, pixels, pixels))).shape == (2, 128, rows, rows)


def test_the_callback_takes_over_what_the_options_say(on_path):
    pytest.importorskip("lightning")
    optimizers, named = on_path("optimizers"), on_path("settings")
    take_over = on_path("lightning_soo.optim.takeover").take_over
    for name, grafting, kind in (
        ("shampoo", "sgd", torch.optim.SGD),
        ("shampoo", "adam", torch.optim.AdamW),
        ("soap", "sgd", torch.optim.AdamW),
        ("sonew", "sgd", torch.optim.AdamW),
    ):
        chosen = named.Settings(optimizer=name, grafting=grafting, lr=0.03, beta2=0.9, precondition_frequency=7)
        network = model.ResNet20(1, 10, width=2)
        optimizer = optimizers.make_optimizer(network, chosen)
        assert type(optimizer) is kind
        (callback,) = optimizers.second_order_callbacks(chosen, "inline")
        optimizer = take_over(optimizer, callback.method, dict(callback.options), network)
        assert optimizer.method == name and optimizer.defaults["lr"] == 0.03
        assert optimizer.defaults["betas"][1] == 0.9
        if name == "shampoo":
            assert optimizer.options.grafting == grafting and optimizer.options.precondition_frequency.max == 7
        if name != "sonew":
            assert optimizer.options.start == 7  # "0 for the interval"
    assert optimizers.second_order_callbacks(named.Settings(), "inline") == []


def test_a_strategy_alone_takes_nothing_over(on_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    scaling = on_path("scaling")
    for name, devices, kind in (("auto", 2, "SecondOrderDDPStrategy"), ("soo_hsdp", 4, "SecondOrderFSDP2Strategy")):
        strategy = scaling.Scaling(name, devices).trainer_options(8)["strategy"]
        assert type(strategy).__name__ == kind and strategy.method is None
    assert strategy.replicate_size == "auto"
    assert scaling.Scaling().trainer_options(8)["strategy"] == "auto"
    with pytest.raises(SystemExit, match="--strategy soo_zero: there are soo_ddp, "):
        scaling.Scaling("soo_zero").trainer_options(8)


def test_what_was_tuned_for_the_model_and_the_optimizer_counts(on_path):
    presets, named = on_path("presets"), on_path("settings")
    parser = argparse.ArgumentParser()
    named.add_options(parser)

    def chosen(options, preset="small"):
        return named.chosen(parser.parse_args(options.split()), presets.PRESETS[preset])

    assert chosen("") == presets.PRESETS["small"][0]
    assert chosen("--optimizer sgd --batch-size 2048").accumulate == 16
    own = chosen("--model vit --optimizer kfac --lr 0.5")
    assert (own.model, own.optimizer, own.width, own.lr) == ("vit", "kfac", 64, 0.5)
    paper = chosen("--model vit", "paper")
    assert (paper.depth, paper.batch_size, paper.optimizer) == (12, 4096, "adamw")
    assert chosen("--optimizer shampoo", "paper").batch_size == 32_768


def test_settings_are_read_back_as_written():
    written = settings.Settings(optimizer="kfac", lr=3e-4, batch_size=2048, normalization="none")
    assert settings.Settings.parse(str(written)) == written
