"""Shampoo of one matrix as the formulas say it: numpy, float64, all spelt out, nothing shared with the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray


def inverse_root(matrix: Array, p: float, eps: float, relative: bool) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    ridge = eps * values[-1] if relative else eps
    return (vectors * (np.maximum(values, 0.0) + ridge) ** (-1.0 / p)) @ vectors.T


@dataclass
class ReferenceShampoo:
    """Options have the names and meanings of the public signature."""

    x: Array
    lr: float
    betas: tuple[float, float]
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = True
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    preconditioner_eps: float = 1e-6
    relative_eps: bool = True
    use_bias_correction: bool = True
    precondition_frequency: int = 20
    refresh_delay: int = 0
    statistics_frequency: int = 1
    start_preconditioning_step: int = 1
    exponent_override: float | str | None = None
    grafting: str | None = "adam"
    grafting_beta2: float | None = None
    t: int = 0
    roots: tuple[Array, Array] | None = None
    waiting: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    graft_steps: list[Array] = field(default_factory=list)
    gradients: list[Array] = field(default_factory=list)
    agreements: list[tuple[float, float]] = field(default_factory=list)
    buffer: Array | None = None
    left: Any = 0.0
    right: Any = 0.0
    weights: float = 0.0
    observed: int = 0

    def step(self, gradient: Array) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        g = gradient if self.decoupled_weight_decay else gradient + self.weight_decay * self.x
        earlier = list(self.gradients)
        self.gradients.append(g)
        start = self.start_preconditioning_step
        if self.t == 1 or self.t % self.statistics_frequency == 0 or start - 8 < self.t <= start:
            decay = beta2 ** (self.t - self.observed)
            self.observed = self.t
            if earlier and (beta1 > 0 or self.grafting == "adam"):
                last = self.t - 1
                mean = sum((1 - beta1) * beta1 ** (last - s) * h for s, h in enumerate(earlier, 1)) / (1 - beta1**last)
                self.agreements.append((float((mean * g).sum()), float((g * g).sum())))
            weight = 1.0 - decay if beta2 < 1 else 1.0
            self.left = decay * self.left + weight * g @ g.T
            self.right = decay * self.right + weight * g.T @ g
            self.weights = decay * self.weights + weight if beta2 < 1 else 1.0
        if self.t == start or (self.t > start and self.t % self.precondition_frequency == 0):
            correction = self.weights if self.use_bias_correction else 1.0
            p = {None: self.p_between(), "2k": 4.0}.get(self.exponent_override, self.exponent_override)
            self.waiting[self.t + self.refresh_delay] = tuple(
                inverse_root(matrix / correction, p, self.preconditioner_eps, self.relative_eps)
                for matrix in (self.left, self.right)
            )
        if self.t in self.waiting:
            self.roots = self.waiting.pop(self.t)

        corrected = self.use_bias_correction
        filtered = sum((1 - beta1) * beta1 ** (self.t - s) * h for s, h in enumerate(self.gradients, 1))
        filtered = filtered / (1 - beta1**self.t) if corrected else filtered
        graft = self.graft(filtered)
        direction = graft
        if self.roots is not None:
            direction = self.roots[0] @ filtered @ self.roots[1]
            if self.grafting is not None:
                direction = direction * np.linalg.norm(graft) / np.linalg.norm(direction)
        if self.decoupled_weight_decay:
            self.x = self.x - self.lr * self.weight_decay * self.x
        if self.momentum:
            if self.buffer is None:
                self.buffer = direction
            else:
                self.buffer = self.momentum * self.buffer + (1 - self.dampening) * direction
            direction = direction + self.momentum * self.buffer if self.nesterov else self.buffer
        self.x = self.x - self.lr * direction

    def p_between(self) -> float:
        """From 2.5 for noise to 4 for gradients that agree, by what they have in common with the earlier ones' mean."""
        if not self.agreements:
            return 4.0
        weights = 0.9 ** np.arange(len(self.agreements))[::-1]
        common, energy = weights @ np.array(self.agreements)
        return 2.5 + 1.5 * float(np.clip(common / energy, 0.0, 1.0))

    def graft(self, filtered: Array) -> Array:
        if self.grafting in (None, "sgd"):
            return filtered
        beta1, beta2 = self.betas
        beta2 = beta2 if self.grafting_beta2 is None else self.grafting_beta2
        gradients, scale = self.gradients, 1.0
        if self.grafting.endswith("_normalized"):
            gradients = [g / (np.linalg.norm(g) + 1e-16) for g in gradients]
            scale = 1.0 / (np.linalg.norm(self.gradients[-1]) + 1e-16)
        if self.grafting == "adam":
            second = sum((1 - beta2) * beta2 ** (self.t - s) * g * g for s, g in enumerate(gradients, 1))
            first = sum((1 - beta1) * beta1 ** (self.t - s) * g for s, g in enumerate(gradients, 1))
            return first / (1 - beta1**self.t) / (np.sqrt(second / (1 - beta2**self.t)) + self.eps)
        if self.grafting.startswith("adagrad"):
            second = sum(g * g for g in gradients)
        else:
            second = sum((1 - beta2) * beta2 ** (self.t - s) * g * g for s, g in enumerate(gradients, 1))
        return filtered * scale / (np.sqrt(second) + self.eps)
