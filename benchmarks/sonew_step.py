"""What a step of SONew costs, against torch's AdamW and the bytes that have to move.

python benchmarks/sonew_step.py [--sizes 1e6 1e7 5e7] [--output FILE]

One float32 parameter of rows of 1000; whole optimizer steps (flags, statistics, direction, Adam graft, decay) in turns,
medians. Bytes per element, every array once: AdamW 28; SONew tridiagonal 44. Then whole training steps (forward,
backward, optimizer) of a small GPT, and the bytes of state that a model of 1.2 billion parameters needs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine, report
from tasks import small_gpt

from lightning_soo import SOAP, Shampoo, SONew


def contenders(n: int) -> dict[str, tuple[torch.optim.Optimizer, int]]:
    """Name -> optimizer of one parameter with its gradient, and bytes per element (0: no bound is stated)."""

    def parameter() -> torch.nn.Parameter:
        noise = torch.randn(n, generator=torch.Generator().manual_seed(0))
        found = torch.nn.Parameter(torch.zeros(n // 1000, 1000))
        found.grad = (noise + 0.9 * noise.roll(1)).view_as(found)  # neighbours are alike, as in a network
        return found

    common = {"lr": 1e-4, "weight_decay": 0.01}
    return {
        "AdamW foreach": (torch.optim.AdamW([parameter()], foreach=True, **common), 28),
        "AdamW fused": (torch.optim.AdamW([parameter()], fused=True, **common), 28),
        "SONew, diagonal": (SONew([parameter()], bandwidth=0, **common), 0),
        "SONew, tridiagonal": (SONew([parameter()], **common), 44),
        "SONew, tridiagonal, separate calls": (SONew([parameter()], fused=False, **common), 44),
        "SONew, tridiagonal, compiled": (SONew([parameter()], compiled=True, **common), 44),
        "SONew, band 4": (SONew([parameter()], bandwidth=4, **common), 0),
    }


def measure(n: int) -> dict[str, list[float]]:
    """Seconds of each step, after the twelve that start preconditioning and warm up."""
    made = contenders(n)
    gradients = {name: optimizer.param_groups[0]["params"][0].grad for name, (optimizer, _) in made.items()}
    kept = {name: gradient.clone() for name, gradient in gradients.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for index in range(12 + max(7, min(31, 100_000_000 // n))):
        for name, (optimizer, _) in made.items():
            gradients[name].copy_(kept[name])  # a step overwrites it with the direction
            began = time.perf_counter()
            optimizer.step()
            if index >= 12:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def training_steps(steps: int) -> list[str]:
    """Whole training steps of the small GPT in turns."""
    task = small_gpt()
    makers: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
        "AdamW foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True, lr=1e-4),
        "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True, lr=1e-4),
        "SONew, tridiagonal": lambda model: SONew(model, lr=1e-4, weight_decay=0.01),
        "SONew, band 4": lambda model: SONew(model, lr=1e-4, weight_decay=0.01, bandwidth=4),
    }
    models = {name: task.model() for name in makers}
    optimizers = {name: make(models[name]) for name, make in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for index in range(12 + steps):
        for name, optimizer in optimizers.items():
            batch = task.batch(index)
            began = time.perf_counter()
            optimizer.zero_grad()
            task.loss(models[name], batch).backward()
            optimizer.step()
            if index >= 12:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    count = sum(parameter.numel() for parameter in models["AdamW foreach"].parameters())
    return [
        "",
        f"Whole training steps of {task.name} ({count / 1e6:.1f}M parameters), medians of {steps}.",
        "",
        "| optimizer | ms | / AdamW foreach |",
        "|---|---|---|",
        *(f"| {n} | {m * 1e3:.1f} | {m / medians['AdamW foreach']:.3f} |" for n, m in medians.items()),
    ]


def large_model() -> list[str]:
    """State of a GPT of 1.2 billion parameters, planned without allocating it."""
    width, layers, vocabulary = 2048, 22, 32000
    shapes = [("token", (vocabulary, width)), ("head", (vocabulary, width))]
    for layer in range(layers):
        shapes += [(f"{layer}.{name}", shape) for name, shape in (
            ("qkv", (3 * width, width)), ("out", (width, width)), ("up", (4 * width, width)),
            ("down", (width, 4 * width)), ("norm_1", (width,)), ("norm_2", (width,)),
        )]  # fmt: skip
    named = [(name, torch.nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in shapes]
    count = sum(parameter.numel() for _, parameter in named)
    lines = [
        "",
        f"State of a model of {count / 1e9:.2f} billion parameters (width {width}, {layers} layers), float32, planned "
        "on the meta device; embedding and head too.",
        "",
        "| optimizer | GB | bytes a parameter |",
        "|---|---|---|",
        f"| AdamW | {8 * count / 1e9:.1f} | 8.0 |",
    ]
    for name, make in {
        "SONew, diagonal": lambda: SONew(named, bandwidth=0),
        "SONew, tridiagonal": lambda: SONew(named),
        "SONew, band 4": lambda: SONew(named, bandwidth=4),
        "Shampoo": lambda: Shampoo(named),
        "SOAP": lambda: SOAP(named),
    }.items():
        optimizer = make()
        plan = optimizer.attach()
        tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        state = sum(t.numel() * t.element_size() for t in tensors) + sum(plan.state_bytes)
        lines.append(f"| {name} | {state / 1e9:.1f} | {state / count:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7, 5e7])
    parser.add_argument("--training-steps", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# A step of SONew",
        "",
        f"{machine()}.",
        "One float32 parameter, rows of 1000; tridiagonal moves 44 bytes where fused AdamW moves 28 (1.57).",
        "",
        "| elements | optimizer | ms | / AdamW foreach | / AdamW fused | GB/s at its bytes |",
        "|---|---|---|---|---|---|",
    ]
    for size in map(int, arguments.sizes):
        medians = {name: statistics.median(values) for name, values in measure(size).items()}
        sizes = {name: count for name, (_, count) in contenders(1000).items()}
        for name, median in medians.items():
            rate = f"{sizes[name] * size / median / 1e9:.1f}" if sizes[name] else "-"
            lines.append(
                f"| {size:,} | {name} | {median * 1e3:.2f} | {median / medians['AdamW foreach']:.2f} | "
                f"{median / medians['AdamW fused']:.2f} | {rate} |"
            )
    report([*lines, *training_steps(arguments.training_steps), *large_model()], arguments.output)


if __name__ == "__main__":
    main()
