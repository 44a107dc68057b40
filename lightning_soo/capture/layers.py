"""Which parts of a model have Kronecker factors, under the names that its parameters have."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from lightning_soo.capture.parameters import ParameterNames
from lightning_soo.capture.registry import LayerPart, LayerRule, find_rule
from lightning_soo.placement.fragments import module_name


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A captured part of a module.

    Attributes:
        name: the module's canonical name, and the part's key.
        weight, bias: canonical names of the parameters, as ``named_parameters()`` of the unwrapped model has them; the
            first name of one that is tied. A bias that does not train is None, here and in ``part``.
        weight_trains, bias_trains: at least one does.
        modules: whose uses are summed: several where they share the weight.
    """

    name: str
    part: LayerPart
    rule: LayerRule
    modules: tuple[nn.Module, ...]
    weight: str
    bias: str | None
    weight_trains: bool
    bias_trains: bool


def find_layers(model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
    """Every part of a model that has factors, and why other modules with parameters of their own have none.

    The same before and after DDP, FSDP1, FSDP2, DeepSpeed, activation checkpointing or ``torch.compile`` wrap it.
    Modules that share their weight are one layer where they are of one family, else the first found has it.
    """
    owners: dict[tuple[str, str], Layer] = {}
    reasons: dict[str, str] = {}
    inside: set[nn.Module] = set()
    names = ParameterNames(model)
    for path, module in model.named_modules():
        if module in inside:
            continue
        name = module_name(path)
        rule = find_rule(module)
        if rule is None:
            if names.any_trains(module):
                reasons[name] = f"no rule for {type(module).__name__}"
            continue
        if rule.covers_children:
            inside.update(child for child in module.modules() if child is not module)
        parts = rule.parts(module)
        if not parts and names.any_trains(module):
            reasons[name] = rule.refusal(module)
        for part in parts:
            if not names.has(module, part.weight):
                if names.any_trains(module):
                    reasons[name] = f"its {part.weight} is computed from other parameters"
                continue
            layer = _layer(names, name, module, rule, part)
            if layer is None:
                continue
            key = layer.weight, layer.part.key
            known = owners.get(key)
            if known is None:
                owners[key] = layer
            elif known.rule is rule and known.part == layer.part:
                owners[key] = replace(known, modules=(*known.modules, module))
                if layer.bias != known.bias:
                    reasons[name] = f"shares its weight with {known.name}, but not its bias"
            else:
                reasons[name] = f"shares its weight with {known.name}, a layer of another kind"
    return list(owners.values()), reasons


def _layer(names: ParameterNames, name: str, module: nn.Module, rule: LayerRule, part: LayerPart) -> Layer | None:
    """None where neither the weight nor the bias trains."""
    weight_trains = names.trains(module, part.weight)
    bias_trains = part.bias is not None and names.trains(module, part.bias)
    if not (weight_trains or bias_trains):
        return None
    if not bias_trains:
        part = replace(part, bias=None)  # what is not trained is not in the weight's curvature either
    return Layer(
        name=f"{name}/{part.key}" if part.key else name,
        part=part,
        rule=rule,
        modules=(module,),
        weight=names.canonical(module, part.weight),
        bias=names.canonical(module, part.bias) if part.bias is not None else None,
        weight_trains=weight_trains,
        bias_trains=bias_trains,
    )
