"""A model without numbers: parameters on the meta device, from a Hugging Face configuration or a function."""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_soo.naming import nearest

logger = logging.getLogger(__name__)


def build_model(source: str, options: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """A model with parameters on the meta device.

    Args:
        source: a folder with a ``config.json``, such a file, a Transformers model type (``"llama"``), or
            ``"module:function"``, which is called with the meta device as default and returns the model.
        options: keys of the configuration that take the place of its own; arguments of the function.
        dtype: of the parameters; None leaves them as they are made.

    Raises:
        ValueError: nothing of that name, a key that the configuration does not have, or what making the model raised.
        TypeError: the function returns no model, or parameters that are not on the meta device.
        ImportError: Transformers is missing, or the function's module.
    """
    options = dict(options or {})
    if re.fullmatch(r"[\w.]+:[\w.]+", source):
        model = _from_function(source, options)
    else:
        model = _from_configuration(source, options)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise TypeError(f"{source}: parameter {name!r} has no shape yet: give lazy modules their input sizes")
        if not parameter.is_meta:
            raise TypeError(f"{source}: parameter {name!r} is on {parameter.device}: make it on the default device")
    return model.to(dtype) if dtype is not None else model


def layer_classes(model: nn.Module) -> list[str] | None:
    """Class names of the layers that a Transformers model says are not to be split; None where it says nothing."""
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    present = {type(module).__name__ for module in model.modules()}
    return sorted(named & present) or None


def _from_function(source: str, options: Mapping[str, Any]) -> nn.Module:
    place, name = source.split(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules of the working directory, as `python -m` finds them
    made: Any = importlib.import_module(place)
    for part in name.split("."):
        if not hasattr(made, part):
            raise ValueError(f"{source}: {place} has no {part!r}{nearest(part, dir(made))}")
        made = getattr(made, part)
    with torch.device("meta"):
        model = _made(source, made, options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{source} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _from_configuration(source: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        import transformers
        from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
    except ImportError:
        raise ImportError(
            f"{source}: Hugging Face configurations need Transformers: pip install transformers; or give "
            "module:function"
        ) from None
    given: dict[str, Any] = {}
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            given = json.loads(file.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"{file}: a {type(given).__name__} where an object was to be")
        kind = given.pop("model_type", None)
        if kind is None:
            raise ValueError(f"{file}: 'model_type' is missing: it is no configuration of a Transformers model")
    elif re.fullmatch(r"[\w.-]+", source) and not file.suffix:
        kind = source
    elif path.is_dir():
        raise ValueError(f"{source}: the folder has no config.json")
    else:
        raise ValueError(f"{source}: there is no such file or folder")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{source}: {kind!r} is no folder, no file and no model type of Transformers {transformers.__version__}"
            f"{nearest(str(kind), CONFIG_MAPPING.keys())}"
        )
    default = CONFIG_MAPPING[kind]()
    for key in options:
        if not hasattr(default, key):
            raise ValueError(f"{kind} has no option {key!r}{nearest(key, vars(default))}")
    for key in given:
        close = nearest(key, vars(default))
        if not hasattr(default, key) and close:
            logger.warning("%s: %s has no option %r%s; it is ignored", file, kind, key, close)
    config = _made(source, CONFIG_MAPPING[kind], {**given, **options})
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    model: nn.Module
    if named and named[0] is not None:
        build = named[0]
    elif type(config) in AutoModelForCausalLM._model_mapping:
        build = AutoModelForCausalLM.from_config
    else:
        build = AutoModel.from_config
    with torch.device("meta"):
        model = _made(source, build, {"config": config})
    return model


def _made(source: str, build: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """What ``build`` returns for ``options``; its errors are of many kinds, and all are the user's to read.

    Raises:
        ValueError: with the source and the error's last words.
    """
    try:
        return build(**options)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        raise ValueError(f"{source}: {type(error).__name__}: {words[0]}") from error
