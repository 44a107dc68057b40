"""What `train.py` takes where nothing is said: the best of what was run, or what was published."""

from __future__ import annotations

from dataclasses import replace

from contenders import TUNED
from settings import Settings

IMAGENET = Settings(
    model="resnet50",
    width=64,
    train_examples=0,
    validation_examples=10_000,
    schedule="cosine",
    label_smoothing=0.1,
)
VIT_B16 = replace(
    IMAGENET,
    model="vit",
    patch=16,
    width=768,
    depth=12,
    heads=12,
    label_smoothing=0.0,
    clip=1.0,
)
# Schedules are linear or cosine here, where He et al.'s have steps. Of Anil et al.'s run batch and budget are taken;
# learning rate, decay and Shampoo's options are a beginning, to be tuned.
PAPER = (
    # He et al. 2015, section 3.4; 90 epochs as customary
    replace(IMAGENET, optimizer="sgd", batch_size=256, epochs=90, lr=0.1, warmup=0.05, weight_decay=1e-4),
    # Anil et al. 2020: batch 32,768, 1,729 steps, which are about 44 epochs
    replace(
        IMAGENET,
        optimizer="shampoo",
        batch_size=32_768,
        epochs=44,
        lr=6.4,
        warmup=0.1,
        weight_decay=1e-4,
        beta2=0.95,
        max_preconditioner_dim=128,
        statistics_frequency=1,
        precondition_frequency=20,
        start_preconditioning_step=20,
    ),
    # Dosovitskiy et al. 2020, table 3: from scratch on ImageNet, but for dropout 0.1, which the module lacks
    replace(VIT_B16, optimizer="adamw", batch_size=4096, epochs=300, lr=3e-3, warmup=0.107, weight_decay=0.3),
    # the same with AdamW taken over
    replace(
        VIT_B16,
        optimizer="shampoo",
        grafting="adam",
        batch_size=4096,
        epochs=300,
        lr=3e-3,
        warmup=0.107,
        weight_decay=0.3,
        max_preconditioner_dim=1024,
        statistics_frequency=5,
        precondition_frequency=50,
    ),
    # He et al. 2015, section 4.2, for CIFAR-10: 64,000 steps
    Settings(width=16, train_examples=0, validation_examples=5000, epochs=182, lr=0.1, weight_decay=1e-4),
)
PRESETS = {"small": TUNED, "paper": PAPER}
