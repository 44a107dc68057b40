"""Train a Transformer that translates, with AdamW and Accelerate. Nothing here knows of second order.

python recipes/translation/train.py    # README.md says how else it is launched
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from data import END, PADDING, START, Collate, Pairs, Subwords, load
from model import Transformer
from training import begin, fit, parse_options, train_loader

SMALL = {
    "steps": 400,
    "batch_size": 32,
    "lr": 4e-3,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "beta2": 0.99,
    "clip": 1.0,
    "evaluate_every": 20,
    "width": 128,
    "hidden": 512,
    "heads": 4,
    "layers": 2,
    "dropout": 0.0,
    "tied": True,
    "label_smoothing": 0.0,
    "vocabulary": 2000,
    "vocabulary_pairs": 3000,
    "length": 40,
    "longest": 100,
    "validation_pairs": 192,
    "source": "en",
    "target": "",
    "workers": 0,
    "bleu": 0,
}
PAPER = {
    "steps": 100_000,
    "batch_size": 1536,
    "lr": 7e-4,
    "warmup": 0.04,
    "weight_decay": 0.0,
    "beta2": 0.98,
    "clip": 0.0,
    "evaluate_every": 1000,
    "width": 512,
    "hidden": 2048,
    "heads": 8,
    "layers": 6,
    "dropout": 0.1,
    "tied": False,
    "label_smoothing": 0.1,
    "vocabulary": 32_000,
    "vocabulary_pairs": 500_000,
    "length": 128,
    "longest": 600,
    "validation_pairs": 0,
    "source": "en",
    "target": "",
    "workers": 4,
    "bleu": 0,
}
PAPER_BIG = {**PAPER, "batch_size": 384, "width": 1024, "hidden": 8192, "heads": 16}
PRESETS = {"small": SMALL, "paper": PAPER, "paper-big": PAPER_BIG}


def main() -> None:
    settings = parse_options(__doc__, PRESETS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bleu = corpus_bleu() if settings.bleu else None
    accelerator = begin(settings)
    train, held_out = load(settings.data_dir, settings.source, settings.target, settings.longest)
    subwords = learn(accelerator, train, settings)
    collate = Collate(subwords, settings.length)
    accelerator.print(
        f"{len(train)} pairs, {min(len(held_out), settings.validation_pairs or len(held_out))} of {len(held_out)} for "
        f"validation, {len(subwords)} tokens"
    )
    options: dict[str, Any] = {"collate_fn": collate, "num_workers": settings.workers}
    batches = train_loader(train, settings, accelerator.num_processes, **options)
    validation = validation_loader(held_out, settings.validation_pairs, accelerator.num_processes, collate)
    model = make_model(len(subwords), settings)
    targets = subwords.encode([target for _, target in train.spread(1000)], settings.length)
    measure = partial(summed_loss, label_smoothing=settings.label_smoothing)

    def finish(model: nn.Module) -> None:
        if bleu is None:
            return
        pairs = held_out.spread(settings.bleu)
        translated = translate(model, [source for source, _ in pairs], collate, accelerator.device)
        score = bleu(translated, [[target for _, target in pairs]])
        accelerator.print(f"{translated[0]}\nBLEU of {len(pairs)} sentences, greedy: {score.score:.1f}")

    per_example = sum(map(len, targets)) / len(targets)
    fit(accelerator, model, batches, validation, measure, settings, per_example=per_example, finish=finish)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def make_model(vocabulary: int, settings: argparse.Namespace) -> Transformer:
    return Transformer(
        vocabulary,
        settings.width,
        settings.hidden,
        settings.heads,
        settings.layers,
        settings.length,
        dropout=settings.dropout,
        tied=settings.tied,
        padding=PADDING,
    )


def learn(accelerator: Accelerator, train: Pairs, settings: argparse.Namespace) -> Subwords:
    """One process learns the vocabulary, so that all have the same."""
    definition: list[Any] = [None]
    if accelerator.is_main_process:
        sentences = [sentence for pair in train.spread(settings.vocabulary_pairs) for sentence in pair]
        definition = [Subwords.learn(sentences, settings.vocabulary)]
    if accelerator.num_processes > 1:
        broadcast_object_list(definition)
    return Subwords(definition[0])


def validation_loader(held_out: Pairs, count: int, processes: int, collate: Collate) -> DataLoader[Any]:
    """``count`` pairs, evenly spaced, in batches that processes share without repeating any."""
    count = min(count, len(held_out)) or len(held_out)
    chosen = Subset(held_out, [i * len(held_out) // count for i in range(count)])
    size = max((size for size in range(1, 65) if count % (size * processes) == 0), default=1)
    return DataLoader(chosen, size, collate_fn=collate)


def summed_loss(model: nn.Module, batch: Sequence[Tensor], label_smoothing: float) -> tuple[Tensor, int]:
    """The cross entropy of all target tokens, end marks included and padding not, and their number."""
    source, shifted, target = batch
    logits = model(source, shifted)
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        target.flatten(),
        ignore_index=PADDING,
        reduction="sum",
        label_smoothing=label_smoothing if model.training else 0.0,
    )
    return loss, int((target != PADDING).sum())


@torch.no_grad()
def translate(model: nn.Module, sentences: Sequence[str], collate: Collate, device: torch.device) -> list[str]:
    """The likeliest next token until the end mark; every process translates all, as sharded models need."""
    model.eval()
    translated = []
    for first in range(0, len(sentences), 64):
        sources = collate.pad(collate.subwords.encode(sentences[first : first + 64], collate.length)).to(device)
        tokens = torch.full((len(sources), 1), START, device=device)
        for _ in range(collate.length):
            following = model(sources, tokens)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, following), 1)
            if bool((tokens == END).any(1).all()):
                break
        translated += [collate.subwords.decode(row) for row in tokens[:, 1:].tolist()]
    model.train()
    return translated


def corpus_bleu() -> Any:
    try:
        from sacrebleu import corpus_bleu as found
    except ImportError:
        raise SystemExit("--bleu needs the package sacrebleu: pip install sacrebleu") from None
    return found


if __name__ == "__main__":
    main()
