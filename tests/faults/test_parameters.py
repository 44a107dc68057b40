"""Parameters and models of unusual kinds, and settings at their limits; numbers are the rows of docs/reliability.md."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from every_method import (
    Run,
    batch,
    every_method,
    make,
    small_net,
    values,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

SHAPES = [(), (0,), (5,), (0, 4), (4, 0), (1, 1), (1, 6), (6, 1), (3, 4), (3, 2, 2), (3, 2, 2, 2), (2, 3, 2, 2, 2)]


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Shaped(nn.Module):
    """A layer, and parameters that belong to none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.shaped = nn.ParameterList(torch.ones(shape) for shape in SHAPES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        total = torch.stack([(p.sin() * randoms(*p.shape)).sum() for p in self.shaped]).square().sum()
        return self.layer(x) + 0.1 * total


@every_method
def test_row_46_any_shape(method: str) -> None:
    """What cannot be preconditioned moves as with AdamW, or SGD under K-FAC; everything else moves, too."""
    plain = Shaped()
    options: dict[str, Any] = {"betas": (0.9, 0.999)} if method == "sonew" else {}
    run = Run(method, Shaped(), inputs=lambda step: randoms(6, 4, seed=step), **options)
    first_order: dict[str, Any] = {"lr": 0.02}
    kind = torch.optim.SGD if method == "kfac" else torch.optim.AdamW
    first_order |= {"momentum": 0.9} if method == "kfac" else {"weight_decay": 0.0}
    # K-FAC knows layers alone; a chain of SONew may have a single element, which is Adam
    alike = {"kfac": SHAPES, "sonew": [()], "trust_region": []}.get(method, SHAPES[:8])
    reference = kind(plain.shaped.parameters(), **first_order)
    start = [p.detach().clone() for p in run.net.shaped]
    for step in range(8):
        plain.load_state_dict(run.net.state_dict())  # the same gradients, whatever the others do
        run.step(step)
        if method == "trust_region":
            continue
        for parameter, mine in zip(plain.shaped, run.net.shaped, strict=True):
            parameter.grad = torch.zeros_like(parameter) if mine.grad is None else None
        reference.zero_grad()
        (plain(randoms(6, 4, seed=step)).sin() - 0.3).square().mean().backward()
        reference.step()
        for shape, mine, expected in zip(SHAPES, run.net.shaped, plain.shaped, strict=True):
            if shape in alike:
                torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12, msg=f"{shape} at step {step}")
    for shape, before, after in zip(SHAPES, start, run.net.shaped, strict=True):
        assert torch.isfinite(after).all() and (after.numel() == 0 or bool((after != before).all())), shape
    if method not in ("trust_region", "sonew", "kfac"):
        units = {unit.block.parameter for unit in run.optimizer.attach().units}
        assert {"layer.weight", *(f"shaped.{index}" for index in range(8, len(SHAPES)))} == units


@every_method
def test_row_46_a_very_tall_vocabulary(method: str) -> None:
    """50,000 x 8: one-sided; one step in float32 against the same by dense matrices in float64."""
    torch.manual_seed(0)
    table = nn.Embedding(50_000, 8)
    start = table.weight.detach().clone().double()
    tokens = torch.arange(0, 50_000, 7)
    count = len(tokens)
    outputs = randoms(count, 8) * torch.arange(1, 9)  # with eigenvalues that float32 tells apart
    gradient = torch.zeros(50_000, 8).double().index_add(0, tokens, outputs / count)
    options: dict[str, Any] = {"lr": 0.1, "start_preconditioning_step": 1}
    if method in ("shampoo", "soap"):
        options |= {"refresh_delay": 0, "betas": (0.0, 0.9)} | ({"grafting": None} if method == "shampoo" else {})
    if method == "kfac":
        options |= {"refresh_delay": 0, "kl_clip": None, "momentum": 0.0, "damping": 0.1}
    if method == "trust_region":
        options = {"radius": 1e4, "max_radius": 1e4, "cg_tolerance": 1e-6}
    optimizer = make(method, table, **options)
    if method == "trust_region":
        optimizer.step(lambda: 0.5 * (table(tokens) - outputs.float()).square().sum())
        expected = start.clone()
        expected[tokens] = outputs
    else:
        ((table(tokens) * outputs.float()).sum() / count).backward()
        optimizer.step()
        sizes, basis = torch.linalg.eigh(gradient.T @ gradient)
        if method == "shampoo":
            direction = gradient @ basis @ torch.diag((sizes + 1e-6 * sizes.max()).rsqrt()) @ basis.T
        elif method == "soap":
            rotated = gradient @ basis
            direction = (rotated / (rotated.abs() + 1e-8)) @ basis.T
        elif method == "sonew":  # one gradient is a chain of multiples: its first step is Adam's, up to one factor
            direction = torch.where(gradient == 0, 0.0, 1.0 / gradient.where(gradient != 0, 1.0))
            direction *= gradient.sign().norm() / direction.norm()
        else:  # (a G + damping I)^-1 g, a the share of the row's token
            fisher = outputs.T @ outputs / count / count + 0.1 * torch.eye(8, dtype=torch.float64)
            direction = torch.linalg.solve(fisher, gradient.T).T
        expected = start - 0.1 * direction
        # SOAP's second moment is as large as the table; nobody has a matrix of its rows
        assert optimizer.state_bytes() <= 2**21
    error = (table.weight.detach().double() - expected).abs().max() / (expected - start).abs().max()
    assert float(error) < 1e-3


@every_method
def test_row_47_frozen_parameters(method: str) -> None:
    """Frozen ones stand still, unfrozen ones move, where all are frozen a step does nothing, and none is an error."""
    with pytest.raises(ValueError, match="empty parameter list"):
        make(method, [])
    run = Run(method)
    head, stem = run.net[3], run.net[0]
    head.requires_grad_(False)
    before = values(head)
    run.steps(range(4))
    assert torch.equal(values(head), before) and not torch.equal(values(stem), values(Run(method).net[0]))
    head.requires_grad_(True)
    run.steps(range(4, 9))
    assert bool((values(head) != before).all())
    run.net.requires_grad_(False)
    optimizer, before = run.optimizer, run.values
    optimizer.zero_grad()  # gradients that are still there count, as they do for torch's optimizers
    if method == "trust_region":
        loss = optimizer.step(lambda: run.loss(batch(9)))
        assert float(loss) == float(run.loss(batch(9))) == float(optimizer.step_on(run.loss, batch(9), 1))
    else:
        assert optimizer.step(lambda: 0.5) == 0.5
    optimizer.step()
    assert torch.equal(run.values, before)
    run.net.requires_grad_(True)
    run.steps(range(9, 12))
    assert bool((run.values != before).all())
    frozen = Run(method, run.net.requires_grad_(False))  # from the beginning
    assert frozen.optimizer.step() is None and torch.isfinite(run.values).all()


@every_method
def test_row_48_a_group_that_is_added(method: str) -> None:
    """What is there already goes on as if nothing had happened, and the new parameters are preconditioned."""
    options: dict[str, Any] = {} if method in ("sonew", "trust_region") else {"stagger": False}
    options |= {"kl_clip": None} if method == "kfac" else {}
    net = small_net().double()
    torch.manual_seed(0)
    extra = nn.Linear(10, 10, dtype=torch.float64)
    whole = nn.Sequential(net, extra)

    def train(added: bool) -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        model = copy.deepcopy(whole)
        run = Run(method, model, params=[(f"0.{n}", p) for n, p in model[0].named_parameters()], **options)
        stay = values(model[1])
        if method != "trust_region":  # gradients of the first part do not depend on the second

            def loss(x: Tensor) -> Tensor:
                other = model[1](x[:, 0, 0, :1].expand(-1, 10))
                return (model[0](x).sin() - 0.3).square().mean() + other.square().mean()

            run.loss = loss  # type: ignore[method-assign]
        run.steps(range(5))
        assert torch.equal(values(model[1]), stay)
        if added:
            named = [(f"1.{n}", p) for n, p in model[1].named_parameters()]
            run.optimizer.add_param_group({"params": named, "weight_decay": 0.1})
        run.steps(range(5, 14))
        assert torch.equal(values(model[1]), stay) != added
        return values(model[0]), run.optimizer

    alone, _ = train(False)
    beside, optimizer = train(True)
    if method == "trust_region":  # one region for all
        assert optimizer.last is not None and not torch.equal(alone, beside)
        return
    assert torch.equal(alone, beside)
    assert optimizer.param_groups[1]["weight_decay"] == 0.1
    members = {member.name: member for member in optimizer._members}
    assert members["1.weight"].is_ready if method != "sonew" else members["1.weight"].run is not None
    plan = optimizer.attach()
    assert {p.name: p.is_preconditioned for p in plan.parameters}["1.weight"]


class Tied(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inner(self.table(tokens)).tanh())


class ByHand(nn.Module):
    """The same without a module for the table."""

    def __init__(self, tied: Tied) -> None:
        super().__init__()
        self.table, self.inner = nn.Parameter(tied.table.weight.detach().clone()), copy.deepcopy(tied.inner)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(self.table[tokens]).tanh() @ self.table.T


def tokens_of(step: int) -> Tensor:
    return torch.randint(7, (16,), generator=torch.Generator().manual_seed(step))


@every_method
def test_row_49_tied_and_repeated_parameters(method: str) -> None:
    """A parameter that has two names is one, also when it is saved; one that is given twice is refused by name."""
    options: dict[str, Any] = {} if method in ("sonew", "kfac", "trust_region") else {"one_sided_above": 6}
    run = Run(method, Tied(), inputs=tokens_of, **options).steps(range(9))
    if method != "kfac":  # which knows no layer of that kind
        other = Run(method, ByHand(Tied()), inputs=tokens_of, **options).steps(range(9))
        assert float((run.values - other.values).abs().max()) <= 1e-9
    saved = copy.deepcopy((run.net.state_dict(), run.optimizer.state_dict()))
    resumed = Run(method, Tied(), inputs=tokens_of, **options)
    resumed.net.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    assert torch.equal(resumed.steps(range(9, 14)).values, run.steps(range(9, 14)).values)
    named = [*Tied().named_parameters()]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        make(method, [{"params": [p for _, p in named]}, {"params": [named[0][1]]}])
    again = [*named, ("head.weight", named[0][1])]
    with (
        pytest.warns(UserWarning, match="duplicate"),
        pytest.raises(ValueError, match=r"'table.weight' is given twice \(again as 'head.weight'\)"),
    ):
        make(method, again)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match=r"'group1.0' is given twice"):
        optimizer = make(method, [p for _, p in named[:1]])
        try:
            optimizer.add_param_group({"params": [named[1][1]] * 2})
        finally:
            assert len(optimizer.param_groups) == 1


def test_plain_sums_of_statistics_move_with_a_graft_that_goes_with_them() -> None:
    for options in ({"grafting": "adagrad"}, {"grafting": "sgd"}, {"grafting_beta2": 0.999}, {"grafting": None}):
        net = small_net().double()
        optimizer = make("shampoo", net, betas=(0.9, 1.0), **options)
        before = [parameter.detach().clone() for parameter in net.parameters()]
        for step in range(4):
            optimizer.zero_grad()
            net(batch(step)).square().mean().backward()
            optimizer.step()
        assert optimizer.skipped_steps == 0
        assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("method", ["shampoo", "soap", "sonew"])
@pytest.mark.parametrize("width", [3, 5])
def test_two_parameters_of_one_name_are_refused(method: str, width: int) -> None:
    """Twin networks, each of which names its own."""
    first, second = nn.Linear(4, 3), nn.Linear(4, width)
    both = [*first.named_parameters(), *second.named_parameters()]
    with pytest.raises(ValueError, match=r"two parameters are named 'weight'.*give names of your own"):
        make(method, both).attach()
    named = [
        (f"{number}.{name}", p) for number, net in enumerate((first, second)) for name, p in net.named_parameters()
    ]
    make(method, named).attach()


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = small_net(), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@every_method
def test_row_50_an_unused_module(method: str) -> None:
    """It stands still without a warning, weight decay included, and the rest goes on as without it."""
    net = Unused()
    used, unused = copy.deepcopy(net.used), copy.deepcopy(net.unused)
    options = {"weight_decay": 0.1, **({} if method in ("sonew", "trust_region") else {"stagger": False})}
    if method == "trust_region":  # weight decay is a part of the loss, of all parameters
        options["weight_decay"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(method, net, **options).steps(range(10))
    assert torch.equal(values(net.unused), values(unused))
    expected = Run(method, used, **options).steps(range(10)).values
    torch.testing.assert_close(values(net.used), expected, rtol=1e-9, atol=1e-10)
    assert not torch.equal(values(net.used), values(Unused().used)) and run.optimizer.skipped_steps == 0


class Adapted(nn.Module):
    """LoRA: a frozen layer and two small ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Modern(nn.Module):
    """Attention, weight norm, LoRA, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed, self.adapted, self.twice = weight_norm(nn.Linear(8, 8)), Adapted(), nn.Linear(8, 8)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x, need_weights=False)[0] + x
        x = self.adapted(self.normed(x).tanh())
        return self.twice(self.twice(x).tanh())


def modern_by_hand(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same function by products of matrices."""
    q, k, v = (x @ p["attention.in_proj_weight"].T + p["attention.in_proj_bias"]).chunk(3, -1)
    by_head = zip(*(whole.chunk(2, -1) for whole in (q, k, v)), strict=True)
    heads = [(q @ k.transpose(-1, -2) / 2).softmax(-1) @ v for q, k, v in by_head]
    x = torch.cat(heads, -1) @ p["attention.out_proj.weight"].T + p["attention.out_proj.bias"] + x
    scale, along = (p[f"normed.parametrizations.weight.original{i}"] for i in (0, 1))
    x = (x @ (scale * along / along.norm(dim=1, keepdim=True)).T + p["normed.bias"]).tanh()
    low = x @ p["adapted.down.weight"].T @ p["adapted.up.weight"].T
    x = x @ p["adapted.base.weight"].T + p["adapted.base.bias"] + low
    for last in (False, True):
        x = x @ p["twice.weight"].T + p["twice.bias"]
        x = x if last else x.tanh()
    return x


@every_method
def test_row_51_attention_weight_norm_lora_and_a_layer_called_twice(method: str) -> None:
    """As with the same function written down by hand, whose parameters belong to no module."""
    inputs: Callable[[int], Tensor] = lambda step: randoms(6, 3, 8, seed=step)  # noqa: E731
    # after more products conjugate gradients amplify rounding
    options: dict[str, Any] = {"max_cg_iterations": 3} if method == "trust_region" else {}
    run = Run(method, Modern(), inputs=inputs, **options)
    start = {name: p.detach().clone() for name, p in run.net.named_parameters()}
    losses = [float(run.loss(inputs(99)).detach())]
    run.steps(range(9))
    losses.append(float(run.loss(inputs(99)).detach()))
    assert losses[1] < losses[0]
    for name, parameter in run.net.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
    if method == "kfac":  # it looks at modules: its factors of these are compared in tests/unit/test_capture.py
        covered = {p.name for p in run.optimizer.attach().parameters if p.is_preconditioned}
        assert {"attention.in_proj_weight", "adapted.up.weight", "adapted.down.weight", "twice.weight"} <= covered
        assert not any("normed.parametrizations" in name for name in covered)
        return
    own = {name: nn.Parameter(value.clone(), requires_grad="base" not in name) for name, value in start.items()}
    optimizer = make(method, list(own.items()), **options)
    for step in range(9):

        def loss(step: int = step) -> Tensor:
            return (modern_by_hand(own, inputs(step)).sin() - 0.3).square().mean()

        if method == "trust_region":
            optimizer.step(loss)
        else:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    for name, parameter in run.net.named_parameters():
        assert float((parameter - own[name]).detach().abs().max()) <= 1e-8, name


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.reentrant = small_net().double(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None or not torch.is_grad_enabled():
            return self.net(x)
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)


@every_method
def test_row_52_activation_checkpointing_and_passes_that_do_not_train(method: str) -> None:
    """They leave nothing behind: as in a run without them."""
    expected = Run(method, Checkpointed(None)).steps(range(10)).values
    for reentrant in (False, True):
        if reentrant and method == "trust_region":  # torch has no second derivative of reentrant checkpoints
            continue
        run = Run(method, Checkpointed(reentrant))
        for step in range(10):
            run.net.eval()
            with torch.no_grad():
                run.net(batch(90) * 5)
            run.net(batch(91))  # with a graph that nobody differentiates
            run.net.train()
            run.step(step)
        assert float((run.values - expected).abs().max()) <= 1e-10, reentrant


@every_method
def test_row_53_compiled_model_and_compiled_step(method: str) -> None:
    """The step runs as it is, and a state goes from a compiled model to one that is not."""
    expected = Run(method).steps(range(10))
    torch._dynamo.reset()
    run = Run(method)
    step = torch.compile(run.optimizer.step, backend="eager")
    for number in range(6):
        x = batch(number)
        if method == "trust_region":
            step([lambda x=x: run.loss(x)])
        else:
            run.optimizer.zero_grad()
            run.loss(x).backward()
            step()
    assert torch.equal(run.values, Run(method).steps(range(6)).values)
    if method == "trust_region":  # compiled models have no second derivative: torch says so by itself
        return
    torch.manual_seed(0)
    inner = small_net().double()
    model = torch.compile(inner, backend="eager")
    compiled = Run(method, model).steps(range(6))  # type: ignore[arg-type]
    torch.testing.assert_close(values(inner), run.values, rtol=1e-9, atol=1e-11)
    resumed = Run(method)
    resumed.net.load_state_dict(inner.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(compiled.optimizer.state_dict()))
    assert not any("_orig_mod" in name for name in compiled.optimizer.parameter_names())
    torch.testing.assert_close(resumed.steps(range(6, 10)).values, expected.values, rtol=1e-9, atol=1e-11)


@every_method
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_row_54_copies(method: str, how: str) -> None:
    """With refreshes in flight: the copy goes on as the original, which does not notice."""
    run = Run(method).steps(range(7))
    if method in ("shampoo", "soap", "kfac"):
        assert run.optimizer._refresher.in_flight
    pair = (run.net, run.optimizer)
    net, optimizer = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    other = Run(method, net)
    other.optimizer = optimizer
    if method == "kfac":
        optimizer.remember(net)
    expected = Run(method).steps(range(14)).values
    assert torch.equal(other.steps(range(7, 14)).values, expected)
    assert torch.equal(run.steps(range(7, 14)).values, expected)


@every_method
def test_row_55_closure(method: str) -> None:
    """It is called once, with gradients, its value is returned, and a step that is skipped has called it, too."""
    expected = Run(method).steps(range(8)).values
    run = Run(method)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        assert torch.is_grad_enabled() or method == "trust_region"
        if method == "trust_region":
            return run.loss(x)
        run.optimizer.zero_grad()
        loss = run.loss(x) * factor
        loss.backward()
        return loss

    for number in range(8):
        x, factor = batch(number), 1.0
        with torch.no_grad():
            before = float(run.loss(x))
            assert float(run.optimizer.step(closure).detach()) == pytest.approx(before, rel=1e-12)
    assert torch.equal(run.values, expected) and (calls == 8 or method == "trust_region")
    factor, x = math.nan, x * math.nan
    with pytest.warns(UserWarning, match="step skipped"):
        assert math.isnan(float(run.optimizer.step(closure).detach()))
    assert torch.equal(run.values, expected)


@every_method
def test_row_56_zero_settings_are_honoured(method: str) -> None:
    """Learning rate, betas, eps, weight decay, ridge: zero is a value, not a missing one."""
    if method == "trust_region":
        zeros = {"weight_decay": 0.0, "retries": 0, "stored_radii": 0, "seed": 0}
        assert torch.equal(Run(method, **zeros).steps(range(5)).values, Run(method).steps(range(5)).values)
        exact = Run(method, cg_tolerance=0.0, max_cg_iterations=3).steps(range(3))
        assert exact.optimizer.last.cg_iterations == 3 or exact.optimizer.last.on_boundary
        return
    still = Run(method, lr=0.0, weight_decay=0.1)
    before = still.values
    still.steps(range(5))
    assert torch.equal(still.values, before) and still.optimizer.steps == 5
    blocks = [block for member in still.optimizer._members for block in member.blocks]
    assert all(block.observations == 5 for block in blocks)
    for group in still.optimizer.param_groups:
        group["lr"] = torch.tensor(0.01)
    still.steps(range(5, 8))
    assert torch.isfinite(still.values).all() and bool((still.values != before).all())
    # until the first roots are in the graft alone moves: torch's own
    kind = torch.optim.SGD if method == "kfac" else torch.optim.AdamW
    zeros = {"momentum": 0.0} if method == "kfac" else {"betas": (0.0, 0.0), "eps": 0.0}
    run = Run(method, weight_decay=0.0, start_preconditioning_step=100, **zeros)
    torch.manual_seed(0)
    net = small_net().double()
    reference = kind(net.parameters(), lr=0.02, weight_decay=0.0, **zeros)
    for step in range(6):
        reference.zero_grad()
        (net(batch(step)).sin() - 0.3).square().mean().backward()
        reference.step()
    torch.testing.assert_close(run.steps(range(6)).values, values(net), rtol=1e-9, atol=1e-10)
    if method == "shampoo":  # a matrix of full rank needs no ridge: L^(-1/4) G R^(-1/4) is U V^T
        parameter, gradient = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64)), randoms(5, 5)
        optimizer = make(
            method, [parameter], lr=1.0, betas=(0.0, 0.0), preconditioner_eps=0.0, grafting=None,
            precondition_frequency=1, start_preconditioning_step=1, refresh_delay=0, exponent_override="2k",
        )  # fmt: skip
        parameter.grad = gradient.clone()
        optimizer.step()
        left, _, right = np.linalg.svd(gradient.numpy())
        np.testing.assert_allclose(-parameter.detach().numpy(), left @ right, atol=1e-9)


NAN, INF = math.nan, math.inf
REFUSED: dict[str, list[tuple[str, Any, str]]] = {
    "every": [("weight_decay", NAN, "nan"), ("weight_decay", INF, "inf"), ("weight_decay", -0.1, "-0.1")],
    "gradient": [
        ("lr", -1.0, "-1.0"), ("lr", NAN, "nan"), ("lr", INF, "inf"), ("lr", torch.tensor(-2.0), "-2.0"),
        ("betas", (1.0, 0.9), "1.0"), ("betas", (NAN, 0.9), "nan"), ("betas", (0.9, 1.1), "1.1"),
        ("betas", (0.9, NAN), "nan"), ("eps", -1e-8, "-1e-08"), ("eps", NAN, "nan"),
        ("start_preconditioning_step", 0, "0"), ("nonfinite", "skipp", "did you mean 'skip'"),
    ],
    "shampoo": [
        ("momentum", NAN, "nan"), ("dampening", NAN, "nan"), ("preconditioner_eps", NAN, "nan"),
        ("preconditioner_eps", -1.0, "-1.0"), ("exponent_override", NAN, "nan"), ("grafting_beta2", NAN, "nan"),
        ("exponent_override", "k", "did you mean '2k'"),
        ("precondition_frequency", 0, "0"), ("refresh_delay", -1, "-1"), ("max_preconditioner_dim", 0, "0"),
        ("grafting", "adan", "did you mean 'adam'"), ("betas", (0.9, 1.0), "grafting_beta2 below 1"),
        ("grafting_beta2", 1.0, "'adagrad', which is a plain sum"),
    ],
    "soap": [
        ("precondition_frequency", 0, "0"), ("basis", "eig", "did you mean 'eigh'"),
        ("betas", (0.9, 1.0), "must be below 1"),
    ],
    "sonew": [
        ("gamma", NAN, "nan"), ("gamma", 1.0, "1.0"), ("bandwidth", -1, "-1"), ("preconditioner_eps", NAN, "nan"),
    ],
    "kfac": [
        ("damping", NAN, "nan"), ("damping", 0.0, "0.0"), ("kl_clip", NAN, "nan"), ("kl_clip", 0.0, "0.0"),
        ("factor_decay", NAN, "nan"), ("kl_clip_decay", NAN, "nan"), ("momentum", NAN, "nan"),
        ("dampening", NAN, "nan"),
    ],
    "trust_region": [
        ("radius", 0.0, "0.0"), ("radius", NAN, "nan"), ("max_radius", NAN, "nan"), ("cg_tolerance", NAN, "nan"),
        ("hessian_fraction", 0.0, "0.0"), ("hessian_fraction", NAN, "nan"), ("max_cg_iterations", 0, "0"),
        ("retries", -1, "-1"), ("stored_radii", -1, "-1"),
    ],
}  # fmt: skip


@every_method
def test_row_56_invalid_settings_are_refused_with_their_value(method: str) -> None:
    rows = REFUSED["every"] + REFUSED[method] + (REFUSED["gradient"] if method != "trust_region" else [])
    for option, value, words in rows:
        with pytest.raises(ValueError) as error:
            make(method, small_net(), **{option: value})
        assert option in str(error.value) and words in str(error.value), (option, value, str(error.value))
    if method != "trust_region":
        optimizer = make(method, small_net())
        with pytest.raises(ValueError, match=r"lr=nan \(parameter group 1\)"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))], "lr": NAN})
