"""Modules of a recipe under names of their own: several recipes have a ``data`` and a ``model``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parent.parent / "recipes"


def load(recipe: str, *names: str) -> list[ModuleType]:
    """``recipes/RECIPE/NAME.py`` for each name; the search path is as it was afterwards."""
    path, found = list(sys.path), []
    for name in names:
        spec = importlib.util.spec_from_file_location(f"{recipe}_{name}", RECIPES / recipe / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found.append(module)
    sys.path[:] = path
    return found


@contextmanager
def flat(recipe: str) -> Iterator[Callable[[str], ModuleType]]:
    """Import the modules of a recipe by their own names, as its programs do, for as long as this lasts."""
    folder = RECIPES / recipe
    # Other recipes and the benchmarks have modules of the same names; so has the folder that recipes share.
    names = {path.stem for part in (folder, RECIPES / "common") for path in part.glob("*.py")}
    path, modules = list(sys.path), {name: sys.modules.pop(name) for name in names & {*sys.modules}}
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(modules)
        sys.path[:] = path
