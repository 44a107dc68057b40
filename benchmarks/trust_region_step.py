"""What a trust-region Newton-CG step is made of, in passes of training: products with the curvature, and vectors.

python benchmarks/trust_region_step.py [--repeats 5] [--threads 1] [--output FILE]

A forward and backward pass is three products of matrices for each layer. A product of a vector with the Hessian, from a
graph that is kept, is six (Pearlmutter 1994): twice as much is the bound. What conjugate gradients do with vectors
besides is a few passes over memory, measured with a curvature that costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import gemm_rate, machine, memory_rate, report, spread
from tasks import Task, autoencoder, digits, resnet20, small_gpt

from lightning_soo import TrustRegionNewtonCG
from lightning_soo.linalg.trust_region import steihaug
from lightning_soo.optim.curvature import CurvatureGraph
from lightning_soo.optim.objective import computing

TASKS: dict[str, Callable[[], Task]] = {
    "autoencoder": lambda: autoencoder(1000, digits()),
    "resnet": lambda: resnet20(64),
    "gpt": small_gpt,
}
ITERATIONS = 5


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(task: Task, repeats: int) -> list[str]:
    net = task.model()
    parameters = list(net.parameters())
    batch = task.batch(0)
    vectors = [torch.randn_like(parameter) for parameter in parameters]
    numel = sum(parameter.numel() for parameter in parameters)
    flat = torch.randn(numel)

    def train() -> None:
        net.zero_grad()
        task.loss(net, batch).backward()

    with computing():
        graph = CurvatureGraph(task.loss(net, batch), [], parameters, "hessian")

    def build() -> None:
        with computing():
            CurvatureGraph(task.loss(net, batch), [], parameters, "hessian")

    def conjugate_gradients() -> None:
        scales = torch.linspace(1.0, 2.0, numel)
        steihaug(lambda v: v * scales, flat, 1e9, tolerance=0.0, max_iterations=ITERATIONS)

    fresh = task.model()
    optimizer = TrustRegionNewtonCG(fresh, radius=1e-2, max_cg_iterations=1)

    def step() -> None:
        optimizer.step(lambda: task.loss(fresh, batch))

    runs: dict[str, tuple[Callable[[], object], float]] = {
        "forward, backward": (train, 1.0),
        "graph of loss and gradient": (build, 1.0),
        "Hessian times vector": (lambda: graph.product(vectors), 1.0),
        "vectors of an iteration": (conjugate_gradients, float(ITERATIONS)),
        "whole step, one iteration": (step, 1.0),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, (run, count) in runs.items():
            taken = seconds(run) / count
            if turn:
                found[name].append(taken)
    base = found["forward, backward"]
    bounds = {"graph of loss and gradient": "1", "Hessian times vector": "2", "whole step, one iteration": "3.33"}
    lines = [f"## {task.name}", "", "| | ms | / (forward, backward) | bound |", "|---|---|---|---|"]
    for name, values in found.items():
        ratios = [a / b for a, b in zip(values, base, strict=True)]
        lines.append(f"| {name} | {1000 * statistics.median(values):.1f} | {spread(ratios)} | {bounds.get(name, '')} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        "# What a trust-region Newton-CG step is made of",
        "",
        f"{machine()}.",
        f"Products: float32 {gemm_rate(torch.float32) / 1e9:.0f} Gflop/s; memory {memory_rate() / 1e9:.0f} GB/s.",
        f"Median [smallest, largest] of {arguments.repeats} turns. The bounds count products of matrices: three for",
        "each layer in a forward and backward pass, six in a product with the Hessian, ten in a step of one iteration.",
        "",
    ]
    for name in arguments.tasks:
        lines += measure(TASKS[name](), arguments.repeats)
    report(lines, arguments.output)


if __name__ == "__main__":
    main()
