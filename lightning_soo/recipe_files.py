"""The recipes that come with the package: what there is, and a copy to work on."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_soo.naming import nearest

SHARED = ("common", "launch", "plans")  # folders that recipes use and that are none themselves
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "results", "*.csv")


def recipes_folder() -> Path:
    """Inside an installed package, or beside it in a clone.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / SHARED[0]).is_dir():
            return folder
    raise FileNotFoundError("this installation has no recipes: install lightning_soo from its wheel or a clone")


def list_recipes() -> dict[str, str]:
    """Names in order, and the headings of their README files."""
    found = {}
    for readme in sorted(recipes_folder().glob("*/README.md")):
        if readme.parent.name not in SHARED:
            found[readme.parent.name] = readme.read_text("utf-8").splitlines()[0].lstrip("# ")
    return found


def copy_recipe(name: str, to: Path) -> Path:
    """Copy a recipe and what recipes share to ``to/recipes``, so that the commands of its README work in ``to``.

    Returns:
        the recipe's new folder.

    Raises:
        ValueError: there is no such recipe.
        FileExistsError: the recipe is there already, or a shared file is there and differs; nothing is written.
    """
    known = list_recipes()
    if name not in known:
        raise ValueError(f"there is no recipe {name!r}{nearest(name, known)}")
    source, target = recipes_folder(), to / "recipes"
    if (target / name).exists():
        raise FileExistsError(f"{target / name} is there already: move it away, or copy to another folder with --to")
    for file in (path for folder in SHARED for path in (source / folder).rglob("*") if path.is_file()):
        there = target / file.relative_to(source)
        if there.is_file() and "__pycache__" not in file.parts and there.read_bytes() != file.read_bytes():
            raise FileExistsError(f"{there} is there already and differs: copy to another folder with --to")
    for folder in (name, *SHARED):
        shutil.copytree(source / folder, target / folder, ignore=_LEFT_OUT, dirs_exist_ok=True)
    return target / name
