"""The optimizers that are measured; a peer that is not installed is left out."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lightning_soo import KFAC, SOAP, Shampoo
from lightning_soo.optim.options import ShampooOptions
from lightning_soo.refresh.schedule import GROWING

BETAS = (0.9, 0.99)
# class, and what it is given beside a learning rate
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "shampoo": (Shampoo, {"betas": BETAS}),
    "soap": (SOAP, {"betas": BETAS}),
    "kfac": (KFAC, {}),
}
# ours by name: the method, and what is given beside that
VARIANTS: dict[str, dict[str, Any]] = {
    "ours, defaults": {},
    "ours, float32": {"compute_dtype": "float32"},
    "ours, SOAP": {"method": "soap"},
}
# Shampoo's and SOAP's defaults as they are once the interval has grown, from the first step on: to wait for it takes
# 659 steps. For costs alone
GROWN: dict[str, Any] = {"precondition_frequency": int(GROWING["max"])}
_EXECUTION = ("workers", "exchange_bucket_bytes", "collective_timeout")  # these change no number


class Unsuited(ValueError):
    """An optimizer that cannot train this model, with the reason."""


class Optimizers:
    """Two optimizers that step as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


@dataclass(frozen=True, kw_only=True, eq=False)
class Contender:
    """Attributes:
    make: the optimizer of a model at a learning rate.
    options: everything that decides what it computes beside model, learning rate and steps, as json would have it.
    module: to be imported before a clock starts.
    start: the lowest of the learning rates that are tried first.
    cycle: steps over which its cost repeats.
    warm_up: steps until it repeats.
    same_as: contender of the same method, whose points in time to target it shares.
    ours: options of one of our optimizers, for the bound.
    """

    name: str
    make: Callable[[nn.Module, float], Any]
    options: Mapping[str, Any]
    module: str = "torch"
    start: float = 3e-4
    cycle: int = 10
    warm_up: int = 20
    same_as: str | None = None
    ours: ShampooOptions | None = None


def from_library(name: str, method: str = "shampoo", **given: Any) -> Contender:
    """Ours with the defaults of the library as it is, and what is given. Args: method: of ``METHODS``."""
    kind, common = METHODS[method]
    probe = kind(nn.Linear(2, 2), lr=1.0, **common, **given)
    found, group = probe.options, probe.param_groups[0]
    probe.close()
    numbers = {key: value for key, value in asdict(found).items() if key not in _EXECUTION}
    interval = found.precondition_frequency
    return Contender(
        name=name,
        make=lambda model, lr: kind(model, lr=lr, **common, **given),
        options=plain(
            {"optimizer": f"lightning_soo.{kind.__name__}", **numbers}
            | {key: value for key, value in group.items() if key not in ("params", "param_names", "lr")}
        ),
        cycle=interval.max,
        warm_up=found.start + sum(interval.short_lengths()) + 2 * interval.max,
        ours=found,
    )


def _torch(name: str, kind: str, start: float, same_as: str | None = None, **options: Any) -> Contender:
    return Contender(
        name=name,
        make=lambda model, lr: getattr(torch.optim, kind)(model.parameters(), lr=lr, **options),
        options=plain({"optimizer": f"torch.optim.{kind}", **options}),
        start=start,
        same_as=same_as,
    )


def _peer(
    name: str,
    optimizer: str,
    make: Callable[[Any, nn.Module, float, dict[str, Any]], Any],
    start: float = 3e-4,
    packages: Sequence[str] = (),
    **options: Any,
) -> Iterator[Contender]:
    """Of a package that may not be there. Args: make: from module, model, learning rate and options."""
    module = optimizer.rpartition(".")[0]
    if importlib.util.find_spec(module) is None:
        return
    versions = {package: importlib.metadata.version(package) for package in packages}
    yield Contender(
        name=name,
        make=lambda model, lr: make(importlib.import_module(module), model, lr, dict(options)),
        options=plain({"optimizer": optimizer, **versions, **options}),
        module=module,
        start=start,
    )


def contenders(variants: Sequence[str] = ("ours, defaults",), **given: Any) -> list[Contender]:
    """AdamW foreach is first: ratios are to it.

    Args:
        variants: names of ``VARIANTS``.
        given: options of all of them.
    """
    adamw = {"betas": BETAS, "weight_decay": 0.0}
    return [
        _torch("AdamW foreach", "AdamW", 3e-4, **adamw, foreach=True),
        _torch("AdamW fused", "AdamW", 3e-4, same_as="AdamW foreach", **adamw, fused=True),
        _torch("SGD, momentum 0.9", "SGD", 1e-2, momentum=0.9, foreach=True),
        Contender(
            name="Muon",
            make=torch_muon,
            options=plain({"optimizer": "torch.optim.Muon", "adamw_lr_ratio": 1.0, "adamw": adamw, **MUON}),
            start=1e-3,
        ),
        *(from_library(name, **VARIANTS[name], **given) for name in variants),
        *_peer(
            "HeavyBall SOAP, every 10",
            "heavyball.SOAP",
            _heavyball,
            packages=["heavyball"],
            **adamw,
            shampoo_beta=BETAS[1],
            precondition_frequency=10,
            max_precond_dim=1024,
            use_precond_schedule=False,
        ),
        *_peer("HeavyBall PSGDKron", "heavyball.PSGDKron", _heavyball, start=1e-3, packages=["heavyball"], **adamw),
        *_peer(
            "pytorch_optimizer ScalableShampoo, every 10",
            "pytorch_optimizer.ScalableShampoo",
            lambda module, model, lr, options: module.ScalableShampoo(model.parameters(), lr=lr, **options),
            start=1e-2,  # as SGD's, its graft
            packages=["pytorch_optimizer"],
            betas=BETAS,
            start_preconditioning_step=1,
            preconditioning_compute_steps=10,
        ),
        *_peer(
            "Meta Shampoo, every 10",
            "distributed_shampoo.DistributedShampoo",
            _meta_shampoo,
            start=1e-3,
            betas=BETAS,
            max_preconditioner_dim=1024,
            precondition_frequency=10,
            grafting="adam",
        ),
    ]


def choose(names: Sequence[str] | None, **given: Any) -> list[Contender]:
    """AdamW foreach, and those whose name begins so; without names everyone but the variants.

    Args:
        given: options of all of ours.

    Raises:
        SystemExit: nobody's name begins so.
    """
    if not names:
        return contenders(**given)
    everyone = contenders(tuple(VARIANTS), **given)
    for name in names:
        if not any(contender.name.startswith(name) for contender in everyone):
            raise SystemExit(f"no contender is called {name!r}: {', '.join(c.name for c in everyone)}")
    return [everyone[0], *(c for c in everyone[1:] if c.name.startswith(tuple(names)))]


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """As json would have it: tuples as lists, what it has no word for as text."""

    def value(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(key): value(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [value(inner) for inner in item]
        return item if item is None or isinstance(item, bool | int | float | str) else str(item)

    return value(options)


# steps are scaled to the size of AdamW's, so that AdamW can move the rest at the same learning rate
MUON = {"momentum": 0.95, "nesterov": True, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}


def torch_muon(model: nn.Module, lr: float) -> Optimizers:
    """Muon for the matrices of hidden layers; AdamW at the same learning rate for the rest.

    Hidden are linear layers and attention's projections, but the last linear layer: that is the output. Torch's Muon
    takes matrices alone, so that a convolutional network has nothing for it.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.MultiheadAttention)]
    linear = [module for module in layers if isinstance(module, nn.Linear)]
    others = [module for module in model.modules() if module not in layers] + linear[-1:]
    excluded = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    hidden = {
        id(parameter): parameter
        for module in layers
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 2 and id(parameter) not in excluded
    }
    if not hidden:
        raise Unsuited("torch's Muon takes matrices of hidden layers, and there is none")
    rest = [parameter for parameter in model.parameters() if id(parameter) not in hidden]
    return Optimizers(
        torch.optim.Muon(list(hidden.values()), lr=lr, **MUON),
        torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0, foreach=True),
    )


def _heavyball(module: Any, model: nn.Module, lr: float, options: dict[str, Any]) -> Any:
    module.utils.compile_mode = None  # its default autotunes for minutes and needs a compiler
    kind = module.SOAP if "shampoo_beta" in options else module.PSGDKron
    return kind(model.parameters(), lr=lr, **options)


def _meta_shampoo(module: Any, model: nn.Module, lr: float, options: dict[str, Any]) -> Any:
    # the graft's class was called otherwise once
    graft = getattr(module, "AdamPreconditionerConfig", None) or module.AdamGraftingConfig
    options["grafting_config"] = graft(beta2=BETAS[1], epsilon=1e-8)
    del options["grafting"]
    return module.DistributedShampoo(model.parameters(), lr=lr, epsilon=1e-12, **options)
