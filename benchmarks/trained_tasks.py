"""The tasks that are trained to a target: real data, a seed for initialisation and order, a loss over fixed examples.

Losses that are compared are of the training set, over examples that are the same for everybody (all digits; 32
windows of the text; 512 pictures as they are; 192 pairs of verses): the last batch and overfitting have no part.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tasks import Task, autoencoder, digits, recipe, text_gpt, text_windows
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TrainedTask:
    """Attributes:
    key: its name in the command line and of its file of runs.
    at_seed: the task whose initialisation and order of data a seed decides.
    evaluate: the loss of a model over fixed examples.
    longest: steps of the longest run, whose AdamW sets the target.
    targets: further losses.
    """

    key: str
    title: str
    at_seed: Callable[[int], Task]
    evaluate: Callable[[nn.Module], float]
    longest: int
    targets: tuple[float, ...] = ()


def trained_autoencoder(batch_size: int) -> TrainedTask:
    """The loss is over all digits."""
    images = digits()

    def evaluate(net: nn.Module) -> float:
        return float(seed_0.loss(net, images))

    seed_0 = autoencoder(batch_size, images)
    return TrainedTask(
        key=f"autoencoder-{batch_size}",
        title=f"deep autoencoder on 5,000 MNIST digits, batch {batch_size}; loss over all digits",
        at_seed=lambda seed: autoencoder(batch_size, images, seed),
        evaluate=evaluate,
        longest=400,
        targets=(149.0, 100.0, 80.0, 70.0),
    )


def trained_gpt() -> TrainedTask:
    """The loss is over 32 windows of the text that are drawn once."""
    fixed = text_windows(32, torch.Generator().manual_seed(2**31))
    seed_0 = text_gpt()

    def evaluate(net: nn.Module) -> float:
        return sum(float(seed_0.loss(net, part)) for part in fixed.split(16)) / 2

    return TrainedTask(
        key="text-gpt",
        title=f"{seed_0.name}; loss of a byte over 32 fixed windows",
        at_seed=text_gpt,
        evaluate=evaluate,
        longest=300,
        targets=(2.32, 2.2, 2.1, 2.0),
    )


def trained_resnet(batch_size: int = 128, count: int = 10_000) -> TrainedTask:
    """ResNet-20 on the first pictures of Fashion-MNIST, shifted and mirrored; the loss is over 512 as they are."""
    model, data = (recipe(name, "image_classification") for name in ("model", "data"))
    folder = Path(os.environ.get("FASHION_MNIST", data.FASHION))
    images, labels = data.idx_images(folder, "train")
    pictures = data.Pictures(images[:count, ..., None], labels[:count])
    batches = data.Augmented(pictures, *pictures.statistics())
    fixed = batches[data.Part(torch.arange(512))]
    per_epoch = count // batch_size

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    def evaluate(net: nn.Module) -> float:
        net.eval()
        found = float(loss(net, fixed))
        net.train()
        return found

    def at_seed(seed: int) -> Task:
        def make() -> nn.Module:
            torch.manual_seed(seed)
            return model.ResNet20(1, 10)

        def batch(step: int) -> Any:
            epoch, index = divmod(step, per_epoch)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
            chosen = order[index * batch_size : (index + 1) * batch_size]
            return batches[data.Part(chosen, seed=1_000_003 * seed + step)]

        return Task(
            name=f"ResNet-20, batch {batch_size}", model=make, batch=batch, loss=loss, flops=_RESNET * batch_size
        )

    return TrainedTask(
        key="resnet",
        title=f"ResNet-20 on {count:,} pictures of Fashion-MNIST, batch {batch_size}; loss over 512 unchanged",
        at_seed=at_seed,
        evaluate=evaluate,
        longest=300,
    )


_RESNET = 6.0 * 31.1e6  # flops of a picture of 28 x 28, forwards and backwards


def trained_translation(batch_size: int = 32) -> TrainedTask:
    """The recipe's small Transformer and pairs of verses; the loss of a token is over 192 fixed pairs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model, data = (recipe(name, "translation") for name in ("model", "data"))
    pairs, _ = data.load(None, "en", "", 100)
    sentences = [sentence for pair in pairs.spread(3000) for sentence in pair]
    subwords = data.Subwords(data.Subwords.learn(sentences, 2000))
    collate = data.Collate(subwords, 40)
    fixed = [collate(pairs.spread(192)[first : first + 64]) for first in range(0, 192, 64)]
    per_epoch = len(pairs) // batch_size

    def summed(net: nn.Module, batch: Any) -> Tensor:
        source, shifted, target = batch
        logits = net(source, shifted).flatten(0, 1)
        return nn.functional.cross_entropy(logits, target.flatten(), ignore_index=data.PADDING, reduction="sum")

    def tokens(batch: Any) -> int:
        return int((batch[2] != data.PADDING).sum())

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return summed(net, batch) / tokens(batch)

    def evaluate(net: nn.Module) -> float:
        return sum(float(summed(net, batch)) for batch in fixed) / sum(map(tokens, fixed))

    def at_seed(seed: int) -> Task:
        def make() -> nn.Module:
            torch.manual_seed(seed)
            return model.Transformer(len(subwords), 128, 512, 4, 2, 40, padding=data.PADDING)

        def batch(step: int) -> Any:
            epoch, index = divmod(step, per_epoch)
            order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
            return collate([pairs[i] for i in order[index * batch_size : (index + 1) * batch_size].tolist()])

        weights = 2 * (12 + 4) * 128 * 128 + 2 * 12 * 128 * 128 + 128 * len(subwords)
        return Task(
            name=f"translation, {batch_size} pairs",
            model=make,
            batch=batch,
            loss=loss,
            flops=6.0 * batch_size * 30 * weights,
        )

    return TrainedTask(
        key="translation",
        title=f"small Transformer, English to Spanish verses, {batch_size} pairs; loss of a token over 192 fixed pairs",
        at_seed=at_seed,
        evaluate=evaluate,
        longest=400,
    )


TRAINED: dict[str, Callable[[], TrainedTask]] = {
    "autoencoder-250": lambda: trained_autoencoder(250),
    "autoencoder-1000": lambda: trained_autoencoder(1000),
    "text-gpt": trained_gpt,
    "resnet": trained_resnet,
    "translation": trained_translation,
}


@cache
def trained(key: str) -> TrainedTask:
    """By key, made once in a process."""
    return TRAINED[key]()
