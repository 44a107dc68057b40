"""TrustRegionNewtonCG against scipy's trajectories, dense curvature, and its own promises."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_soo import TrustRegionNewtonCG
from lightning_soo.optim.curvature import CurvatureGraph
from lightning_soo.optim.radius_rules import PRESETS, RadiusRule
from lightning_soo.optim.sub_batches import one_of_each_stratum

FOLDER = Path(__file__).parent.parent / "golden"
GOLDEN = np.load(FOLDER / "trust_region.npz")
PRODUCTS = np.load(FOLDER / "hessian_products.npz")


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def network(seed: int = 0, *, dropout: float = 0.0, normalised: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), *([nn.BatchNorm1d(8)] if normalised else []), nn.Tanh()]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(8, 3)).double()


def batch(seed: int = 1, examples: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (examples,), generator=generator)


def loss_of(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def accepted_points(
    optimizer: TrustRegionNewtonCG, closure: Callable[[], Tensor], point: Callable[[], Tensor], last: int
) -> list[Tensor]:
    """The start and every accepted point."""
    points = [point()]
    while len(points) < last:
        optimizer.step(closure)
        assert optimizer.last is not None and optimizer.steps < 200
        if optimizer.last.accepted:
            points.append(point())
        else:
            assert torch.equal(points[-1], point())
    return points


def test_rosenbrock_iterate_by_iterate_as_scipy() -> None:
    x = torch.from_numpy(GOLDEN["rosen/x0"]).clone().requires_grad_()
    optimizer = TrustRegionNewtonCG([x], radius=1.0, preset="scipy")
    expected = GOLDEN["rosen/traj"]
    distinct = [expected[0]] + [b for a, b in pairwise(expected) if not np.array_equal(a, b)]
    points = accepted_points(optimizer, lambda: rosenbrock(x), lambda: x.detach().clone(), len(distinct))
    assert np.abs(torch.stack(points).numpy() - np.stack(distinct)).max() < 1e-8


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_network_step_by_step_as_scipy(micro_batches: int) -> None:
    """Each step from scipy's own iterate. Weight decay is the golden run's penalty.

    Where the model takes more than 20 products and its smallest eigenvalues are near zero, conjugate gradients amplify
    rounding: scipy's own iterates move by 3e-5 when its derivatives are rounded differently, with x of order 1. Sums of
    micro-batches are such derivatives, and show it from 16 products on.
    """
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.from_numpy(GOLDEN["mlp/X"]), torch.from_numpy(GOLDEN["mlp/y"])
    optimizer = TrustRegionNewtonCG(model, radius=1.0, preset="scipy", weight_decay=1e-2)
    expected = torch.from_numpy(GOLDEN["mlp/traj"])
    short, most = 0, 20 if micro_batches == 1 else 15
    for index, (start, end) in enumerate(pairwise(expected)):
        nn.utils.vector_to_parameters(start.clone(), model.parameters())
        loss = optimizer.step_on(loss_of(model), data, micro_batches)
        assert float(loss) == pytest.approx(GOLDEN["mlp/losses"][index], abs=1e-12)
        few = optimizer.last.cg_iterations <= most
        short += few
        assert (flat(model) - end).abs().max() < (1e-7 if few else 1e-3)  # 6e-9 to 1.2e-8, by processor
    assert short >= 10


def test_network_ends_where_scipy_ends() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    nn.utils.vector_to_parameters(torch.from_numpy(GOLDEN["mlp/x0"]).clone(), model.parameters())
    data = torch.from_numpy(GOLDEN["mlp/X"]), torch.from_numpy(GOLDEN["mlp/y"])
    optimizer = TrustRegionNewtonCG(model, radius=1.0, preset="scipy", weight_decay=1e-2, retries=3)
    for _ in range(25):
        loss = optimizer.step_on(loss_of(model), data)
    assert float(loss) == pytest.approx(float(GOLDEN["mlp/fun"]), abs=1e-12)
    assert (flat(model) - torch.from_numpy(GOLDEN["mlp/x"])).abs().max() < 1e-6


def golden_model(kind: str) -> nn.Module:
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(96, 5),
        )
    model = model.double()
    for name, parameter in model.named_parameters():
        number, rest = name.split(".")
        parameter.data.copy_(torch.from_numpy(PRODUCTS[f"{kind}/param/{number}.{rest}"]))
    return model


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize(("curvature", "key"), [("hessian", "Hv"), ("gauss_newton", "Gv")])
def test_products_of_independent_implementations(kind: str, curvature: str, key: str) -> None:
    model = golden_model(kind)
    parameters = list(model.parameters())
    outputs = model(torch.from_numpy(PRODUCTS[f"{kind}/X"]))
    loss = nn.functional.cross_entropy(outputs, torch.from_numpy(PRODUCTS[f"{kind}/y"]))
    graph = CurvatureGraph(loss, [outputs], parameters, curvature)
    assert np.abs(torch.cat([g.reshape(-1) for g in graph.gradient]).numpy() - PRODUCTS[f"{kind}/grad"]).max() < 1e-12
    for column in range(4):
        vector = torch.from_numpy(PRODUCTS[f"{kind}/V"][:, column])
        pieces = vector.split([p.numel() for p in parameters])
        found = graph.product([piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)])
        expected = PRODUCTS[f"{kind}/{key}"][:, column]
        assert np.abs(torch.cat([f.reshape(-1) for f in found]).numpy() - expected).max() < 1e-10


def test_radius_rules() -> None:
    """As they are written: scipy's source, and Xu, Roosta and Mahoney."""
    scipy, xu = PRESETS["scipy"], PRESETS["xu"]

    def following(rule: RadiusRule, ratio: float, on_boundary: bool, norm: float = 2.0) -> float:
        return rule.next_radius(2.0, ratio, step_norm=norm, on_boundary=on_boundary, max_radius=3.0)

    assert [following(scipy, r, True) for r in (-1.0, 0.2, 0.25, 0.75, 0.76)] == [0.5, 0.5, 2.0, 2.0, 3.0]
    assert following(scipy, 0.9, False) == 2.0
    assert [scipy.accepts(r) for r in (0.15, 0.151, -math.inf, math.nan)] == [False, True, False, False]
    assert [following(xu, r, False) for r in (0.0, 1e-4, 0.5)] == [1.0, 2.4, 2.4]
    assert following(xu, 0.81, False) == 3.0 and following(xu, math.nan, True) == 1.0
    assert following(xu, 0.0, False, 0.3) == 0.25 and following(scipy, 0.0, False, 0.3) == 0.5
    assert [xu.accepts(r) for r in (1e-4, 1.1e-4)] == [False, True]


def test_a_rejection_restores_parameters_and_its_retries_take_one_forward_pass() -> None:
    """Retries find what steps of a run that starts again at the smaller radius find."""
    model = network(1)
    start = flat(model)
    optimizer = TrustRegionNewtonCG(model, radius=1e4, preset="xu", max_cg_iterations=10)
    data = batch()
    optimizer.step_on(loss_of(model), data)
    tried, norms = 0, []
    while not optimizer.last.accepted:
        assert torch.equal(flat(model), start)
        norms.append(optimizer.last.step_norm)
        before, radius = optimizer.propagations, optimizer.radius
        optimizer.retry()
        tried += 1
        if optimizer.last.cg_iterations == 0:
            assert optimizer.propagations - before in (0.0, len(data[0]))
        other = network(1)
        alone = TrustRegionNewtonCG(other, radius=radius, preset="xu", max_cg_iterations=10)
        alone.step_on(loss_of(other), data)
        assert alone.last.ratio == pytest.approx(optimizer.last.ratio, rel=1e-6, abs=1e-9)
        assert torch.allclose(flat(other), flat(model), rtol=0, atol=1e-9)
    assert tried > 4  # more than are stored, so conjugate gradients ran again
    with pytest.raises(RuntimeError, match="was not rejected"):
        optimizer.retry()
    again = network(1)
    at_once = TrustRegionNewtonCG(again, radius=1e4, preset="xu", max_cg_iterations=10, retries=50)
    at_once.step_on(loss_of(again), data)
    assert torch.allclose(flat(again), flat(model), rtol=0, atol=1e-12)
    assert at_once.propagations == optimizer.propagations


def test_negative_curvature_is_used() -> None:
    """From a saddle's shoulder, where Newton's method without a region would go to the saddle."""
    x = torch.tensor([0.5, 1e-3], dtype=torch.float64, requires_grad=True)
    optimizer = TrustRegionNewtonCG([x], radius=0.5, preset="scipy", curvature="hessian")
    seen = 0
    for _ in range(30):
        optimizer.step(lambda: (x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4).sum())
        seen += optimizer.last.negative_curvature
    assert seen > 0
    assert torch.allclose(x.detach().abs(), torch.tensor([0.0, 2**0.5], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("keep_graphs", [None, True, False])
def test_gauss_newton_steps_are_those_of_the_dense_matrix(keep_graphs: bool | None) -> None:
    model = network()
    data = batch()
    parameters = dict(model.named_parameters())

    def outputs(values: Tensor) -> Tensor:
        pieces = values.split([p.numel() for p in parameters.values()])
        shaped = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), pieces, strict=True)}
        return torch.func.functional_call(model, shaped, (data[0],))

    point = flat(model)
    jacobian = torch.func.jacrev(outputs)(point).reshape(-1, len(point))
    probabilities = outputs(point).softmax(1)
    inner = torch.block_diag(*[torch.diag(p) - torch.outer(p, p) for p in probabilities]) / len(data[0])
    gradient = torch.func.grad(lambda v: nn.functional.cross_entropy(outputs(v), data[1]))(point)
    matrix = (jacobian.T @ inner @ jacobian + 1e-1 * torch.eye(len(point))).detach()
    expected = -torch.linalg.solve(matrix, (gradient + 1e-1 * point).detach())

    def closure(section: slice) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            found = model(data[0][section])
            return nn.functional.cross_entropy(found, data[1][section]), found

        return run

    optimizer = TrustRegionNewtonCG(
        model,
        radius=1e6,
        curvature="gauss_newton",
        weight_decay=0.1,
        cg_tolerance=1e-12,
        max_cg_iterations=500,
        keep_graphs=keep_graphs,
    )
    optimizer.step([closure(slice(0, 40)), closure(slice(40, 60))], weights=[40, 20])
    assert optimizer.last.accepted and not optimizer.last.on_boundary
    assert torch.allclose(flat(model) - point, expected, atol=1e-7)


def test_dropout_and_running_statistics_count_a_batch_once() -> None:
    """One mask for all evaluations; generators and buffers end where one forward pass leaves them."""
    model, plain = network(dropout=0.4, normalised=True), network(dropout=0.4, normalised=True)
    data = batch()
    torch.manual_seed(5)
    expected = loss_of(plain)(data)
    numbers = torch.rand(3)
    torch.manual_seed(5)
    optimizer = TrustRegionNewtonCG(model, radius=0.1, max_cg_iterations=5, hessian_fraction=0.5)
    loss = optimizer.step_on(loss_of(model), data)
    assert torch.equal(torch.rand(3), numbers)
    assert float(loss) == float(expected.detach())
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    # the loss that decided is the loss of the new point under the same mask
    assert optimizer.last.accepted
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    assert float(loss_of(plain)(data).detach()) == pytest.approx(optimizer.last.trial_loss, abs=1e-14)


def test_propagations_are_counted() -> None:
    data = batch()
    for options, micro_batches, cost in (
        ({}, 1, lambda k: 2 + 2 * k + 1),
        ({"keep_graphs": False}, 1, lambda k: 2 + 4 * k + 1),
        ({}, 2, lambda k: 2 + 4 * k + 1),
        ({"keep_graphs": True}, 2, lambda k: 2 + 2 * k + 1),
        ({"hessian_fraction": 0.25}, 1, lambda k: 2 + 0.25 * (2 + 2 * k) + 1),
    ):
        model = network()
        optimizer = TrustRegionNewtonCG(model, radius=0.1, **options)
        optimizer.step_on(loss_of(model), data, micro_batches)
        assert optimizer.propagations == cost(optimizer.last.cg_iterations) * len(data[0]), options


def test_sub_batches_are_those_of_the_dense_hessian() -> None:
    """Products over the chosen examples alone: one step inside a large region solves with their Hessian."""
    model = network()
    data = batch()
    chosen = one_of_each_stratum(60, 0.5, seed=7, step=0, rank=0)
    assert len(chosen) == 30 and all(2 * i <= index < 2 * i + 2 for i, index in enumerate(chosen))
    parameters = dict(model.named_parameters())

    def loss(values: Tensor, examples: list[int]) -> Tensor:
        pieces = values.split([p.numel() for p in parameters.values()])
        shaped = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), pieces, strict=True)}
        outputs = torch.func.functional_call(model, shaped, (data[0][examples],))
        return nn.functional.cross_entropy(outputs, data[1][examples]) + 0.25 * (values**2).sum()

    point = flat(model)
    hessian = torch.func.hessian(lambda v: loss(v, chosen))(point).detach()
    gradient = torch.func.grad(lambda v: loss(v, list(range(60))))(point).detach()
    assert torch.linalg.eigvalsh(hessian)[0] > 0
    optimizer = TrustRegionNewtonCG(
        model, radius=1e6, weight_decay=0.5, hessian_fraction=0.5, cg_tolerance=1e-12, max_cg_iterations=500, seed=7
    )
    optimizer.step_on(loss_of(model), data)
    assert torch.allclose(flat(model) - point, -torch.linalg.solve(hessian, gradient), atol=1e-8)


def test_resume_is_bitwise() -> None:
    def train(model: nn.Module, optimizer: TrustRegionNewtonCG, steps: range) -> None:
        for step in steps:
            optimizer.step_on(loss_of(model), batch(step))

    options = {"radius": 0.5, "hessian_fraction": 0.25, "preconditioner": "diagonal", "retries": 1}
    model = network()
    optimizer = TrustRegionNewtonCG(model, **options)
    train(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(4, 8))
    resumed = network(3)
    again = TrustRegionNewtonCG(resumed, **{**options, "radius": 7.0})
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    copied_model = network(4)
    copied_model.load_state_dict(saved[0])
    train(resumed, again, range(4, 8))
    assert torch.equal(flat(resumed), flat(model))
    assert again.radius == optimizer.radius and again.steps == optimizer.steps
    assert again.propagations == optimizer.propagations
    assert pickle.loads(pickle.dumps(again)).radius == again.radius
    copy.deepcopy(again).state_dict()


def test_diagonal_preconditioner_takes_fewer_products() -> None:
    """On a badly scaled quadratic, after the moments have seen the scales."""
    scales = torch.logspace(-3, 3, 40, dtype=torch.float64)
    counts = {}
    for preconditioner in (None, "diagonal", lambda vectors: [v / scales for v in vectors]):
        x = torch.ones(40, dtype=torch.float64, requires_grad=True)
        optimizer = TrustRegionNewtonCG([x], radius=1e6, cg_tolerance=1e-6, preconditioner=preconditioner)
        optimizer.step(lambda x=x: (scales * x * x).sum() / 2)
        counts[str(type(preconditioner).__name__)] = optimizer.last.cg_iterations
        assert optimizer.last.accepted
    assert counts["function"] == 1 < counts["str"] < counts["NoneType"]


def test_what_is_refused_says_what_to_do() -> None:
    model = network()
    with pytest.raises(ValueError, match="preset='scypi' is unknown; did you mean 'scipy'"):
        TrustRegionNewtonCG(model, preset="scypi")
    with pytest.raises(ValueError, match="hessian_fraction=0"):
        TrustRegionNewtonCG(model, hessian_fraction=0)
    with pytest.raises(TypeError, match="no option 'raduis'; did you mean 'radius'"):
        TrustRegionNewtonCG(model, raduis=1)
    with pytest.raises(ValueError, match="radius=0"):
        TrustRegionNewtonCG(model, radius=0)
    with pytest.raises(ValueError, match="max_cg_iterations=0"):
        TrustRegionNewtonCG(model, max_cg_iterations=0)
    optimizer = TrustRegionNewtonCG(model)
    before = flat(model)
    data = batch()
    with pytest.raises(TypeError, match="without a graph"):
        optimizer.step(lambda: loss_of(model)(data).detach())
    with pytest.raises(TypeError, match="returned float"):
        optimizer.step(lambda: 0.5)
    with pytest.raises(ValueError, match="weight=0"):
        optimizer.collect(lambda: loss_of(model)(data), weight=0)
    with pytest.raises(TypeError, match="needs what the loss was computed from"):
        TrustRegionNewtonCG(model, curvature="gauss_newton").step(lambda: loss_of(model)(data))
    with pytest.raises(ValueError, match=r"hessian_fraction=0\.5 of one closure"):
        TrustRegionNewtonCG(model, hessian_fraction=0.5).step(lambda: loss_of(model)(data))
    with pytest.raises(TypeError, match=r"is torch\.bfloat16: the ratio"):
        TrustRegionNewtonCG(network().bfloat16()).attach()
    optimizer.step()  # zero gradients: what loaders of sharded checkpoints do
    loss_of(model)(data).backward()
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)(data)).backward()
    with pytest.raises(TypeError, match="GradScaler cannot step"):
        scaler.step(optimizer)
    assert torch.equal(flat(model), before)


def test_bad_numbers_change_nothing() -> None:
    model = network()
    before = flat(model)
    optimizer = TrustRegionNewtonCG(model, radius=0.5)
    inputs, targets = batch()
    with pytest.warns(UserWarning, match="is not finite .after 0 iterations.: step skipped"):
        optimizer.step_on(loss_of(model), (inputs * math.nan, targets))
    assert torch.equal(flat(model), before) and optimizer.steps == 0 and optimizer.skipped_steps == 1
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        TrustRegionNewtonCG(model, nonfinite="raise").step_on(loss_of(model), (inputs * math.nan, targets))
    # a gradient without a second derivative at this point: sqrt(|x|^3) at zero
    y = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    flat_there = TrustRegionNewtonCG([y], radius=1.0)
    with pytest.warns(UserWarning, match="product 1 with the curvature is not finite"):
        flat_there.step(lambda: (y.abs() ** 1.5 + y).sum())
    assert y.tolist() == [0.0, 1.0] and flat_there.steps == 0
    # a trial point outside the domain of the loss is rejected
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    inside = TrustRegionNewtonCG([x], radius=100.0, preset="xu", curvature="hessian", retries=20)
    inside.step(lambda: (x - x.log() * 1e-3).sum())
    assert inside.last.accepted and 0 < float(x) < 1


def test_attention_and_batches_in_a_mapping() -> None:
    """Fused attention has no second derivative; the step uses the operations that have."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    head = nn.Linear(8, 3)
    model = nn.ModuleDict({"layer": layer, "head": head})
    data = {"x": torch.randn(12, 5, 8), "y": torch.randint(3, (12,)), "scale": torch.tensor(1.0)}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(head(layer(batch["x"])).mean(1) * batch["scale"], batch["y"])

    optimizer = TrustRegionNewtonCG(model, radius=0.5, max_cg_iterations=5, hessian_fraction=0.5, retries=5)
    losses = [float(optimizer.step_on(loss, data, micro_batches=3)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_frozen_and_added_parameters() -> None:
    model = network()
    optimizer = TrustRegionNewtonCG(model[0].parameters(), radius=0.3)
    optimizer.add_param_group({"params": list(model[2].parameters()), "weight_decay": 0.1})
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer.step_on(loss_of(model), batch())
    assert torch.equal(before[0].weight, model[0].weight) and not torch.equal(before[2].weight, model[2].weight)
    model[0].weight.requires_grad_(True)
    optimizer.step_on(loss_of(model), batch())
    assert not torch.equal(before[0].weight, model[0].weight)


def test_autocast_may_be_around_the_step() -> None:
    """It keeps copies of the weights, which have moved when the step is tried."""
    losses = []
    for outside in (True, False):
        model = network().float()
        inputs, labels = batch()

        def loss(data: tuple[Tensor, Tensor], model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return nn.functional.cross_entropy(model(data[0]).float(), data[1])

        optimizer = TrustRegionNewtonCG(model, radius=0.5)
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                losses.append(float(optimizer.step_on(loss, (inputs.float(), labels))))
    assert losses[:4] == losses[4:] and losses[3] < losses[0]
