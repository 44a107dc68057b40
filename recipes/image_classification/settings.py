"""Everything that makes one run: the options of train.py, and the key of a run in compare.py's tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

KINDS = {"str": str, "int": int, "float": float}
SHAPE = ("width", "depth", "heads", "patch", "train_examples", "validation_examples")
OPTIMIZERS = ("sgd", "adamw", "kfac", "shampoo", "soap", "sonew")


def option(default: Any, help: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass(frozen=True)
class Settings:
    """One run; the options' help says what each is."""

    optimizer: str = option("sgd", "with Nesterov's momentum if sgd", *OPTIMIZERS)
    model: str = option("resnet20", "see model.py, resnet50.py, vit.py", "resnet20", "resnet50", "vit")
    width: int = option(8, "channels of the first stage, 16 in the paper of resnet20; of vit the embedding's")
    depth: int = option(4, "of vit: blocks")
    heads: int = option(4, "of vit")
    patch: int = option(4, "of vit: rows and columns of a patch")
    normalization: str = option("batch", "none: branches begin smaller; of resnet20", "batch", "none")
    train_examples: int = option(20480, "a subset; 0 for all that validation leaves")
    validation_examples: int = option(2500, "of the training set, kept apart")
    batch_size: int = option(128, "of one step, on all devices together")
    accumulate: int = option(1, "parts into which a batch is cut; BatchNorm's statistics are those of a device's part")
    epochs: int = option(12, "the schedule is fitted to them")
    lr: float = option(0.1, "the highest, after the warm-up")
    schedule: str = option("linear", "after the warm-up, to zero", "linear", "cosine")
    warmup: float = option(0.1, "part of all steps")
    momentum: float = option(0.9, "of sgd, kfac, and shampoo in place of sgd")
    beta2: float = option(0.999, "of adamw, shampoo, soap and sonew")
    weight_decay: float = option(5e-4, "of all parameters; decoupled (times lr) but for sgd and shampoo in its place")
    clip: float = option(0.0, "of the gradient's norm; 0 for none")
    label_smoothing: float = option(0.0, "of the training loss")
    grafting: str = option("sgd", "of shampoo: which optimizer it takes over, whose step sizes it has", "sgd", "adam")
    preconditioner_eps: float = option(1e-6, "of shampoo: times the largest eigenvalue")
    max_preconditioner_dim: int = option(1024, "of shampoo and soap")
    damping: float = option(1e-3, "of kfac")
    damping_method: str = option("exact", "of kfac", "exact", "pi")
    kl_clip: float = option(1e-3, "of kfac; 0 for none")
    statistics_frequency: int = option(10, "steps between updates of kfac's factors, shampoo's and soap's statistics")
    precondition_frequency: int = option(100, "of kfac, shampoo and soap: steps between two inversions, roots or bases")
    factor_decay: float = option(0.95, "of kfac")
    start_preconditioning_step: int = option(0, "step of the first inversion, roots or bases; 0 for the interval")
    statistics_positions: int = option(0, "of kfac: of a convolution's output in each example; 0 for all")
    approximation: str = option("expand", "of kfac, where weights are shared", "expand", "reduce")
    seed: int = option(0, "of the initialisation, the order of examples and the augmentation")

    def __str__(self) -> str:
        """The optimizer and what differs from the defaults: `optimizer=sgd lr=0.2`."""
        changed = [f for f in fields(self) if f.name == "optimizer" or getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={getattr(self, f.name):{'g' if f.type == 'float' else ''}}" for f in changed)

    @classmethod
    def parse(cls, text: str) -> Settings:
        """What `str` wrote."""
        kinds = {f.name: KINDS[str(f.type)] for f in fields(cls)}
        return cls(**{name: kinds[name](value) for name, value in (pair.split("=") for pair in text.split())})


def add_options(parser: argparse.ArgumentParser) -> None:
    for f in fields(Settings):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}",
            type=KINDS[str(f.type)],
            choices=f.metadata["choices"],
            help=f"{f.metadata['help']} (default: {f.default}, or what was tuned for the optimizer and batch)",
        )


def chosen(arguments: argparse.Namespace, tuned: Sequence[Settings]) -> Settings:
    """What was given, and for the rest what was tuned for the model and the optimizer.

    Args:
        tuned: those of the same model, optimizer, normalization and batch count before others, in this order, and of
            those alike the first. An optimizer that was not tuned for the model has its shape and its own options.
    """
    given = {f.name: getattr(arguments, f.name) for f in fields(Settings) if getattr(arguments, f.name) is not None}
    model = given.setdefault("model", tuned[0].model)
    given.setdefault("optimizer", next(one.optimizer for one in tuned if one.model == model))
    own = [one for one in tuned if one.optimizer == given["optimizer"]] or [Settings(optimizer=given["optimizer"])]
    names = ("model", "normalization", "batch_size")
    base = max(own, key=lambda one: [getattr(one, name) == given.get(name) for name in names])
    if base.model != model:
        shape = next(one for one in tuned if one.model == model)
        base = replace(base, **{name: getattr(shape, name) for name in SHAPE})
    return replace(base, **given)
