"""Gradients that are not what an optimizer hopes for; numbers are the rows of docs/reliability.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_method import METHODS, Run, batch, every_method, every_method_by_gradient, make, small_net, spoiled, values
from launching import torchrun
from torch import Tensor, nn

# one step shows the direction: nothing before it or after it
PLAIN: dict[str, Any] = {
    "lr": 1.0,
    "precondition_frequency": 1,
    "start_preconditioning_step": 1,
    "refresh_delay": 0,
    "workers": "inline",
}
PLAIN_KFAC: dict[str, Any] = {**PLAIN, "momentum": 0.0, "kl_clip": None, "factor_decay": 0.0, "statistics_frequency": 1}


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(method: str, gradients: Iterable[Tensor], parameter: nn.Parameter, **options: Any) -> list[Tensor]:
    """What each step subtracts from a parameter of zeros."""
    optimizer = make(method, [parameter], lr=1.0, **options)
    found = []
    for gradient in gradients:
        parameter.data.zero_()
        parameter.grad = gradient.to(parameter.dtype).clone()
        optimizer.step()
        found.append(-parameter.detach().double())
    return found


def layer_step(weight: Tensor, inputs: Tensor, outputs: Tensor, damping: float, size: float = 1.0) -> Tensor:
    """What K-FAC subtracts from a linear layer's weight of zeros; ``size outputs`` is the gradient of its outputs."""
    layer = nn.Linear(inputs.shape[1], outputs.shape[1], bias=False).to(weight.dtype)
    nn.init.zeros_(layer.weight)
    optimizer = make("kfac", layer, **{**PLAIN_KFAC, "damping": damping})
    (size * (layer(inputs.to(weight.dtype)) * outputs.to(weight.dtype)).sum() / len(inputs)).backward()
    optimizer.step()
    return -layer.weight.detach().double()


def dense_layer_step(inputs: Tensor, outputs: Tensor, damping: float, size: float = 1.0) -> Tensor:
    """The same by the dense Fisher matrix ``G (x) A + damping I``."""
    count = len(inputs)
    factors = size**2 * outputs.T @ outputs / count, inputs.T @ inputs / count
    gradient = size * outputs.T @ inputs / count
    fisher = torch.kron(*factors) + damping * torch.eye(gradient.numel(), dtype=torch.float64)
    return torch.linalg.solve(fisher, gradient.flatten()).view_as(gradient)


def check_that_a_step_leaves_nothing(method: str, kind: str) -> None:
    """Bit for bit as in a run without that batch; with nonfinite="raise" too."""
    expected = Run(method).steps(range(5)).steps(range(6, 13))
    found = Run(method).steps(range(5))
    before = found.values
    with pytest.warns(UserWarning, match=r"not finite.*step skipped, nothing changed"):
        found.step(5, change=spoiled(kind))
    assert torch.equal(found.values, before) and found.optimizer.skipped_steps == 1
    assert torch.equal(found.steps(range(6, 13)).values, expected.values)
    strict = Run(method, nonfinite="raise").steps(range(5))
    with pytest.raises(FloatingPointError, match=r"not finite.*nothing was changed"):
        strict.step(5, change=spoiled(kind))
    assert torch.equal(strict.steps(range(6, 13)).values, expected.values)


@every_method
def test_row_32_nan_gradients(method: str) -> None:
    check_that_a_step_leaves_nothing(method, "nan")


@every_method
def test_row_33_infinite_gradients(method: str) -> None:
    check_that_a_step_leaves_nothing(method, "inf")


@every_method
@pytest.mark.parametrize("begin", [0, 5])
def test_row_35_zero_gradients(method: str, begin: int) -> None:
    """From the start, or later: as in a run without those batches, weight decay included."""
    options = {"weight_decay": 0.1} if method != "trust_region" else {}  # there it is a part of the loss
    found = Run(method, **options).steps(range(begin))
    before = found.values
    found.steps(range(90, 93), change=lambda net, loss: 0.0 * loss)
    assert torch.equal(found.values, before)
    found.steps(range(begin, 10))
    assert torch.equal(found.values, Run(method, **options).steps(range(10)).values)
    assert not torch.equal(found.values, before)


@every_method_by_gradient
def test_row_35_zero_gradients_of_one_parameter(method: str) -> None:
    """They are the same as none; when they begin it moves."""
    found = []
    for zero in (True, False):
        run = Run(method)
        weight = run.net[3].weight
        before = weight.detach().clone()

        def lose(weight: Tensor = weight, zero: bool = zero) -> None:
            weight.grad = torch.zeros_like(weight) if zero else None

        run.steps(range(6), before=lose)
        assert torch.equal(weight, before)
        run.steps(range(6, 12))
        assert not torch.equal(weight, before)
        found.append(run.values)
    assert torch.equal(*found) and torch.isfinite(found[0]).all()


def test_row_34_nan_on_one_rank() -> None:
    """Shampoo under FSDP1 and ZeRO-2, K-FAC and TrustRegionNewtonCG under DDP: skipped by all."""
    torchrun(Path(__file__).parent / "worker_gradients.py", 3)


# of one gradient, again and again: rank one, all eigenvalues equal, and two of them, each repeated
SPECTRA = {"rank one": [1.7, 0, 0, 0, 0], "equal": [1.7] * 5, "repeated": [2.0, 2.0, 2.0, 0.5, 0.5]}


def matrix_of(spectrum: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left, right = torch.linalg.qr(randoms(5, 5))[0], torch.linalg.qr(randoms(5, 5, seed=1))[0]
    sizes = torch.tensor(spectrum, dtype=torch.float64)
    return left @ torch.diag(sizes) @ right.T, left, sizes, right


@every_method
@pytest.mark.parametrize("kind", SPECTRA)
def test_row_36_rank_one_and_repeated_eigenvalues(method: str, kind: str) -> None:
    """Against closed forms and dense matrices."""
    gradient, left, sizes, right = matrix_of(SPECTRA[kind])
    parameter = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
    options: dict[str, Any] = {**PLAIN, "betas": (0.0, 0.9)}
    del options["lr"]
    if method == "shampoo":  # (L + e l)^(-1/4) G (R + e l)^(-1/4), l the largest eigenvalue
        found = directions(method, [gradient] * 6, parameter, grafting=None, **options)[-1]
        expected = left @ torch.diag(sizes / (sizes.square() + 1e-6 * sizes.max() ** 2) ** (1 / 2)) @ right.T
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    elif method == "soap":  # Adam in the basis: signs
        found = directions(method, [gradient] * 6, parameter, **options)[-1]
        if kind == "rank one":
            torch.testing.assert_close(found, torch.outer(left[:, 0], right[:, 0]), rtol=1e-6, atol=1e-6)
        else:  # any basis of equal eigenvalues is one: no element in it is above Adam's bound, and nothing mixes them
            assert float(found.norm()) <= 5 * ((1 - 0.9**6) / (1 - 0.9)) ** 0.5 and float((found * gradient).sum()) > 0
            mixed = left[:, sizes == 2.0].T @ found @ right[:, sizes == 0.5]
            assert kind == "equal" or float(mixed.abs().max()) < 1e-6
    elif method == "sonew":
        if kind == "rank one":  # neighbours are multiples of each other
            gradient = torch.outer(randoms(5).sign(), 1 + 0.1 * randoms(5, seed=1).sin())
        del options["precondition_frequency"], options["refresh_delay"], options["workers"]
        found = directions(method, [gradient] * 6, parameter, **options)[-1]
        outer = gradient[:, :, None] * gradient[:, None, :]
        expected = banded_step(gradient, outer * (1 - 0.9**6), outer * (1 - 0.9**5), gradient.square())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    elif method == "kfac":  # inputs and gradients of the outputs, of five examples
        found = layer_step(parameter, gradient, gradient @ left, damping=0.1)
        torch.testing.assert_close(found, dense_layer_step(gradient, gradient @ left, 0.1), rtol=1e-9, atol=1e-12)
    else:  # squared residuals: as many products as there are eigenvalues, and the solution without a null space
        optimizer = make(method, [parameter], radius=100.0, cg_tolerance=1e-9)
        target = randoms(5, 3)
        parameter.data.zero_()
        optimizer.step(lambda: 0.5 * (gradient @ parameter[:, :3] - target).square().sum())
        expected = torch.linalg.pinv(gradient) @ target
        torch.testing.assert_close(parameter[:, :3].detach(), expected, rtol=1e-8, atol=1e-10)
        assert optimizer.last.cg_iterations == len(set(SPECTRA[kind]) - {0})


def banded_step(gradient: Tensor, statistics: Tensor, before: Tensor, second: Tensor) -> Tensor:
    """SONew's direction by dense matrices (Devvrit et al. 2023, theorem 3.1), of the length of Adam's.

    Args:
        statistics, before: running means of each row's ``g g^T``, ``(rows, n, n)``, with this gradient and before it:
            the ridge is relative to those.
        second: Adam's, without its bias.
    """
    rows = []
    for g, own, earlier in zip(gradient.numpy(), statistics.numpy(), before.numpy(), strict=True):
        ridged = own + 1e-6 * np.diag(earlier).max() * np.eye(len(g))
        lower, inverse = np.eye(len(g)), np.diag(ridged).copy()
        for j in range(len(g) - 1):
            schur = ridged[j, j] - ridged[j, j + 1] ** 2 / ridged[j + 1, j + 1] if ridged[j, j] > 0 else 0.0
            if schur > 1e-5 * ridged[j, j]:
                inverse[j], lower[j + 1, j] = schur, -ridged[j, j + 1] / ridged[j + 1, j + 1]
        scaled = np.divide(lower.T @ g, inverse, out=np.zeros_like(g), where=inverse > 0)
        rows.append(lower @ scaled)
    found = torch.from_numpy(np.stack(rows))
    return found * (gradient / (second.sqrt() + 1e-8)).norm() / found.norm()


SIZES = [1e20, 1e-20, 1e-40]


# SOAP is Adam in a basis, whose squares vanish or overflow as Adam's do
@pytest.mark.parametrize(("method", "size"), [(m, s) for m in METHODS for s in SIZES if m != "soap" or s == 1e-20])
def test_row_37_the_direction_does_not_depend_on_the_size(method: str, size: float) -> None:
    """In float32, whose squares overflow or vanish there; K-FAC's damping is absolute, so against a dense matrix."""
    parameter = nn.Parameter(torch.zeros(6, 5))
    gradients = randoms(8, 6, 5)
    if method == "kfac":
        inputs, outputs = randoms(7, 5), randoms(7, 6, seed=1)
        found = layer_step(parameter, inputs, outputs, 0.1, size)
        # squares of 1e+20 have no place in float32: this layer moves as by SGD, and is named
        expected = dense_layer_step(inputs, outputs, 0.1, size) if size < 1 else size * outputs.T @ inputs / 7
        bound = 1e-2 if size == 1e-40 else 1e-5  # 1e-40 has six bits less than 1
        torch.testing.assert_close(found / size, expected / size, rtol=bound, atol=bound)
        return
    if method == "trust_region":  # least squares
        expected = torch.linalg.lstsq(randoms(12, 6), torch.ones(12, 5, dtype=torch.float64)).solution
        for preconditioner in (None, "diagonal"):
            parameter.data.zero_()
            # with a preconditioner the region is measured in its norm
            radius = {"radius": 1e30, "max_radius": 1e30} if preconditioner and size > 1 else {"radius": 100.0}
            options = {"cg_tolerance": 1e-4, "max_cg_iterations": 30, "preconditioner": preconditioner}
            optimizer = make(method, [parameter], **radius, **options)
            optimizer.step(lambda: size * 0.5 * (randoms(12, 6).float() @ parameter - 1.0).square().sum())
            assert optimizer.last is not None and optimizer.last.accepted
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-2, atol=1e-3)
        return
    options = {"betas": (0.0, 0.9), "eps": 0.0, **({"grafting": None} if method == "shampoo" else {})}
    found = []
    for scale in (1.0, size):
        direction = directions(method, gradients * scale, parameter, **options)[-1]
        found.append(direction / direction.norm())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["shampoo", "soap", "sonew"])
@pytest.mark.parametrize("size", SIZES)
def test_row_37_whole_runs_stay_finite(method: str, size: float) -> None:
    """No step is longer than Adam's of gradients of usual size, and Shampoo's have the length of torch's AdamW."""
    gradients = randoms(12, 6, 5)
    parameter, other, usual = (nn.Parameter(torch.zeros(6, 5)) for _ in range(3))
    options = {"betas": (0.9, 0.99)}
    found = directions(method, gradients * size, parameter, **options)
    lengths = []
    for one, factor in ((other, size), (usual, 1.0)):
        adamw = torch.optim.AdamW([one], lr=1.0, weight_decay=0.0, **options)
        lengths.append([])
        for gradient in gradients:
            one.data.zero_()
            one.grad = (gradient * factor).float()
            adamw.step()
            lengths[-1].append(float(one.detach().double().norm()))
    for step, direction in enumerate(found):
        length = float(direction.norm())
        assert length <= 1.5 * max(lengths[1]), step
        if method == "shampoo":
            assert length == pytest.approx(lengths[0][step], rel=1e-4, abs=1e-30), step


@pytest.mark.parametrize("limit", ["max_factor_dim", "max_preconditioner_dim"])
@pytest.mark.parametrize("size", [0.0, 1e-25])
@pytest.mark.parametrize("method", ["shampoo", "soap"])
def test_row_38_a_part_that_no_gradient_reaches(method: str, size: float, limit: str) -> None:
    """Inputs that are never seen, or whose squares vanish in float32: the rest moves as if they were not there."""
    gradients = [randoms(8, 24, seed=step) for step in range(40)]
    options = {"workers": "inline", "stagger": False, limit: 8} | ({"grafting": None} if method == "shampoo" else {})
    expected = directions(method, [g[:, 8:] for g in gradients], nn.Parameter(torch.zeros(8, 16)), **options)
    for gradient in gradients:
        gradient[:, :8] *= size
    found = directions(method, gradients, nn.Parameter(torch.zeros(8, 24)), **options)
    for own, without in zip(found, expected, strict=True):
        torch.testing.assert_close(own[:, 8:], without, rtol=1e-4, atol=1e-4 * float(without.abs().max()))
        assert torch.isfinite(own).all() and (size > 0.0 or not own[:, :8].any())


def test_row_38_a_part_that_a_gradient_reaches_late() -> None:
    """Roots that saw none of it are those of the whole matrix; a block of its own moves as its graft (none: SGD)."""
    first, *later = (randoms(8, 24, seed=step) for step in range(4))
    first[:, :8] = 0.0
    options = PLAIN | {"precondition_frequency": 3, "grafting": None, "betas": (0.0, 0.9), "exponent_override": "2k"}
    del options["lr"]
    _, found, *_ = directions("shampoo", [first, *later], nn.Parameter(torch.zeros(8, 24)), **options, max_factor_dim=8)
    sides = first @ first.T, torch.block_diag(*(part.T @ part for part in first.split(8, dim=1)))
    ridges = 1e-6 * torch.ones(8), 1e-6 * torch.ones(24)
    for part in range(3):  # that of a part without gradients is the largest of the others'
        largest = [float(torch.linalg.eigvalsh(sides[1][cut, cut])[-1]) for cut in (slice(8, 16), slice(16, 24))]
        ridges[1][8 * part : 8 * part + 8] *= max(largest) if part == 0 else largest[part - 1]
    ridges[0].mul_(float(torch.linalg.eigvalsh(sides[0])[-1]))
    roots = []
    for side, ridge in zip(sides, ridges, strict=True):
        sizes, vectors = torch.linalg.eigh(side + ridge.double().diag())
        roots.append(vectors @ (sizes**-0.25).diag() @ vectors.T)
    torch.testing.assert_close(found, roots[0] @ later[0] @ roots[1], rtol=1e-3, atol=1e-3 * float(found.abs().max()))
    # refreshes at steps 1 and 3
    blocks = directions(
        "shampoo", [first, *later], nn.Parameter(torch.zeros(8, 24)), **options, max_preconditioner_dim=8
    )
    assert not blocks[0][:, :8].any() and all(torch.isfinite(found).all() for found in blocks)
    torch.testing.assert_close(blocks[1][:, :8], later[0][:, :8])
    assert not torch.allclose(blocks[2][:, :8], later[1][:, :8], rtol=0.1)


@pytest.mark.parametrize("grafting_norm", ["parameter", "block"])
def test_row_38_a_block_that_a_gradient_reaches_late_takes_nothing_from_the_others(grafting_norm: str) -> None:
    """Until its refresh it moves as torch's AdamW, and the rest as if it were not there."""
    gradients = [randoms(16, 8, seed=step) for step in range(19)]
    for step, gradient in enumerate(gradients):
        gradient[8 if step < 14 else 16 :] = 0.0  # refreshes are at steps 10 and 20
    options: dict[str, Any] = {
        "betas": (0.9, 0.99), "workers": "inline", "stagger": False, "max_preconditioner_dim": 8,
        "precondition_frequency": 10, "refresh_delay": 0, "grafting_norm": grafting_norm,
    }  # fmt: skip
    found = directions("shampoo", gradients, nn.Parameter(torch.zeros(16, 8)), **options)
    alone = directions("shampoo", [gradient[:8] for gradient in gradients], nn.Parameter(torch.zeros(8, 8)), **options)
    other = nn.Parameter(torch.zeros(16, 8))
    adamw = torch.optim.AdamW([other], lr=1.0, weight_decay=0.0, betas=(0.9, 0.99))
    for step, gradient in enumerate(gradients):
        other.data.zero_()
        other.grad = gradient.float()
        adamw.step()
        torch.testing.assert_close(found[step][8:], -other.detach()[8:].double(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[step][:8], alone[step], rtol=1e-4, atol=1e-5)


@every_method
def test_row_38_mostly_zero_rows(method: str) -> None:
    """An embedding of which a step sees six rows of thirty, in float32, against dense matrices in float64."""
    torch.manual_seed(0)
    table = nn.Embedding(30, 4)
    start = table.weight.detach().clone().double()
    tokens = [torch.arange(30)[torch.randperm(12)[:6] * 2] for _ in range(8)]  # odd rows are never seen
    outputs = [randoms(6, 4, seed=step) for step in range(8)]
    gradients = [torch.zeros(30, 4).double().index_add(0, t, g / 6) for t, g in zip(tokens, outputs, strict=True)]
    options: dict[str, Any] = {**PLAIN, "lr": 0.1}
    if method == "trust_region":  # each row that is seen lands on its target
        optimizer = make(method, table, radius=100.0, cg_tolerance=1e-7)
        optimizer.step(lambda: (table(tokens[0]) - outputs[0].float()).square().mean())
        expected = start.clone()
        expected[tokens[0]] = outputs[0]
        torch.testing.assert_close(table.weight.detach().double(), expected, rtol=1e-5, atol=1e-5)
        return
    if method == "kfac":
        optimizer = make(method, table, **PLAIN_KFAC | {"lr": 0.1, "damping": 0.1})
    else:
        options |= {"grafting": None} if method == "shampoo" else {}
        kept = {"lr": 0.1, "start_preconditioning_step": 1} if method == "sonew" else options
        optimizer = make(method, table, **kept, betas=(0.0, 0.9))
    expected, right, rows, second = start.clone(), torch.zeros(4, 4).double(), torch.zeros(30, 4, 4).double(), 0.0
    for step, (own, output, gradient) in enumerate(zip(tokens, outputs, gradients, strict=True), 1):
        optimizer.zero_grad()
        ((table(own) * output.float()).sum() / 6).backward()
        optimizer.step()
        bias = 1 - 0.9**step
        right = 0.9 * right + 0.1 * gradient.T @ gradient
        sizes, basis = torch.linalg.eigh(right / bias)
        if method == "shampoo":  # the vocabulary's side has no preconditioner
            direction = gradient @ basis @ torch.diag((sizes + 1e-6 * sizes.max()).rsqrt()) @ basis.T
        elif method == "soap":
            second = 0.9 * second + 0.1 * (gradient @ basis).square()
            direction = (gradient @ basis / ((second / bias).sqrt() + 1e-8)) @ basis.T
        elif method == "sonew":
            before, rows = rows, 0.9 * rows + 0.1 * gradient[:, :, None] * gradient[:, None, :]
            direction = banded_step(gradient, rows, before, rows.diagonal(dim1=1, dim2=2) / bias)
        else:  # (a G + damping I)^-1 g, a the share of the row's token
            factor, eye = output.T @ output / 6, torch.eye(4, dtype=torch.float64)
            share = torch.bincount(own, minlength=30).double() / 6
            direction = torch.linalg.solve(share[:, None, None] * factor + 0.1 * eye, gradient[:, :, None])[:, :, 0]
        expected -= 0.1 * direction
        torch.testing.assert_close(table.weight.detach().double(), expected, rtol=1e-3, atol=1e-4)
    never = torch.ones(30, dtype=torch.bool)
    never[torch.cat(tokens)] = False
    assert torch.isfinite(table.weight).all() and torch.equal(table.weight.detach()[never].double(), start[never])


@every_method_by_gradient
def test_row_39_sparse_gradients(method: str) -> None:
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3))
    before = values(net)
    optimizer = make(method, net)
    net(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"parameter '0.weight' has a sparse gradient: build .* sparse=False"):
        optimizer.step()
    assert torch.equal(values(net), before)


def test_row_39_sparse_gradients_inside_a_closure() -> None:
    """There they are differentiated: as with a dense layout."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Tanh(), nn.Linear(3, 3))
        optimizer = make("trust_region", net)
        for _ in range(4):
            optimizer.step(lambda net=net: (net(torch.tensor([1, 3, 3])) - 1.0).square().sum())
        found.append(values(net))
    torch.testing.assert_close(*found)


@every_method
def test_row_40_complex_parameters(method: str) -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wave, self.layer = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64)), nn.Linear(3, 3)

    with pytest.raises(TypeError, match=r"parameter 'wave' is complex \(torch.complex64\)"):
        make(method, Wave()).attach()


class Mixed(nn.Module):
    """Layers in different precision."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64).to(dtype) for dtype in dtypes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).tanh()
        return x.double()


def rows(step: int) -> Tensor:
    return randoms(12, 6, seed=step)


@every_method
def test_row_41_parameters_of_several_dtypes(method: str) -> None:
    """As with an optimizer for each layer, bit for bit; half precision has no second derivative worth having."""
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    if method == "trust_region":
        with pytest.raises(TypeError, match=r"parameter 'layers.0.weight' is torch.bfloat16: the ratio"):
            make(method, Mixed(*dtypes)).attach()
        mixed, whole = (Run(method, Mixed(*kinds), inputs=rows) for kinds in (dtypes[1:3], dtypes[2:3] * 2))
        start = whole.values
        mixed.steps(range(8))
        whole.steps(range(8))
        assert (mixed.values - whole.values).abs().max() < 1e-4 * (whole.values - start).abs().max()
        return
    options: dict[str, Any] = {} if method == "sonew" else {"stagger": False}
    options |= {"kl_clip": None} if method == "kfac" else {}
    together = Run(method, Mixed(*dtypes), inputs=rows, **options).steps(range(9))
    net = Mixed(*dtypes)
    start = values(net)
    optimizers = []
    for name, layer in net.layers.named_children():
        optimizers.append(make(method, [(f"layers.{name}.{n}", p) for n, p in layer.named_parameters()], **options))
        optimizers[-1].attach(net)
    for step in range(9):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (net(rows(step)).sin() - 0.3).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(together.values, values(net))
    moved = [(a != b).any() for a, b in zip(values(net).split(42), start.split(42), strict=True)]
    assert all(moved) and torch.isfinite(together.values).all()


@every_method_by_gradient
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_41_half_precision(method: str, dtype: torch.dtype) -> None:
    """Statistics and roots stay float32: the run follows one in float64 to the dtype's rounding."""
    options: dict[str, Any] = {"preconditioner_eps": 1e-2} if method in ("shampoo", "sonew") else {}
    found = [Run(method, Mixed(kind), inputs=rows, **options) for kind in (torch.float64, dtype)]
    start = found[0].values
    for run in found:
        run.steps(range(12))
    movement = (found[0].values - start).abs().max()
    assert (found[0].values - found[1].values).abs().max() <= 0.15 * movement
    kept = [block.statistics for member in found[1].optimizer._members for block in member.blocks]
    assert all(matrix.dtype == torch.float32 for one in kept for matrix in one.matrices)


def in_layout(tensor: Tensor, kind: str) -> Tensor:
    """The same values, laid out in another way."""
    if kind == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "sliced":
        whole = tensor.new_zeros([2 * size + 1 for size in tensor.shape])
        part = whole[tuple(slice(1, None, 2) for _ in tensor.shape)]
        part.copy_(tensor)
        return part
    if kind == "expanded":  # of which only the mean over the rows is kept
        return tensor.mean(0, keepdim=True).expand_as(tensor)
    assert kind == "channels_last"
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor.clone()


@every_method_by_gradient
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels_last"])
def test_row_42_gradients_in_any_layout(method: str, kind: str) -> None:
    """Equal to contiguous ones, bit for bit but for sums in another order."""
    found = []
    for contiguous in (True, False):
        run = Run(method, weight_decay=0.1, **({} if method in ("sonew", "kfac") else {"max_preconditioner_dim": 16}))

        def lay_out(run: Run = run, contiguous: bool = contiguous) -> None:
            for parameter in run.net.parameters():
                if parameter.ndim > 1:
                    assert parameter.grad is not None
                    gradient = in_layout(parameter.grad, kind)
                    assert gradient.is_contiguous() == (kind == "channels_last" and gradient.ndim == 2)
                    parameter.grad = gradient.contiguous() if contiguous else gradient

        found.append(run.steps(range(10), before=lay_out).values)
    assert float((found[0] - found[1]).abs().max()) <= 1e-9


@every_method
@pytest.mark.parametrize("kind", ["transposed", "sliced", "channels_last"])
def test_row_42_parameters_in_any_layout(method: str, kind: str) -> None:
    expected = Run(method).steps(range(10)).values
    torch.manual_seed(0)
    net = small_net().double()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data = in_layout(parameter.data, kind)
    run = Run(method, net).steps(range(10))
    assert not run.net[0].weight.is_contiguous()
    assert float((run.values - expected).abs().max()) <= 1e-9


@every_method
def test_row_43_accumulation(method: str) -> None:
    """A batch in one part and in four."""
    one, four = (Run(method).steps(range(12), parts=parts).values for parts in (1, 4))
    assert float((one - four).abs().max()) <= 1e-9
    if method == "kfac":  # the loop has to say what it divides by
        other = Run(method)
        other.optimizer.accumulate = lambda micro_batches: None
        assert float((one - other.steps(range(12), parts=4).values).abs().max()) > 1e-6


@every_method
def test_row_44_a_step_that_is_left_out(method: str) -> None:
    """By the loop, and by a GradScaler that has met an infinite gradient: as in a run without that batch."""
    if method == "trust_region":
        run = Run(method).steps(range(5))
        before, steps = run.values, run.optimizer.steps
        run.optimizer.collect(lambda: run.loss(batch(5)))
        run.optimizer.abandon()
        assert torch.equal(run.values, before) and run.optimizer.steps == steps
        expected = Run(method).steps(range(5)).steps(range(6, 12)).values
        assert torch.equal(run.steps(range(6, 12)).values, expected)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(run.loss(batch(0))).backward()
        with pytest.raises(TypeError, match="GradScaler cannot step"):
            scaler.step(run.optimizer)
        return
    expected = Run(method).steps(range(5)).steps(range(6, 12)).values
    for how in ("loop", "scaler"):
        run = Run(method)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=how == "scaler")
        for step in range(12):
            run.optimizer.zero_grad()
            if method == "kfac":
                run.optimizer.accumulate(1, scaler if how == "scaler" else None)
            loss = run.loss(batch(step))
            scaler.scale(spoiled("inf")(run.net, loss) if step == 5 and how == "scaler" else loss).backward()
            if step != 5 or how == "scaler":
                scaler.step(run.optimizer)
                scaler.update()
        assert float((run.values - expected).abs().max()) <= 1e-9, how
        assert how == "loop" or scaler.get_scale() == 512.0


@every_method_by_gradient
def test_row_45_clipping_by_norm(method: str) -> None:
    """As with gradients that were multiplied by hand, in float64 and by another formula."""
    found = []
    for by_hand in (True, False):
        run, norms = Run(method, net=None), []

        def clip(run: Run = run, norms: list[float] = norms, by_hand: bool = by_hand) -> None:
            gradients = [p.grad for p in run.net.parameters() if p.grad is not None]
            norms.append(float(np.sqrt(sum(float(np.square(g.numpy()).sum()) for g in gradients))))
            if not by_hand:
                torch.nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
            elif norms[-1] > 0.1:
                for gradient in gradients:
                    gradient.copy_(torch.from_numpy(gradient.numpy() * (0.1 / (norms[-1] + 1e-6))))

        found.append(run.steps(range(12), before=clip).values)
        assert min(norms[:6]) > 0.1
    assert float((found[0] - found[1]).abs().max()) <= 1e-9
    assert float((found[0] - Run(method).steps(range(12)).values).abs().max()) > 1e-6
