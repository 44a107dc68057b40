"""Inverse fourth roots on one thread: seconds and accuracy of three ways to compute them.

python benchmarks/roots.py [--orders 64 128 256 512 1024 2048] [--output FILE]

Matrices are made from eigenvalues that fall geometrically and a random orthogonal basis, so the root is known in
float64 without a solver. Both solvers of the library take what they are given in float64, without a ridge and without
their own verdict; eigh in float32 is what a device without float64 would do, its eigenvalues held above rounding.
Seconds are divided by those of a matrix product of the same order and precision on this machine.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, report, spread
from threadpoolctl import threadpool_limits

from lightning_soo.linalg.inverse_roots import InverseRootError, inverse_root

EXPONENT = 4
CONDITIONS = (1e4, 1e6, 1e8, 1e10)
Matrix = np.ndarray[Any, Any]


def eigh_float64(matrix: Matrix) -> Matrix:
    return inverse_root(matrix, EXPONENT, eps=0.0, max_residual=math.inf).root


def eigh_float32(matrix: Matrix) -> Matrix:
    values, vectors = np.linalg.eigh(matrix.astype(np.float32))
    floor = np.float32(len(values)) * np.finfo(np.float32).eps * values[-1]
    half = vectors * np.maximum(values, floor) ** np.float32(-0.5 / EXPONENT)
    return half @ half.T


def newton_float64(matrix: Matrix) -> Matrix:
    return inverse_root(matrix, EXPONENT, eps=0.0, solver="newton", max_residual=math.inf).root


SOLVERS: dict[str, tuple[Callable[[Matrix], Matrix], type[np.floating[Any]]]] = {
    "eigh, float64": (eigh_float64, np.float64),
    "eigh, float32": (eigh_float32, np.float32),
    "coupled Newton, float64": (newton_float64, np.float64),
}


def known(order: int, condition: float) -> tuple[Matrix, Matrix]:
    """A matrix of this condition number, and its inverse root, from the same decomposition."""
    basis, _ = np.linalg.qr(np.random.default_rng(order).standard_normal((order, order)))
    values = np.geomspace(1.0, 1.0 / condition, order)
    return (basis * values) @ basis.T, (basis * values ** (-1.0 / EXPONENT)) @ basis.T


def error(solver: Callable[[Matrix], Matrix], matrix: Matrix, expected: Matrix) -> float:
    """In the Frobenius norm, relative; not finite where there is no root."""
    try:
        return float(np.linalg.norm(solver(matrix) - expected) / np.linalg.norm(expected))
    except (InverseRootError, np.linalg.LinAlgError):
        return math.nan


def measure(orders: list[int], newton_up_to: int, repeats: int) -> list[str]:
    """The rows of the table."""
    rows = []
    for order in orders:
        matrices = [known(order, condition) for condition in CONDITIONS]
        for name, (solver, dtype) in SOLVERS.items():
            if solver is newton_float64 and order > newton_up_to:
                continue
            factor = np.random.default_rng(1).standard_normal((order, order)).astype(dtype)
            seconds, ratios = [], []
            for _ in range(repeats):  # in turns
                start = time.perf_counter()
                for _ in range(products := max(1, 2**24 // order**3)):
                    factor @ factor.T.copy()
                middle = time.perf_counter()
                solver(matrices[1][0])
                seconds.append(time.perf_counter() - middle)
                ratios.append(seconds[-1] * products / (middle - start))
            errors = [error(solver, *pair) for pair in matrices]
            cells = " | ".join("none" if math.isnan(value) else f"{value:.0e}" for value in errors)
            rows.append(
                f"| {order} | {name} | {1000 * sorted(seconds)[repeats // 2]:.2f} | {spread(ratios)} | {cells} |"
            )
            print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--newton-up-to", type=int, default=1024, help="a larger order takes it minutes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        rows = measure(arguments.orders, arguments.newton_up_to, arguments.repeats)
    lines = [
        "# Inverse roots",
        "",
        f"{machine()}.",
        f"A^(-1/{EXPONENT}) on one thread; milliseconds at condition number 1e6, median of {arguments.repeats}; over a "
        "product of the same order and precision, median [smallest, largest]; relative error by condition number.",
        "",
        "| order | solver | ms | / product | " + " | ".join(f"{condition:.0e}" for condition in CONDITIONS) + " |",
        "|---" * (4 + len(CONDITIONS)) + "|",
        *rows,
    ]
    report(lines, arguments.output)


if __name__ == "__main__":
    main()
