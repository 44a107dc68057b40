"""Factors that are less than full matrices, and cheaper ways to them, against the dense factors they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_soo.capture import grids
from lightning_soo.capture.factors import Statistics, gradient_sum, gram, input_sums
from lightning_soo.capture.grids import Grid
from lightning_soo.capture.recorder import Recorder
from lightning_soo.capture.registry import LayerPart, find_rule, limit_part


def part_of(inputs: int, outputs: int = 5, **options: Any) -> LayerPart:
    return LayerPart(weight="weight", bias="bias", rows=(0, outputs), inputs=inputs, **options)


@pytest.mark.parametrize(
    ("part", "max_order", "shape", "inputs", "gradients"),
    [
        (part_of(12), 12, None, ((13, 13),), (5, 5)),
        (part_of(12), 12, (3, 4), ((13, 13),), (5, 5)),  # not needed
        (part_of(12), 6, None, ((4, 4), (3, 3)), (5, 5)),
        (part_of(12), 6, (2, 6), ((2, 2), (6, 6)), (5, 5)),
        (part_of(18, taps=9), 9, None, ((2, 2), (9, 9)), (5, 5)),
        (part_of(90, taps=9), 9, None, ((90,),), (5, 5)),  # 10 x 9: ten is too many
        (part_of(90, taps=9), 10, None, ((10, 10), (9, 9)), (5, 5)),
        (part_of(13), 4, None, ((13,),), (5,)),
        (part_of(7, transposed=True, structure="diagonal"), 4, None, ((7,),), (5,)),
        (part_of(1, structure="unit"), 2, None, (), (5, 2, 2)),
    ],
)
def test_no_order_is_above_the_limit(
    part: LayerPart, max_order: int, shape: Any, inputs: tuple[tuple[int, ...], ...], gradients: tuple[int, ...]
) -> None:
    limited = limit_part(part, max_order, shape)
    assert limited.input_factors == inputs and limited.gradient_factor == gradients
    assert limited.joint_bias == (inputs == ((13, 13),))


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="12 inputs"):
        limit_part(part_of(12), 4, (5, 2))
    net = nn.Sequential(nn.Linear(12, 2))
    with pytest.raises(ValueError, match=r"'00'.*'0'"):
        Recorder(net, input_shapes={"00": (3, 4)}, max_order=4)
    with pytest.raises(ValueError, match="max_order"):
        Recorder(net, input_shapes={"0": (3, 4)})
    with pytest.raises(ValueError, match="did you mean 'expand'"):
        Recorder(net, approximation="expande")
    with pytest.raises(ValueError, match="expand"):
        Recorder(net, approximation="reduce", positions=4)


def test_two_factors_are_exact_where_there_are_two() -> None:
    """Every row a product ``x (x) y``, all pairs of them: the dense factor is a Kronecker product."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    rows = torch.einsum("ic,js->ijcs", x, y).reshape(42, 1, 12)
    (channels, space), count = input_sums(rows, part_of(12, input_shape=(3, 4)), Statistics())
    dense = rows[:, 0].T @ rows[:, 0]
    torch.testing.assert_close(torch.kron(channels, space) / channels.trace(), dense)
    means = channels / count, space / count
    torch.testing.assert_close(torch.kron(*means) / means[1].trace(), dense / count)


def test_two_factors_are_partial_traces_and_add_up() -> None:
    torch.manual_seed(0)
    rows = torch.randn(9, 2, 12, dtype=torch.float64)
    part = part_of(12, input_shape=(3, 4))
    (channels, space), count = input_sums(rows, part, Statistics())
    dense = torch.einsum("ntcs,ntdu->csdu", *[rows.view(9, 2, 3, 4)] * 2)
    torch.testing.assert_close(channels, torch.einsum("csds->cd", dense))
    torch.testing.assert_close(space, torch.einsum("cscu->su", dense))
    pieces = [input_sums(piece, part, Statistics()) for piece in rows.split(4)]
    torch.testing.assert_close(sum(piece[0][0] for piece in pieces), channels)
    torch.testing.assert_close(sum(piece[0][1] for piece in pieces), space)
    assert count == sum(piece[1] for piece in pieces) == 18


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.convolution, self.norm = nn.Embedding(9, 6), nn.Conv1d(4, 7, 3, padding=1), nn.LayerNorm(7)
        self.linear, self.head = nn.Linear(42, 11), nn.Linear(11, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.convolution(self.tokens(tokens)).transpose(1, 2))
        return self.head(self.linear(x.flatten(1)).tanh())


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_model_with_limited_orders_against_its_dense_factors(approximation: str) -> None:
    net = Net().double()
    tokens = torch.arange(20).view(5, 4) % 9
    dense = Recorder(net, approximation=approximation)
    limited = Recorder(net, approximation=approximation, max_order=6, input_shapes={"linear": (6, 7)})
    net(tokens).square().mean().backward()
    found, full = limited.factors(), dense.factors()
    parts = {layer.name: layer.part for layer in limited.layers}
    for name, (inputs, gradients) in found.items():
        part = parts[name]
        assert tuple(tuple(factor.shape) for factor in inputs) == part.input_factors
        assert tuple(gradients.shape) == part.gradient_factor
        wanted = full[name][1]
        if part.diagonal_outputs:
            wanted = wanted.diagonal()
        torch.testing.assert_close(gradients, wanted)
        if len(inputs) == 2:
            assert part.input_shape is not None
            matrix = full[name][0][0][: part.inputs, : part.inputs].view(*part.input_shape, *part.input_shape)
            torch.testing.assert_close(inputs[0], torch.einsum("csds->cd", matrix))
            torch.testing.assert_close(inputs[1], torch.einsum("cscu->su", matrix))
    assert parts["convolution"].input_shape == (4, 3) and parts["linear"].input_shape == (6, 7)
    assert parts["head"].diagonal_inputs and parts["convolution"].diagonal_outputs
    torch.testing.assert_close(found["head"][0][0], full["head"][0][0].diagonal()[:11])


@pytest.mark.parametrize("order", [3, 256, 301])
def test_panels_make_the_whole_product(order: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, order, dtype=torch.float64)
    torch.testing.assert_close(gram(rows, torch.float64), rows.T @ rows)
    torch.testing.assert_close(gram(rows.T.contiguous().T, torch.float64), rows.T @ rows)


def test_narrow_rows_are_added_up_in_the_precision_of_the_sums() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50_000, 8) + 1
    narrow = rows.bfloat16().double()
    found = gram(rows, torch.float32, torch.bfloat16)
    assert found.dtype == torch.float32
    error = (found.double() - narrow.T @ narrow).abs().max() / (narrow.T @ narrow).abs().max()
    assert error < 2**-8  # of one rounding of each piece; added up in bfloat16 it stops at 256 of them
    recorded = []
    for dtype in (None, torch.bfloat16):
        net = Net()
        recorder = Recorder(net, gram_dtype=dtype)
        net(torch.arange(20).view(5, 4) % 9).square().mean().backward()
        recorded.append(recorder.factors())
    for name, (inputs, gradients) in recorded[0].items():
        for one, other in zip((*inputs, gradients), (*recorded[1][name][0], recorded[1][name][1]), strict=True):
            assert other.dtype == torch.float32
            assert float((one - other).norm() / one.norm()) < 0.02, name


CONVOLUTIONS = [
    (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2), (4, 9, 8)),
    (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular", bias=False), (2, 11)),
    (nn.Conv3d(2, 3, 2), (2, 4, 5, 3)),
]


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS)
@pytest.mark.parametrize("limit", [0, 6])
def test_positions_on_a_grid_are_rows_of_all_positions(
    module: nn.Module, shape: tuple[int, ...], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every offset once: the sums of the inputs are those of all positions, the mean of the gradients' is."""
    torch.manual_seed(0)
    module = module.double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    gradient = torch.randn_like(module(x))
    rule = find_rule(module)
    assert rule is not None
    everything = Statistics(positions=None)
    for part in rule.parts(module):
        part = limit_part(part, limit) if limit else part
        wanted, count = rule.input_sums(module, part, x, 5, everything)
        wanted_gradients = rule.gradient_sum(module, part, None, gradient, 5, everything)
        how = Statistics(positions=7)
        steps = Grid.of(gradient.shape[2:], how).steps
        offsets = [
            [index // math.prod(steps[:axis]) % step for axis, step in enumerate(steps)]
            for index in range(math.prod(steps))
        ]
        assert len(offsets) > 1
        found, rows, gradients = [], 0, []
        for offset in offsets:
            with monkeypatch.context() as patch:
                patch.setattr(grids, "_offsets", lambda steps, phase, offset=offset: offset)
                sums, kept = rule.input_sums(module, part, x, 5, how)
                assert 0 < kept <= 5 * 7
                found.append(sums)
                rows += kept
                gradients.append(rule.gradient_sum(module, part, None, gradient, 5, how))
        assert rows == count
        for index, sums in enumerate(wanted):
            torch.testing.assert_close(torch.stack([f[index] for f in found]).sum(0), sums)
        torch.testing.assert_close(torch.stack(gradients).mean(0), wanted_gradients)


def test_the_grid_depends_on_size_and_phase_alone_and_visits_all() -> None:
    def offsets(phases: range) -> set[tuple[int, ...]]:
        return {Grid.of((32, 32), Statistics(positions=64, phase=phase)).offsets for phase in phases}

    assert Grid.of((32, 32), Statistics(positions=64)).steps == (4, 4)
    assert len(offsets(range(200))) == 16
    assert len(offsets(range(0, 2000, 10))) == 16  # statistics at every tenth step meet them all as well
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(108, 2)).double()
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    found = []
    for splits in (1, 3):
        recorder = Recorder(net, positions=9)
        recorder.phase = 5
        for piece in x.chunk(splits):
            (net(piece).square().mean() / splits).backward()
        found.append(recorder.factors(divisor=splits))
        recorder.close()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


@pytest.mark.parametrize("changed", [{"padding": (4, 4), "dilation": (4, 4)}, {"padding": (2, 0), "dilation": (2, 1)}])
def test_a_convolution_that_was_changed_after_it_was_made(changed: dict[str, tuple[int, int]]) -> None:
    torch.manual_seed(0)
    layer, fresh = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, **changed)
    for name, value in changed.items():
        setattr(layer, name, value)
    fresh.load_state_dict(layer.state_dict())
    found = []
    for one in (layer, fresh):
        recorder = Recorder(one)
        one(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        found.append(recorder.factors()[""])
    torch.testing.assert_close(*found)


def test_sums_of_half_precision_gradients_are_formed_in_float32() -> None:
    torch.manual_seed(0)
    layer, how = nn.LayerNorm(3), Statistics(approximation="reduce")
    rule = find_rule(layer)
    assert rule is not None
    (part,) = rule.parts(layer)
    values, gradient = torch.randn(2, 4096, 3), torch.full((2, 4096, 3), 64.0)
    wide = rule.gradient_sum(layer, part, values, gradient, 2, how)
    narrow = rule.gradient_sum(layer, part, values.half(), gradient.half(), 2, how)
    assert wide[0, 1, 1] == 2 * (64.0 * 4096) ** 2
    torch.testing.assert_close(narrow, wide, rtol=1e-2, atol=1e-2 * float(wide.max()))
    assert gradient_sum(gradient.half(), part_of(3, 3), how)[0, 0] == 2 * (64.0 * 4096) ** 2


def test_examples_without_rows_add_nothing() -> None:
    how = Statistics(approximation="reduce")
    (factor,), count = input_sums(torch.empty(4, 0, 3), part_of(3), how)
    assert count == 0 and torch.equal(factor, torch.zeros(4, 4))
    assert torch.equal(gradient_sum(torch.empty(4, 0, 5), part_of(3), how), torch.zeros(5, 5))
