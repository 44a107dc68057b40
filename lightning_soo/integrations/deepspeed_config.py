"""DeepSpeed's configuration: where it is read, what it says of second order, and what here cannot work with."""

from __future__ import annotations

import os
from base64 import urlsafe_b64decode
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from lightning_soo.config import ENVIRONMENT_VARIABLE, Config, Source, load_config

SECTION = "soo"
KeyPath = tuple[str, ...]
_REFUSED: tuple[tuple[KeyPath, str, str], ...] = (
    (("zero_optimization", "zenflow"), "ZenFlow", "it keeps moments of its own"),
    (("zero_optimization", "offload_optimizer", "super_offload"), "SuperOffload", "it steps in processes of its own"),
    (("checkpoint", "load_universal"), "universal checkpoints", "they merge moments of Adam and nothing else"),
    (("hybrid_engine", "enabled"), "the hybrid engine", "it exchanges the model's modules"),
    (("tensor_parallel", "autotp_size"), "tensor parallelism", "a rank would see slices of layers"),
)


def accept_optimizer(config: dict[str, Any]) -> None:
    """Let ``config`` accept an optimizer that is not DeepSpeed's own, offloaded or not; what it says itself stays."""
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)


def clipping_remark(norm: float, *, is_default: bool = False) -> str:
    """What DeepSpeed does to gradients before the optimizer sees them, in a line below the plan."""
    if not norm:
        return "\nDeepSpeed does not clip gradients"
    unasked = ", its default: write 0.0 for none" if is_default else ""
    return f"\nDeepSpeed clips gradients at {norm} (gradient_clipping{unasked})"


def read_deepspeed_config(source: Any) -> tuple[dict[str, Any], str]:
    """A copy of it, and what messages call it.

    Args:
        source: a dictionary, the path of a json file, or json in base64, as DeepSpeed takes them.

    Raises:
        ValueError: nothing of these, or not json.
    """
    if isinstance(source, Mapping):
        return deepcopy(dict(source)), "the DeepSpeed configuration"
    import hjson  # DeepSpeed reads with it
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    try:
        if isinstance(source, str | os.PathLike) and os.path.exists(source):
            name = f"DeepSpeed configuration {source}"
            with open(source, encoding="utf-8") as file:
                text = file.read()
        else:
            name = "the DeepSpeed configuration in base64"
            text = urlsafe_b64decode(source).decode("utf-8")
    except (TypeError, ValueError):
        raise ValueError(
            f"DeepSpeed's config is a dictionary, the path of a json file or json in base64, and not {source!r}"
        ) from None
    try:
        found = hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected an object with keys, not {type(found).__name__}")
    return found, name


def find_second_order(config: Mapping[str, Any], name: str, given: Source | Config) -> Config | None:
    """The one configuration of second order: of the key "soo", of the call or of ``SOO_CONFIG``; None is none of them.

    Raises:
        ValueError: two that differ, or one that is refused.
    """
    found: list[Config] = []
    if SECTION in config:
        section, where = config[SECTION], f'{name}: "{SECTION}"'
        if not isinstance(section, Mapping):
            raise ValueError(f'{where} must be an object such as {{"method": "shampoo"}}, not {section!r}')
        found.append(Config.from_mapping(section, where))
    if isinstance(given, Mapping):
        found.append(Config.from_mapping(given, f"the argument {SECTION}"))
    elif given is not None:
        found.append(given if isinstance(given, Config) else load_config(given))
    if os.environ.get(ENVIRONMENT_VARIABLE):
        found.append(load_config())
    for other in found[1:]:
        if other != found[0]:
            raise ValueError(
                f"two configurations for one DeepSpeed engine: {found[0].source} and {other.source}. Opt in once: by "
                f'the key "{SECTION}" of the DeepSpeed configuration, by the argument {SECTION}, or by '
                f"{ENVIRONMENT_VARIABLE}"
            )
    return found[0] if found else None


def check_deepspeed_config(config: Mapping[str, Any], name: str) -> None:
    """
    Raises:
        ValueError: a feature that second-order training here does not work with, by name, or a value "auto".
    """
    for path in _automatic({key: value for key, value in config.items() if key not in (SECTION, "zero_optimization")}):
        raise ValueError(
            f'{name}: {path} is "auto", which only Transformers\' Trainer and Accelerate fill in: write the value'
        )
    precision = next((kind for kind in ("bf16", "fp16") if _at(config, (kind, "enabled"))), None)
    if precision is not None and not _at(config, ("zero_optimization", "stage")):
        raise ValueError(
            f"{name}: {precision} at stage 0, where DeepSpeed keeps flat copies that cannot be told apart: write "
            '"zero_optimization": {"stage": 1}, 2 or 3'
        )
    for device in ("offload_optimizer", "offload_param"):
        if _at(config, ("zero_optimization", device, "device")) == "nvme":
            raise ValueError(f"{name}: zero_optimization.{device}: NVMe offload is not supported: write cpu or none")
    for keys, feature, why in _REFUSED:
        if _at(config, keys):
            raise ValueError(
                f"{name}: {'.'.join(keys)}: {feature} cannot be combined with second-order training here, because "
                f"{why}: remove it"
            )


def _at(config: Any, path: KeyPath) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _automatic(value: Any, path: str = "") -> Iterator[str]:
    if value == "auto":
        yield path
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _automatic(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from _automatic(entry, f"{path}[{number}]")
