"""Train a language model with AdamW and Accelerate: hidden tokens (BERT) or the next one (GPT).

python recipes/language_model/train.py --objective masked
python recipes/language_model/train.py --objective causal
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from data import Masked, Rows, Spread, read_texts
from model import LanguageModel
from tokens import Characters, Subwords
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import begin, fit, parse_options, train_loader

SMALL = {
    "steps": 400,
    "batch_size": 48,
    "lr": 4e-3,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "beta2": 0.99,
    "clip": 1.0,
    "evaluate_every": 50,
    "width": 64,
    "layers": 2,
    "heads": 4,
    "length": 40,
    "dropout": 0.0,
    "subwords": 0,
    "validation_rows": 480,
}
# BERT-Large with the batch, steps and schedule of You et al. 2020 (LAMB), with which Anil et al. 2020 compare Shampoo
BERT_LARGE = {
    "steps": 15625,
    "batch_size": 32768,
    "lr": 1e-3,
    "warmup": 0.2,
    "weight_decay": 0.01,
    "beta2": 0.999,
    "clip": 1.0,
    "evaluate_every": 500,
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "length": 512,
    "dropout": 0.1,
    "subwords": 30522,
    "validation_rows": 8192,
}
# Radford et al. 2019, the smallest; they give no learning rate, and this one is GPT-3's of that size
GPT2_SMALL = BERT_LARGE | {
    "steps": 100_000,
    "batch_size": 512,
    "lr": 6e-4,
    "warmup": 0.02,
    "weight_decay": 0.1,
    "beta2": 0.95,
    "width": 768,
    "layers": 12,
    "heads": 12,
    "length": 1024,
    "subwords": 50257,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "masked": {"small": {"objective": "masked"} | SMALL, "paper": {"objective": "masked"} | BERT_LARGE},
    "causal": {
        "small": {"objective": "causal"} | SMALL | {"batch_size": 32, "length": 64},
        "paper": {"objective": "causal"} | GPT2_SMALL,
    },
}


def main() -> None:
    settings = read_options()
    accelerator = begin(settings)
    micro = settings.batch_size // (accelerator.num_processes * settings.accumulate)
    if settings.validation_rows % (micro * accelerator.num_processes):
        raise SystemExit(
            f"--validation-rows {settings.validation_rows} must be a multiple of {micro * accelerator.num_processes}, "
            "which is what all processes take at once: otherwise Accelerate counts some rows twice"
        )
    texts = read_texts(settings.data_dir)
    tokens = make_tokens(texts[0], settings)
    codes = [tokens.encode(text) for text in texts]
    masked = settings.objective == "masked"
    model = LanguageModel(
        tokens.size + masked,
        length=settings.length,
        width=settings.width,
        layers=settings.layers,
        heads=settings.heads,
        causal=not masked,
        dropout=settings.dropout,
    )
    size = settings.length + (not masked)  # the last token of a causal row is only predicted
    train, held_out = Rows(codes[0], size), Spread(Rows(codes[1], size, 1), settings.validation_rows)
    if masked:
        train = Masked(train, size, tokens.size, settings.seed)
        held_out = Masked(held_out, size, tokens.size, 0)
    batches = train_loader(train, settings, accelerator.num_processes)
    held_out_batches = DataLoader(held_out, micro)
    terms = train.chosen if masked else settings.length
    fit(accelerator, model, batches, held_out_batches, measure, settings, per_example=terms)
    accelerator.end_training()


def read_options() -> argparse.Namespace:
    """The presets depend on the objective, which is read first."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--objective", choices=list(PRESETS), default="masked")
    objective = parser.parse_known_args()[0].objective
    return parse_options(__doc__, PRESETS[objective])


def make_tokens(text: str, settings: argparse.Namespace) -> Characters | Subwords:
    """Characters, or ``--subwords`` of them: read from ``tokenizer.json`` in ``--data-dir``, or trained on the text."""
    if not settings.subwords:
        return Characters(text)
    path = settings.data_dir / "tokenizer.json" if settings.data_dir is not None else None
    return Subwords(text, settings.subwords, path if path is not None and path.is_file() else None)


def measure(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """The sum of the tokens' cross entropies, and how many."""
    if isinstance(batch, Tensor):
        logits, targets = model(batch[:, :-1]), batch[:, 1:]
    else:
        logits, targets = model(batch["codes"], batch["positions"]), batch["targets"]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return loss, targets.numel()


if __name__ == "__main__":
    main()
