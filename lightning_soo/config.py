"""One configuration, the same keys behind every door: a file, a mapping, a line, or the environment."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lightning_soo.naming import nearest
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.takeover import METHODS, check_method, instead_of, take_over

ENVIRONMENT_VARIABLE = "SOO_CONFIG"
_OWN = ("method", "monitor", "adopt")  # keys that are no option of a method
Source = str | os.PathLike[str] | Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Config:
    """A method and its options, checked.

    Attributes:
        method: ``"shampoo"``, ``"soap"``, ``"sonew"`` or ``"kfac"``.
        options: what the constructor of the method's class takes (:class:`lightning_soo.Shampoo`, ``SOAP``, ``SONew``,
            ``KFAC``), ``overrides`` and ``workers`` among them.
        monitor: optimizer steps between two records of ``diagnostics()`` in the trackers; None is never.
        adopt: whether a checkpoint of a first-order run (AdamW, SGD) is taken: its moments go on, preconditioners start
            anew.
        source: where it was read, for messages.

    Raises:
        ValueError: unknown method, key or value; names the source, the key and the nearest name.
    """

    method: str = "shampoo"
    options: Mapping[str, Any] = field(default_factory=dict)
    monitor: int | None = None
    adopt: bool = False
    source: str = field(default="the configuration", compare=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"{self.source}: method={self.method!r}{instead_of(str(self.method))}")
        if self.monitor is not None and (type(self.monitor) is not int or self.monitor < 1):
            raise ValueError(f"{self.source}: monitor={self.monitor!r}: must be a whole number of at least 1, or None")
        if type(self.adopt) is not bool:
            raise ValueError(f"{self.source}: adopt={self.adopt!r}: must be true or false")
        known = option_defaults(self.method)
        for key in self.options:
            if key not in known:
                others = [name for name in METHODS if name != self.method and key in option_defaults(name)]
                hint = f"; it is an option of method {others[0]!r}" if others else ""
                suggestion = hint or nearest(str(key), [*known, *_OWN])
                raise ValueError(f"{self.source}: method {self.method!r} has no option {key!r}{suggestion}")
        try:
            check_method(self.method, self.options)
        except (TypeError, ValueError) as error:
            culprit = self._culprit()
            named = culprit is None or culprit in str(error)
            where = self.source if named else f"{self.source}: {culprit}={self.options[str(culprit)]!r}"
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "the configuration") -> Config:
        """From flat keys: ``method``, ``monitor``, ``adopt`` and the method's options."""
        for key in mapping:
            if not isinstance(key, str):
                raise ValueError(f"{source}: {key!r} is not a name")
        options = {key: value for key, value in mapping.items() if key not in _OWN}
        given = {key: mapping[key] for key in _OWN if key in mapping}
        return cls(options=options, source=source, **given)

    def resolved(self) -> dict[str, Any]:
        """All keys with their values or defaults, as plain data for a file.

        Where an optimizer is taken over, its learning rate, betas, eps, weight decay and momentum take the place of
        the defaults.
        """
        values = {**option_defaults(self.method), **self.options}
        own = {key: getattr(self, key) for key in _OWN}
        return {**own, **{key: _plain(value) for key, value in values.items()}}

    def _culprit(self) -> str | None:
        """The option that is refused by itself."""
        for key, value in self.options.items():
            try:
                check_method(self.method, {key: value})
            except (TypeError, ValueError):
                return key
        return None


def load_config(source: Source = None, variable: str = ENVIRONMENT_VARIABLE) -> Config:
    """Read a configuration.

    Args:
        source: path of a yaml or json file; yaml text; ``"method=shampoo,precondition_frequency=50"``; the name of a
            method; a mapping; None is what the environment variable says.
        variable: its name.

    Raises:
        ValueError: no configuration, or one that is refused; names the source and the key.
        FileNotFoundError: the file is missing.
    """
    if isinstance(source, Mapping):
        return Config.from_mapping(source)
    origin = ""
    if source is None:
        source, origin = os.environ.get(variable), f"{variable}: "
        if not source:
            raise ValueError(
                f"no configuration: give one, or set the environment variable {variable} to a file or to a "
                "line such as method=shampoo,precondition_frequency=50"
            )
    text, name = os.fspath(source), origin + os.fspath(source)
    if "\n" not in text and os.path.isfile(text):  # also of a line that is too long to be a name
        return Config.from_mapping(_parse(Path(text).read_text("utf-8"), name, as_json=text.endswith(".json")), name)
    if re.fullmatch(r"\S+\.(ya?ml|json)", text):
        raise FileNotFoundError(f"{name}: there is no such file")
    if "\n" in text or text.lstrip().startswith("{") or re.match(r"\s*\w+:\s", text):
        return Config.from_mapping(_parse(text, f"{origin}the given text"), f"{origin}the given text")
    if "=" in text:
        return Config.from_mapping(_inline(text, name), name)
    return Config.from_mapping({"method": text.strip()}, name)


def from_config(
    source: Source | Config, params_or_model: Any, optimizer: torch.optim.Optimizer | None = None
) -> SecondOrderOptimizer:
    """Build the configured optimizer, or make a given one into it.

    Args:
        source: a :class:`Config`, or what :func:`load_config` takes.
        params_or_model: parameters, ``named_parameters()``, groups or a model.
        optimizer: an AdamW, Adam or SGD that is taken over in place: it stays the same object with its settings and
            schedulers; ``params_or_model`` then only gives names (a model) or is None.

    Raises:
        ValueError: a configuration that is refused.
        TypeError: an optimizer that cannot be taken over.
    """
    config = source if isinstance(source, Config) else load_config(source)
    if optimizer is None:
        found = METHODS[config.method](params_or_model, **config.options)
    else:
        model = params_or_model if isinstance(params_or_model, nn.Module) else None
        found = take_over(optimizer, config.method, dict(config.options), model)
    found.adopts = config.adopt
    return found


def option_defaults(method: str) -> dict[str, Any]:
    """Name and default of every option of a method."""
    parameters = inspect.signature(METHODS[method].__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.name not in ("self", "params")}


def import_yaml(purpose: str) -> ModuleType:
    """PyYAML, which comes with Accelerate; an ImportError says what it was for."""
    try:
        import yaml
    except ImportError:
        raise ImportError(f"{purpose}: YAML needs PyYAML: pip install pyyaml, or use JSON") from None
    module: ModuleType = yaml
    return module


def parse_yaml(text: str, source: str) -> Any:
    """YAML, with ``1e-3`` a number as in YAML 1.2, and ``None`` as ``null``: so options are written in Python.

    Raises:
        ImportError: PyYAML is missing.
        ValueError: not YAML.
    """
    yaml = import_yaml(source)

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined,misc]
        """Its own resolvers, so that nobody else's change."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^None$"), ["N"])
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {error}") from None


def split_at_commas(line: str) -> Iterator[str]:
    """At commas outside brackets."""
    depth, part = 0, ""
    for character in line:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            yield part
            part = ""
        else:
            part += character
    if part.strip():
        yield part


def _parse(text: str, source: str, *, as_json: bool = False) -> Mapping[str, Any]:
    try:
        found = json.loads(text) if as_json else parse_yaml(text, source)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{source}: expected keys and values, such as 'method: shampoo', not {type(found).__name__}")
    return found


def _inline(line: str, source: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in split_at_commas(line):
        key, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"{source}: {part!r} has no '=': write key=value,key=value")
        if key.strip() in found:
            raise ValueError(f"{source}: {key.strip()!r} is given twice")
        found[key.strip()] = parse_yaml(value.strip(), source)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value.__name__ if isinstance(value, type) else value
