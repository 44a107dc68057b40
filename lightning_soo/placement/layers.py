"""How a model's layers are cut into blocks for K-FAC: one block for each pair of factors, its bias with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_soo.placement.blocks import Block
from lightning_soo.placement.overrides import ParameterSpec


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What placement needs to know of one part of a layer.

    Attributes:
        name: of the layer, and of its part where it has several.
        weight, bias: canonical parameter names.
        rows, bias_rows: of the weight as ``(outputs, inputs)``, and of the bias.
        transposed: whether the weight is stored as ``(inputs, outputs)``.
        gradient_factor: shape of the factor of the output's gradients: ``(outputs, outputs)``, a diagonal, or
            ``(outputs, k, k)`` of scales and shifts.
        input_factors: shapes of the factors of the inputs: one, two where inputs are channels times space, none for
            scales and shifts.
        joint_bias: whether the bias is the last column of the input factor.
        damping_method: ``"exact"`` or ``"pi"``, see :mod:`lightning_soo.linalg.damped_inverses`.
    """

    name: str
    weight: str
    bias: str | None
    rows: tuple[int, int]
    bias_rows: tuple[int, int]
    transposed: bool
    gradient_factor: tuple[int, ...]
    input_factors: tuple[tuple[int, ...], ...]
    joint_bias: bool
    damping_method: str = "exact"

    @property
    def outputs(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def is_unit(self) -> bool:
        """Whether this is a scale and perhaps a shift: no input factor, a small matrix for each channel."""
        return len(self.gradient_factor) == 3


@dataclass(frozen=True, kw_only=True)
class Layers:
    """A model as K-FAC sees it.

    Attributes:
        specs: every part of a layer that has factors.
        reasons: module name -> why it has none.
    """

    specs: Sequence[LayerSpec]
    reasons: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class LayerBlock(Block):
    """A block with a layer's factors.

    Attributes:
        layer: name of the layer's part, whose captures it has.
        bias: what is preconditioned together with it, or None.
        factors: shapes: of the output's gradients, then of the inputs. A vector is a diagonal; ``(outputs, k, k)`` is
            a small matrix for each channel.
        transposed: whether its rows are inputs.
        columns: how many of the captured input factor's (or of a scale and shift) it takes: the last one is the
            bias's where that is joint; 0 for a bias by itself, whose input is the constant one.
    """

    layer: str
    bias: Block | None
    factors: tuple[tuple[int, ...], ...]
    transposed: bool
    columns: int
    damping_method: str

    @property
    def orders(self) -> tuple[int, ...]:
        """Of the factors that are matrices."""
        return tuple(factor[0] for factor in self.factors if len(factor) == 2)

    @property
    def products_per_element(self) -> float:
        return float(sum(self.orders))

    @property
    def is_unit(self) -> bool:
        """Whether it has a small matrix for each channel."""
        return len(self.factors[0]) == 3


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """Blocks of the parameters that layers cover.

    Attributes:
        blocks: parameter name -> its blocks.
        joined: parameter name -> keys of other parameters' blocks that it is preconditioned with.
        reasons: parameter name -> why it is not covered.
        notes: parameter name -> what else a user should know.
    """

    blocks: Mapping[str, list[LayerBlock]]
    joined: Mapping[str, list[str]]
    reasons: Mapping[str, str]
    notes: Mapping[str, str]


def cut_layers(
    specs: Sequence[ParameterSpec],
    layers: Layers,
    together: Mapping[str, tuple[int, int]],
    excluded: Mapping[str, str],
) -> LayerCut:
    """Give every covered parameter its blocks.

    A bias is preconditioned with its weight where both belong to one parameter group and are moved in one part of the
    step; else it is a block of its own, with the constant one as its input. So it is on every engine, except where
    ZeRO-3 cuts a group between the two.

    Args:
        together: parameter name -> its group and part.
        excluded: parameter name -> why it may have no block (frozen, an override).
    """
    known = {spec.name: spec for spec in specs}
    blocks: dict[str, list[LayerBlock]] = {}
    joined: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    notes: dict[str, str] = {}
    for layer in layers.specs:
        has_weight = layer.weight in known and layer.weight not in excluded
        bias = layer.bias if layer.bias in known and layer.bias not in excluded else None
        if has_weight:
            joins = bias is not None and (layer.joint_bias or layer.is_unit)
            if joins and bias is not None and together[layer.weight] != together[bias]:
                joins = False
                same_group = together[layer.weight][0] == together[bias][0]
                notes[bias] = f"apart from its weight: another {'sub-group' if same_group else 'parameter group'}"
            bias_shape = known[bias].shape if joins and bias is not None else None
            block = _weight_block(layer, known[layer.weight].shape, bias_shape)
            blocks.setdefault(layer.weight, []).append(block)
            if joins:
                assert bias is not None
                joined.setdefault(bias, []).append(block.key)
                continue
        if bias is not None:
            blocks.setdefault(bias, []).append(_bias_block(layer, bias, known[bias].shape))
    for spec in specs:
        if spec.name not in blocks and spec.name not in joined and spec.name not in excluded:
            reasons[spec.name] = layers.reasons.get(spec.name.rpartition(".")[0]) or "not of a layer with factors"
    return LayerCut(blocks=blocks, joined=joined, reasons={**reasons, **excluded}, notes=notes)


def _weight_block(layer: LayerSpec, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None) -> LayerBlock:
    bias, with_bias = None, bias_shape is not None
    if bias_shape is not None:
        assert layer.bias is not None
        size = math.prod(bias_shape)
        bias = Block(parameter=layer.bias, merged_shape=(size,), ranges=(layer.bias_rows,), dims=())
    if layer.is_unit:
        count = 1 + with_bias
        return LayerBlock(
            parameter=layer.weight,
            merged_shape=(math.prod(shape),),
            ranges=(layer.rows,),
            dims=(),
            layer=layer.name,
            bias=bias,
            factors=((layer.outputs, count, count),),
            transposed=False,
            columns=count,
            damping_method=layer.damping_method,
        )
    rows, columns = (shape[0], math.prod(shape[1:]))
    ranges = ((0, rows), layer.rows) if layer.transposed else (layer.rows, (0, columns))
    factors = layer.input_factors
    inputs = rows if layer.transposed else columns
    if layer.joint_bias and not with_bias:
        factors = ((inputs, inputs),)
    full = len(layer.gradient_factor) == 2, all(len(factor) == 2 for factor in factors)
    dims = tuple(dim for dim, is_full in enumerate(full[::-1] if layer.transposed else full) if is_full)
    return LayerBlock(
        parameter=layer.weight,
        merged_shape=(rows, columns),
        ranges=ranges,
        dims=dims,
        layer=layer.name,
        bias=bias,
        factors=(layer.gradient_factor, *factors),
        transposed=layer.transposed,
        columns=inputs + with_bias,
        damping_method=layer.damping_method,
    )


def _bias_block(layer: LayerSpec, bias: str, shape: tuple[int, ...]) -> LayerBlock:
    """A bias by itself: the factor of the gradients alone."""
    factor = (layer.outputs, 1, 1) if layer.is_unit else layer.gradient_factor
    return LayerBlock(
        parameter=bias,
        merged_shape=(math.prod(shape),),
        ranges=(layer.bias_rows,),
        dims=(0,) if len(factor) == 2 else (),
        layer=layer.name,
        bias=None,
        factors=(factor,),
        transposed=False,
        columns=0,
        damping_method=layer.damping_method,
    )
